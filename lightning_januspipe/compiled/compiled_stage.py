"""Runs a stage with the graphs of its phases."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.compiled.blueprint import TraceableStage, first_places
from lightning_januspipe.compiled.joint import shape_of
from lightning_januspipe.compiled.phase_graphs import PhaseSignature, StagePhases
from lightning_januspipe.compiled.ports import Kind, Port
from lightning_januspipe.compiled.twin import EagerTwin, Results
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.host_memory import KeptTensor, KeptValues
from lightning_januspipe.engine.specs import ChainSpec, TensorSpec
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.schedule.actions import Phase

Runner = Callable[..., Sequence[Tensor]]
"""A phase graph as a function: interpreted, or compiled."""

_Given = Mapping[Kind, Sequence[Tensor | None]]


@dataclass
class _Inflight:
    """Keeps what one micro-batch has between its phases.

    Attributes:
        sizes: values of the size symbols.
        known: values by their names in the joint graph: sizes, parameters, the batch, what arrived, and what was kept.
        values: what the stage reads; exchanges, of which graphs know the handles only, exist as long as they are here.
        done: the phases that have run.
        absent: cotangents that the loss does not depend on, for which zeros were taken.
        kept: moves known values to the host and back, where the phases keep them there.
    """

    sizes: Mapping[str, int]
    known: dict[str, Any]
    values: Sequence[Any]
    done: set[Phase] = field(default_factory=set)
    absent: set[Port] = field(default_factory=set)
    kept: KeptValues | None = None


@dataclass
class PhaseRunners:
    """Holds the phases of one stage, ready to run.

    Attributes:
        phases: what the phases take, return and keep.
        runners: what runs each of them: their graphs, operation by operation, or compiled.
        tolerance: what rounding explains of a difference from the eager phases; None to compare nothing.
        verified: the last phase in which a micro-batch has been compared with the eager phases; None before.
    """

    phases: StagePhases
    runners: Mapping[Phase, Runner]
    tolerance: float | None = None
    verified: Phase | None = None

    @property
    def is_verified(self) -> bool:
        """Tells whether all phases that there are have been compared, or need not be."""
        last = Phase.BE if Phase.BF in self.phases.signatures else Phase.FF
        return self.tolerance is None or self.verified in (Phase.BE, last)


class CompiledStage(Stage):
    """Runs the phases of one stage as graphs, for any number of micro-batches in flight.

    The first micro-batch runs eagerly too, and the two are compared. A micro-batch whose sizes the graphs are not right
    for runs through all its phases eagerly.

    Args:
        function: the stage.
        runnable: its phases.
        gradients: where parameter gradients are added up.
        chain: what all stages share.

    Attributes:
        num_misfits: micro-batches that ran eagerly.
        misfit: why the first of them did.
    """

    def __init__(
        self, function: TraceableStage, runnable: PhaseRunners, gradients: GradientBuffers, chain: ChainSpec
    ) -> None:
        super().__init__(function, gradients, chain.autocast)
        self._traceable = function
        self.num_misfits, self.misfit = 0, ""
        self._runnable, self._phases, self._chain = runnable, runnable.phases, chain
        self._places: tuple[int, ...] = ()
        self._running: dict[int, _Inflight] = {}
        self._eagerly: set[int] = set()
        self._twins: dict[int, EagerTwin] = {}
        self._names: dict[Kind, list[tuple[int, str]]] = {}
        for name, port in self._phases.ports.items():
            self._names.setdefault(port.kind, []).append((port.position, name))

    @property
    def num_inflight(self) -> int:
        """Returns the number of micro-batches between their first and their last phase here."""
        return len(self._running) + super().num_inflight

    def clear(self) -> None:
        """Forgets all micro-batches, after an error or an evaluation."""
        self._running.clear()
        self._eagerly.clear()
        self._twins.clear()
        super().clear()

    def held_bytes(self) -> int:
        """Returns the bytes of the values that all micro-batches keep between their phases here."""
        states = self._running.values()
        known = [item for state in states for item in state.known.items()]
        held = [t for n, t in known if isinstance(t, Tensor) and not self._phases.is_free(n)]
        on_device = sum(state.kept.device_bytes() for state in states if state.kept is not None)
        return on_device + sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())

    def fetch(self, microbatch: int, phase: Phase) -> None:
        """Starts to bring back what a phase reads; see :meth:`~lightning_januspipe.engine.stage.Stage.fetch`."""
        state = self._running.get(microbatch)
        if state is not None and state.kept is not None:
            state.kept.fetch(phase)

    def to_host(self, microbatch: int, following: Phase | None) -> None:
        """Moves known values to the host; see :meth:`~lightning_januspipe.engine.stage.Stage.to_host`."""
        state = self._running.get(microbatch)
        if state is None or self._phases.activation != "offload":
            return
        if state.kept is None:
            given = [t for n, t in state.known.items() if isinstance(t, Tensor) and self._phases.is_free(n)]
            state.kept = KeptValues([*given, *self.function.parameters])
        for name, value in state.known.items():
            if isinstance(value, Tensor):
                state.known[name] = state.kept.add(value, self._phases.readers[name]) or value
        state.kept.to_host(following)

    def host_tensors(self) -> list[Tensor]:
        """Returns what is on the host; see :meth:`~lightning_januspipe.engine.stage.Stage.host_tensors`."""
        kept = [state.kept for state in self._running.values() if state.kept is not None]
        return [tensor for values in kept for tensor in values.host_tensors()]

    def forward_energy(
        self, microbatch: int, tensors: Sequence[Any], boundary: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FE; see :meth:`~lightning_januspipe.engine.stage.Stage.forward_energy`."""
        sizes, *of_others = self._traceable.sizes(tensors)
        # Graph ranks run the same exchanges only if a micro-batch that does not fit on one is eager on all of them.
        misfits = (self._phases.sizes.misfit(s) for s in (sizes, *of_others))
        reason = next((r for r in misfits if r is not None), None)
        if reason is not None:
            self._note_misfit(reason)
            self._eagerly.add(microbatch)
            return super().forward_energy(microbatch, tensors, boundary)
        values = self._traceable.values(tensors)
        self._places = self._places or first_places(values, self._traceable.value_specs)
        names = self._names.get(Kind.VALUE, ())
        known: dict[str, Any] = {name: values[self._places[i]].detach().contiguous() for i, name in names}
        of_graphs = self._phases.sizes.values(sizes)
        known |= {name: of_graphs[i] for i, name in self._names.get(Kind.SIZE, ())}
        self._running[microbatch] = _Inflight(sizes, known, values)
        if not self._runnable.is_verified and not self._twins:
            assert self._runnable.tolerance is not None
            tolerance = self._runnable.tolerance
            self._twins[microbatch] = EagerTwin(self.function, self._autocast, tolerance, values, self._uncompared)
        found = self._run(Phase.FE, microbatch, {Kind.BOUNDARY_IN: boundary})
        sent = found[Kind.BOUNDARY_OUT], found[Kind.OBSERVABLE]
        self._compare(Phase.FE, microbatch, sent, lambda s: s.forward_energy(microbatch, tensors, boundary))
        return sent

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor | None], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FF; see :meth:`~lightning_januspipe.engine.stage.Stage.forward_force`."""
        if microbatch in self._eagerly:
            of_eager = super().forward_force(microbatch, boundary_gradients, create_graph=create_graph)
            self._forget_unless(create_graph, microbatch)
            return of_eager
        found = self._run(Phase.FF, microbatch, {Kind.FORCE_SEED: boundary_gradients})
        sent = found[Kind.BOUNDARY_GRADIENT], found[Kind.DERIVATIVE]
        self._compare(
            Phase.FF,
            microbatch,
            sent,
            lambda s: s.forward_force(microbatch, boundary_gradients, create_graph=create_graph),
        )
        self._forget_unless(create_graph, microbatch)
        return sent

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
        self._compare(
            Phase.BF,
            microbatch,
            (sent, []),
            lambda s: s.backward_force(microbatch, boundary_cotangents, derivative_cotangents, defer=defer),
        )
        if not defer:
            self._run(Phase.WF, microbatch, {})
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
            of_eager = super().backward_energy(microbatch, boundary_cotangents, observable_cotangents, defer=defer)
            self._forget_unless(defer, microbatch)
            return of_eager
        given = {Kind.BOUNDARY_COTANGENT: boundary_cotangents, Kind.OBSERVABLE_COTANGENT: observable_cotangents}
        sent = self._run(Phase.BE, microbatch, given)[Kind.BOUNDARY_IN_COTANGENT]
        self._compare(
            Phase.BE,
            microbatch,
            (sent,),
            lambda s: (s.backward_energy(microbatch, boundary_cotangents, observable_cotangents, defer=defer),),
        )
        if not defer:
            self._run(Phase.WE, microbatch, {})
            self._end(microbatch)
        return sent

    def weight_force(self, microbatch: int) -> None:
        """Runs WF; see :meth:`~lightning_januspipe.engine.stage.Stage.weight_force`."""
        if microbatch in self._eagerly:
            super().weight_force(microbatch)
            return
        self._run(Phase.WF, microbatch, {})
        if microbatch in self._twins:
            self._twins[microbatch].run(Phase.WF, lambda s: s.weight_force(microbatch))

    def weight_energy(self, microbatch: int) -> None:
        """Runs WE; see :meth:`~lightning_januspipe.engine.stage.Stage.weight_energy`."""
        if microbatch in self._eagerly:
            super().weight_energy(microbatch)
            self._forget_unless(False, microbatch)
            return
        self._run(Phase.WE, microbatch, {})
        if microbatch in self._twins:
            self._twins[microbatch].run(Phase.WE, lambda s: s.weight_energy(microbatch))
        self._end(microbatch)

    def _note_misfit(self, reason: str) -> None:
        self.num_misfits += 1
        if not self.misfit:
            self.misfit = reason
            warnings.warn(
                f"januspipe: a micro-batch runs eagerly in stage {self.function.index}, because the compiled phases "
                f"are not right for its sizes: {reason}. Others like it do too.",
                stacklevel=3,
            )

    def _uncompared(self, gradients: GradientBuffers) -> CompiledStage:
        """Returns a stage that runs the same phases, of which nothing is compared."""
        return CompiledStage(self._traceable, replace(self._runnable, tolerance=None), gradients, self._chain)

    def _compare(self, phase: Phase, microbatch: int, found: Results, run_with: Callable[[Stage], Results]) -> None:
        """Compares the results of a phase with those of the eager phase, if this micro-batch has a twin."""
        twin = self._twins.get(microbatch)
        if twin is not None:
            twin.run(phase, run_with, found)
            self._runnable.verified = phase if phase is Phase.FF else self._runnable.verified

    def _end(self, microbatch: int) -> None:
        """Ends a micro-batch in training; the gradients of one with a twin are handed on now."""
        twin = self._twins.get(microbatch)
        if twin is not None:
            twin.finish()
            self._runnable.verified = Phase.BE
            parameters = self.function.parameters
            self._gradients.add(parameters, [twin.gradients.get(p) for p in parameters])
        self._forget_unless(False, microbatch)

    def _forget_unless(self, goes_on: bool, microbatch: int) -> None:
        if not goes_on:
            self._running.pop(microbatch, None)
            self._twins.pop(microbatch, None)
            self._eagerly.discard(microbatch)

    def _run(self, phase: Phase, microbatch: int, given: _Given) -> dict[Kind, list[Tensor]]:
        """Runs one phase: takes in what arrives, adds parameter gradients, and drops what no later phase reads."""
        state, graph = self._running[microbatch], self._phases.signatures.get(phase)
        self._take_in(state, given)
        found: dict[Kind, list[Tensor]] = {kind: [] for kind in Kind}
        state.done.add(phase)
        if graph is not None:
            with torch.no_grad():
                out = self._runnable.runners[phase](*(_on_device(state.known[name]) for name in graph.inputs))
            num = len(graph.results)
            twin = self._twins.get(microbatch)
            self._collect(graph, out[:num], state, found, self._gradients if twin is None else twin.gradients)
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
        self,
        graph: PhaseSignature,
        out: Sequence[Tensor],
        state: _Inflight,
        found: dict[Kind, list[Tensor]],
        gradients: GradientBuffers,
    ) -> None:
        for port, seeds, tensor in zip(graph.results, graph.seeds, out, strict=True):
            if port.kind is not Kind.PARAMETER_GRADIENT:
                found[port.kind].append(tensor)
            elif seeds is None or not seeds <= state.absent:
                gradients.add([self.function.parameters[port.position]], [tensor])

    def _spec(self, kind: Kind, index: int) -> TensorSpec:
        if kind is Kind.OBSERVABLE_COTANGENT:
            return self._chain.observables[self.function.observables[index]]
        return self.function.boundary_out[index]

    def _zeros(self, spec: TensorSpec, state: _Inflight) -> Tensor:
        device = next(t.device for t in state.values if isinstance(t, Tensor))
        return torch.zeros(shape_of(spec, state.sizes), dtype=spec.dtype, device=device)


def _on_device(value: Any) -> Any:
    return value.tensor() if isinstance(value, KeptTensor) else value
