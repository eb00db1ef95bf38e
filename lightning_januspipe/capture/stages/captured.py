"""From a program and its cut to the stages and the epilogue that the engine runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from lightning_januspipe.capture.adapters import Adapter, adapters_of, joined, separated
from lightning_januspipe.capture.cut.cut import Cut, Regions
from lightning_januspipe.capture.cut.dependence import dependence_of
from lightning_januspipe.capture.find.call_format import CallFormat
from lightning_januspipe.capture.stages.call_inputs import CallInputs
from lightning_januspipe.capture.stages.staged_potential import Inputs
from lightning_januspipe.capture.trace.program import (
    PlaceholderValues,
    Program,
    ReturnedSize,
    build_module,
    placeholders_of,
)
from lightning_januspipe.capture.trees import with_leaves
from lightning_januspipe.engine.autocast import OFF, autocast_as
from lightning_januspipe.engine.specs import ChainSpec, StageOutput, TensorSpec, violated_sizes
from lightning_januspipe.errors import CaptureError, shown


@dataclass(frozen=True)
class CapturedPotential:
    """A captured potential, cut into stages (a :class:`~.staged_potential.StagedPotential`).

    Attributes:
        path: dotted name of the potential inside the LightningModule.
        program: the traced potential.
        regions: what of it is what.
        cut: the chain of stages.
        call: what a call of the potential looks like.
        replaced: see :class:`~lightning_januspipe.capture.find.grad_call.PotentialCall`.
        step_parameters: see there.
        validated_kinds: kinds of calls that its stages were validated on.
    """

    path: str
    program: Program
    regions: Regions
    cut: Cut
    call: CallFormat
    replaced: tuple[str, ...] | None = None
    step_parameters: tuple[str, ...] = ()
    validated_kinds: frozenset[str] = frozenset()

    @property
    def chain(self) -> ChainSpec:
        """Specs of derivative and observables."""
        owner = {n: s for s, names in enumerate(self.cut.bodies) for n in names}
        reach = dependence_of(self.program, self.regions)
        return ChainSpec(
            coordinates=tuple(_spec(self.program, n) for n in self.program.coordinates),
            observables=tuple(_spec(self.program, n) for n in self.regions.observables),
            observable_stage=tuple(owner[n] for n in self.regions.observables),
            autocast=self.program.autocast,
            dependence=tuple(tuple(reach[n] for n in names) for names in self.cut.boundaries),
        )

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Floating-point types that its operations compute in."""
        specs = (self.program.by_name[n].spec for n in (*self.regions.geometry, *self.regions.body))
        return {spec.dtype for spec in specs if spec is not None and spec.dtype.is_floating_point}

    @property
    def num_stages(self) -> int:
        """Length of the chain."""
        return self.cut.num_stages

    @property
    def num_operations(self) -> list[int]:
        """Operations of each stage."""
        return [len(body) for body in self.cut.bodies]

    @property
    def boundary_bytes(self) -> Sequence[int]:
        """Bytes of each boundary on the batch that was measured."""
        return self.cut.boundary_bytes

    @property
    def outputs(self) -> Sequence[int]:
        """The outputs that the epilogue computes."""
        return self.regions.outputs

    @property
    def derived(self) -> Sequence[int]:
        """Those of them that depend on the derivative."""
        return self.regions.derived

    def inputs(self, potential: nn.Module) -> Inputs:
        """From a call of the live potential to the program's inputs."""
        return CallInputs(self, potential)

    def stage(self, index: int, potential: nn.Module) -> CapturedStage:
        """One stage."""
        return CapturedStage(self, index, potential)

    def return_value(self, potential: nn.Module) -> Epilogue:
        """What the forward returns."""
        return Epilogue(self, potential)

    def bind_sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Values of the size symbols for one call's tensors.

        Raises:
            CaptureError: a size for which the traced forward would have done something else.
        """
        places = self._places()
        for (position, dim), (lower, upper) in self.program.limits.items():
            shape = tensors[position].shape
            if dim >= len(shape) or not lower <= shape[dim] <= upper:
                expected = str(lower) if lower == upper else f"at least {lower}" if lower else f"at most {upper}"
                raise CaptureError(
                    f"the potential {shown(self.path)} was captured for size {expected} of dimension {dim} of its "
                    f"input {places[position]}, but this batch gives it the shape {tuple(shape)}. {_OTHER_SIZES}"
                )
        symbols = self.program.bind(tensors)
        for condition in self.program.conditions:
            sizes = violated_sizes(condition, symbols)
            if sizes:
                where = {s: self.program.symbols[s] for s in sizes}
                given = [f"{s} = {sizes[s]} (dimension {d} of its input {places[i]})" for s, (i, d) in where.items()]
                raise CaptureError(
                    f"the potential {shown(self.path)} was captured for sizes with {condition}, but this batch has "
                    f"{', '.join(given)}. {_OTHER_SIZES}"
                )
        return symbols

    def unvalidated_kinds(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], symbols: Mapping[str, int]
    ) -> frozenset[str]:
        """Returns sizes of 0 and 1 and new entries, on which a forward may branch, without :attr:`validated_kinds`."""
        places = self._places()
        found = set()
        for symbol, (position, dim) in self.program.symbols.items():
            if symbols[symbol] < 2:
                found.add(f"size {symbols[symbol]} in dimension {dim} of {places[position]}")
        # What an adapter makes of the arguments has always the same entries.
        if all(type(adapter).arguments is Adapter.arguments for adapter in adapters_of(potential)):
            found |= {f"an entry {place}" for place in self.call.new_entries(args, kwargs)}
        return frozenset(found - self.validated_kinds)

    def _places(self) -> list[str]:
        """Where the program's inputs come from, in words."""
        program, places = self.program, [*self.call.tensors, *self.call.sizes]
        places += ["an integer read from data"] * len(program.sizes)
        places += ["random numbers that the forward draws"] * len(program.draws)
        return places + ["a list of indices that the forward makes"] * len(program.prepared)

    def parameter_stages(self) -> dict[str, set[int]]:
        """Name of each parameter inside the potential -> the stages that read it.

        Parameters that the epilogue, or the user's step by itself, reads are read by every stage.
        """
        everywhere = set(range(self.cut.num_stages))
        stages: dict[str, set[int]] = {name: set() for name in self.program.parameters.values()}
        for stage in everywhere:
            for placeholder in placeholders_of(self.program, self._stage_nodes(stage), self._stage_outputs(stage)):
                if placeholder in self.program.parameters:
                    stages[self.program.parameters[placeholder]].add(stage)
        for placeholder in self.regions.epilogue_parameters:
            stages[self.program.parameters[placeholder]] |= everywhere
        for name in self.step_parameters:
            if stages.get(name):
                stages[name] |= everywhere
        return stages

    def _stage_nodes(self, stage: int) -> list[str]:
        return [*self.regions.geometry, *self.cut.replicated[stage], *self.cut.bodies[stage]]

    def _stage_outputs(self, stage: int) -> list[str]:
        body = set(self.cut.bodies[stage])
        sent = self.cut.boundaries[stage] if stage < len(self.cut.boundaries) else []
        energies = [n for n in self.program.energies if n in body]
        observables = [n for n in self.regions.observables if n in body]
        return [*sent, *energies, *observables, *self.program.coordinates]


