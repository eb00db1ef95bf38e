"""A stage that runs the graphs of its phases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.compiled.blueprint import TraceableStage, bind, first_places
from lightning_januspipe.compiled.joint import shape_of
from lightning_januspipe.compiled.phases import PhaseSignature, StagePhases
from lightning_januspipe.compiled.ports import Kind, Port
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec, TensorSpec
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.schedule.actions import Phase

Runner = Callable[..., Sequence[Tensor]]
"""A phase graph as a function: interpreted, or compiled."""

_Given = Mapping[Kind, Sequence[Tensor | None]]


@dataclass
class _Inflight:
    """What one micro-batch has between its phases.

    Attributes:
        sizes: values of the size symbols.
        known: values by their names in the joint graph: sizes, parameters, the batch, what arrived, and what was kept.
        done: the phases that have run.
        absent: cotangents that the loss does not depend on, for which zeros were taken.
    """

    sizes: Mapping[str, int]
    known: dict[str, Any]
    done: set[Phase] = field(default_factory=set)
    absent: set[Port] = field(default_factory=set)


class CompiledStage(Stage):
    """Runs the phases of one stage as graphs, for any number of micro-batches in flight.

    A micro-batch whose sizes the graphs are not right for runs through all its phases eagerly.

    Args:
        function: the stage.
        phases: its phases.
        runners: what runs each of them: their graphs, operation by operation, or compiled.
        gradients: where parameter gradients are added up.
        chain: what all stages share.

    Attributes:
        num_misfits: micro-batches that ran eagerly.
        misfit: why the first of them did.
    """

    def __init__(
        self,
        function: TraceableStage,
        phases: StagePhases,
        runners: Mapping[Phase, Runner],
        gradients: GradientBuffers,
        chain: ChainSpec,
    ) -> None:
        super().__init__(function, gradients, chain.autocast)
        self._traceable = function
        self.num_misfits, self.misfit = 0, ""
        self._phases, self._runners, self._chain = phases, dict(runners), chain
        self._places: tuple[int, ...] = ()
        self._running: dict[int, _Inflight] = {}
        self._eagerly: set[int] = set()
        self._names: dict[Kind, list[tuple[int, str]]] = {}
        for name, port in phases.ports.items():
            self._names.setdefault(port.kind, []).append((port.position, name))

    @property
    def num_inflight(self) -> int:
        """Micro-batches between their first and their last phase here."""
        return len(self._running) + super().num_inflight

    def clear(self) -> None:
        """Forgets all micro-batches, after an error or an evaluation."""
        self._running.clear()
        self._eagerly.clear()
        super().clear()

    def run_eagerly(self, microbatch: int) -> None:
        """Decides for a micro-batch that has not begun that its phases run eagerly."""
        self._eagerly.add(microbatch)

    def why_misfit(self, tensors: Sequence[Any]) -> str | None:
        """Returns in words why the graphs are not right for the sizes of a micro-batch; None where they are.

        Args:
            tensors: the potential call's tensors.
        """
        return self._phases.sizes.misfit(bind(self._traceable, tensors))

    def held_bytes(self, microbatch: int) -> int:
        """Returns the bytes of the values that a micro-batch keeps between its phases here."""
        state = self._running.get(microbatch)
        if state is None:
            return 0
        held = [t for n, t in state.known.items() if not self._phases.is_free(n) and isinstance(t, Tensor)]
        return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())

    def forward_energy(
        self, microbatch: int, tensors: Sequence[Any], boundary: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FE; see :meth:`~lightning_januspipe.engine.stage.Stage.forward_energy`."""
        sizes = bind(self._traceable, tensors)
        reason = self._phases.sizes.misfit(sizes)
        if reason is not None or microbatch in self._eagerly:
            self._eagerly.add(microbatch)
            self.num_misfits += 1
            self.misfit = self.misfit or reason or "it does not fit on another graph rank"
            return super().forward_energy(microbatch, tensors, boundary)
        values = self._traceable.values(tensors)
        self._places = self._places or first_places(values)
        names = self._names.get(Kind.VALUE, ())
        known: dict[str, Any] = {name: values[self._places[i]].detach().contiguous() for i, name in names}
        of_graphs = self._phases.sizes.values(sizes)
        known |= {name: of_graphs[i] for i, name in self._names.get(Kind.SIZE, ())}
        self._running[microbatch] = _Inflight(sizes, known)
        found = self._run(Phase.FE, microbatch, {Kind.BOUNDARY_IN: boundary})
        return found[Kind.BOUNDARY_OUT], found[Kind.OBSERVABLE]

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor | None], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FF; see :meth:`~lightning_januspipe.engine.stage.Stage.forward_force`."""
        if microbatch in self._eagerly:
            found = super().forward_force(microbatch, boundary_gradients, create_graph=create_graph)
            self._forget_unless(create_graph, microbatch)
            return found
        results = self._run(Phase.FF, microbatch, {Kind.FORCE_SEED: boundary_gradients})
        self._forget_unless(create_graph, microbatch)
        return results[Kind.BOUNDARY_GRADIENT], results[Kind.DERIVATIVE]

    def backward_force(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor],
        derivative_cotangents: Sequence[Tensor],
        *,
        defer: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs BF; see :meth:`~lightning_januspipe.engine.stage.Stage.backward_force`."""
        if microbatch in self._eagerly:
            return super().backward_force(microbatch, boundary_cotangents, derivative_cotangents, defer=defer)
        given = {Kind.FORCE_COTANGENT: boundary_cotangents, Kind.DERIVATIVE_COTANGENT: derivative_cotangents}
        sent = self._run(Phase.BF, microbatch, given)[Kind.SEED_COTANGENT]
        if not defer:
            self.weight_force(microbatch)
        return sent, []

    def backward_energy(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor | None],
        observable_cotangents: Sequence[Tensor | None],
        *,
        defer: bool = False,
        force_part: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Runs BE; see :meth:`~lightning_januspipe.engine.stage.Stage.backward_energy`."""
        assert not force_part, "FF and BF of a compiled stage run on the same rank"
        if microbatch in self._eagerly:
            sent = super().backward_energy(microbatch, boundary_cotangents, observable_cotangents, defer=defer)
            self._forget_unless(defer, microbatch)
            return sent
        given = {Kind.BOUNDARY_COTANGENT: boundary_cotangents, Kind.OBSERVABLE_COTANGENT: observable_cotangents}
        sent = self._run(Phase.BE, microbatch, given)[Kind.BOUNDARY_IN_COTANGENT]
        if not defer:
            self.weight_energy(microbatch)
        return sent

    def weight_force(self, microbatch: int) -> None:
        """Runs WF; see :meth:`~lightning_januspipe.engine.stage.Stage.weight_force`."""
        if microbatch in self._eagerly:
            super().weight_force(microbatch)
        else:
            self._run(Phase.WF, microbatch, {})

    def weight_energy(self, microbatch: int) -> None:
        """Runs WE; see :meth:`~lightning_januspipe.engine.stage.Stage.weight_energy`."""
        if microbatch in self._eagerly:
            super().weight_energy(microbatch)
        else:
            self._run(Phase.WE, microbatch, {})
        self._forget_unless(False, microbatch)

    def _forget_unless(self, goes_on: bool, microbatch: int) -> None:
        if not goes_on:
            self._running.pop(microbatch, None)
            self._eagerly.discard(microbatch)

    def _run(self, phase: Phase, microbatch: int, given: _Given) -> dict[Kind, list[Tensor]]:
        """One phase: takes in what arrives, adds parameter gradients, and lets go of what no later phase reads."""
        state, graph = self._running[microbatch], self._phases.signatures.get(phase)
        self._take_in(state, given)
        found: dict[Kind, list[Tensor]] = {kind: [] for kind in Kind}
        state.done.add(phase)
        if graph is not None:
            with torch.no_grad():
                out = self._runners[phase](*(state.known[name] for name in graph.inputs))
            num = len(graph.results)
            self._collect(graph, out[:num], state, found)
            state.known.update(zip(graph.kept, out[num:], strict=True))
        readers = self._phases.readers
        for name in [n for n in state.known if readers.get(n, frozenset()) <= state.done]:
            del state.known[name]
        return found

    def _take_in(self, state: _Inflight, given: _Given) -> None:
        for kind, tensors in given.items():
            for index, name in self._names.get(kind, ()):
                tensor = tensors[index] if index < len(tensors) else None
                if tensor is None:
                    state.absent.add(Port(kind, index))
                if name not in self._phases.readers:
                    continue
                if tensor is None:
                    tensor = self._zeros(self._spec(kind, index), state)
                state.known[name] = tensor.detach().contiguous()

    def _collect(
        self, graph: PhaseSignature, out: Sequence[Tensor], state: _Inflight, found: dict[Kind, list[Tensor]]
    ) -> None:
        for port, seeds, tensor in zip(graph.results, graph.seeds, out, strict=True):
            if port.kind is not Kind.PARAMETER_GRADIENT:
                found[port.kind].append(tensor)
            elif seeds is None or not seeds <= state.absent:
                self._gradients.add([self.function.parameters[port.position]], [tensor])

    def _spec(self, kind: Kind, index: int) -> TensorSpec:
        if kind is Kind.OBSERVABLE_COTANGENT:
            return self._chain.observables[self.function.observables[index]]
        return self.function.boundary_out[index]

    def _zeros(self, spec: TensorSpec, state: _Inflight) -> Tensor:
        device = next(t.device for t in state.known.values() if isinstance(t, Tensor))
        return torch.zeros(shape_of(spec, state.sizes), dtype=spec.dtype, device=device)