_OTHER_SIZES = (
    "The forward turns that size into a constant (int(...), len(...)) or has a Python branch that depends on it: use "
    "tensor.shape and torch.where instead, or train with pipeline_size=1 and graph_size=1."
)


class CapturedStage:
    """One stage of a captured potential (a :class:`~lightning_januspipe.engine.specs.StageFunction`).

    Args:
        captured: the captured potential.
        index: position of this stage in the chain.
        potential: the live potential, whose parameters and buffers are read at every call.
    """

    def __init__(self, captured: CapturedPotential, index: int, potential: nn.Module) -> None:
        program, cut = captured.program, captured.cut
        outputs = captured._stage_outputs(index)
        received = cut.boundaries[index - 1] if index else []
        self.index = index
        names = placeholders_of(program, captured._stage_nodes(index), outputs, received)
        self._placeholders = PlaceholderValues(program, potential, names)
        self._module = build_module(
            program,
            captured._stage_nodes(index),
            [*names, *received],
            outputs,
            leaves=independent_coordinates(program),
        )
        own = set(cut.bodies[index])
        sent = cut.boundaries[index] if index < len(cut.boundaries) else []
        self._num_energies = sum(n in own for n in program.energies)
        self.observables: Sequence[int] = [i for i, n in enumerate(captured.regions.observables) if n in own]
        self.boundary_in: Sequence[TensorSpec] = [_spec(program, n) for n in received]
        self.boundary_out: Sequence[TensorSpec] = [_spec(program, n) for n in sent]
        live = dict(potential.named_parameters(remove_duplicate=False))
        used = [live[program.parameters[n]] for n in names if n in program.parameters]
        self.parameters: Sequence[nn.Parameter] = [p for p in dict.fromkeys(used) if p.requires_grad]

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Evaluate the stage; see :class:`~lightning_januspipe.engine.specs.StageFunction`."""
        out = self._module(*self._placeholders.values(tensors), *boundary)
        first = len(self.boundary_out) + self._num_energies
        second = first + len(self.observables)
        num_sent = len(self.boundary_out)
        return StageOutput(list(out[:num_sent]), list(out[num_sent:first]), list(out[first:second]), list(out[second:]))


class Epilogue:
    """What the potential's forward does after differentiating: from derivative and observables to its return value."""

    def __init__(self, captured: CapturedPotential, potential: nn.Module) -> None:
        program, regions = captured.program, captured.regions
        self._program, self._kept = program, regions.outputs
        self._potential, self._adapters = potential, adapters_of(potential)
        wanted = [program.outputs[i] for i in regions.outputs]
        given = [program.gradient, *regions.observables]
        names = placeholders_of(program, regions.epilogue, wanted, given)
        self._placeholders = PlaceholderValues(program, potential, names)
        self._module = build_module(program, regions.epilogue, [*names, *given], wanted)
        live = dict(potential.named_parameters(remove_duplicate=False))
        used = [live[program.parameters[n]] for n in regions.epilogue_parameters]
        self.parameters: Sequence[nn.Parameter] = [p for p in dict.fromkeys(used) if p.requires_grad]

    def __call__(
        self, call_tensors: Sequence[Tensor], observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> Any:
        """The potential's return value.

        Args:
            call_tensors: the call's own tensors (returned as they are where the forward passes them through).
            observables: leaves for the observables.
            derivatives: leaves for ∂E/∂x.
        """
        program = self._program
        inputs = dict(zip(program.inputs, call_tensors, strict=True))
        computed = dict(zip(self._kept, self.tensors(call_tensors, observables, derivatives), strict=True))
        values = iter(
            inputs[name] if name in inputs else computed.get(position, _Unavailable(position))
            for position, name in enumerate(program.outputs)
        )
        symbols = program.bind(call_tensors)

        def filled(_: str, leaf: Any) -> Any:
            if isinstance(leaf, ReturnedSize):
                return leaf.value(symbols)
            return next(values) if isinstance(leaf, Tensor) else leaf

        return with_leaves(program.returned, filled)

    def tensors(
        self, call_tensors: Sequence[Tensor], observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> list[Tensor]:
        """The outputs that are available, as a list (``regions.outputs`` has their positions)."""
        with autocast_as(OFF):  # casts are operations of the program
            return list(self._module(*self._placeholders.values(call_tensors), list(derivatives), *observables))

    def of_forward(self, returned: Any) -> Any:
        """What the forward itself returned, as adapters make it for the program."""
        return joined(self._adapters, self._potential, returned)

    def for_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        """The return value as adapters make it for the user's step; see :class:`ReturnValue`."""
        return separated(self._adapters, self._potential, args, kwargs, value)


class _Unavailable:
    """Stands where the potential returns a value that the step did not read when it was captured."""

    def __init__(self, position: int) -> None:
        self._position = position

    def __getattr__(self, name: str) -> object:
        raise CaptureError(
            f"output {self._position} of the potential is read now, but was not read by the step on which the "
            "potential was captured, so it is not computed. Read it in training_step too, or "
            "set pipeline_size=1 and graph_size=1."
        )

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, _Unavailable):
                leaf.__getattr__("read")
        raise AssertionError("called without an unavailable output")


def independent_coordinates(program: Program) -> list[str]:
    """Differentiation inputs that depend on no other one: these become leaves of autograd.

    Strained positions that depend on the strain stay what they are.
    """
    found: list[str] = []
    reached: set[str] = set()
    for node in program.nodes:
        if node.op != "placeholder" and any(i in reached for i in node.inputs()):
            reached.add(node.name)
        elif node.name in program.coordinates:
            found.append(node.name)
            reached.add(node.name)
    return found


def _spec(program: Program, name: str) -> TensorSpec:
    spec = program.by_name[name].spec
    assert spec is not None, f"{name} is no tensor"
    return spec
