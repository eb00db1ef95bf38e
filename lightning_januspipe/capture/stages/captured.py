"""Makes the stages that the engine runs, and the forward's return value, from a captured program and its cut."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from lightning_januspipe.capture.adapters import Adapter, adapted, adapters_of, joined, separated
from lightning_januspipe.capture.cut.cut import Cut, Profile, Regions
from lightning_januspipe.capture.cut.dependence import dependence_of
from lightning_januspipe.capture.cut.profile import measure
from lightning_januspipe.capture.find.call_format import CallFormat
from lightning_januspipe.capture.find.grad_call import PotentialCall, ReplacedCalls
from lightning_januspipe.capture.size_names import SizeWords, words_of_program
from lightning_januspipe.capture.stages.call_inputs import CallInputs
from lightning_januspipe.capture.stages.stage_body import StageBody, stage_body
from lightning_januspipe.capture.stages.staged_potential import Inputs, StageOperations
from lightning_januspipe.capture.trace.function import ProgramFunction
from lightning_januspipe.capture.trace.graph_walks import ancestors, in_order, readers
from lightning_januspipe.capture.trace.operators import SHAPE_ONLY, operator_of
from lightning_januspipe.capture.trace.program import Program, ReturnedSize
from lightning_januspipe.capture.trees import with_leaves
from lightning_januspipe.engine.specs import ChainSpec, StageOutput, TensorSpec, violated_sizes
from lightning_januspipe.errors import WITHOUT_CAPTURE, CaptureError, quoted


@dataclass(frozen=True)
class CapturedPotential:
    """Holds a captured potential, cut into stages (a :class:`~.staged_potential.StagedPotential`).

    Attributes:
        path: dotted name of the potential inside the LightningModule.
        program: the captured program.
        regions: which of its operations are geometry, body and epilogue.
        cut: the chain of stages.
        call: the format of the potential's calls.
        replaced: see :class:`~lightning_januspipe.capture.find.grad_call.PotentialCall`.
        step_parameters: see there.
        validated_kinds: kinds of calls that its stages were validated on.
        graph_size: number of graph ranks that it was captured for.
    """

    path: str
    program: Program
    regions: Regions
    cut: Cut
    call: CallFormat
    replaced: ReplacedCalls | None = None
    step_parameters: tuple[str, ...] = ()
    validated_kinds: frozenset[str] = frozenset()
    graph_size: int = 1

    @property
    def chain(self) -> ChainSpec:
        """Returns the specs of derivative and observables."""
        owner = {n: s for s, names in enumerate(self.cut.bodies) for n in names}
        dependence = dependence_of(self.program, self.regions)
        return ChainSpec(
            coordinates=tuple(self.program.spec(n) for n in self.program.coordinates),
            observables=tuple(self.program.spec(n) for n in self.regions.observables),
            observable_stage=tuple(owner[n] for n in self.regions.observables),
            autocast=self.program.autocast,
            dependence=tuple(tuple(dependence[n] for n in names) for names in self.cut.boundaries),
        )

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Returns the floating-point types that its operations compute in."""
        specs = (self.program.by_name[n].spec for n in (*self.regions.geometry, *self.regions.body))
        return {spec.dtype for spec in specs if spec is not None and spec.dtype.is_floating_point}

    @property
    def num_stages(self) -> int:
        """Returns the length of the chain."""
        return self.cut.num_stages

    @property
    def num_operations(self) -> list[int]:
        """Returns the number of operations of each stage."""
        return [len(body) for body in self.cut.bodies]

    @property
    def operation_word(self) -> str:
        """Returns what :attr:`num_operations` counts."""
        return "operations"

    @property
    def boundary_bytes(self) -> Sequence[int]:
        """Returns the bytes of each boundary on the batch that was measured."""
        return self.cut.boundary_bytes

    @property
    def coordinate_names(self) -> Sequence[str]:
        """Returns the names of the differentiation inputs in the program."""
        return self.program.coordinates

    @property
    def observable_names(self) -> Sequence[str]:
        """Returns the names of the observables in the program."""
        return self.regions.observables

    @property
    def outputs(self) -> Sequence[int]:
        """Returns the outputs that the epilogue computes."""
        return self.regions.outputs

    @property
    def derived(self) -> Sequence[int]:
        """Returns the computed outputs that depend on the derivative."""
        return self.regions.derived

    @property
    def _places(self) -> list[str]:
        """Returns the place of each input in a call; integers read from data come last."""
        program = self.program
        known = [*self.call.tensors, *self.call.sizes, *["an integer read from data"] * len(program.sizes)]
        known += ["random numbers that the forward draws"] * len(program.draws)
        return known + ["a list of indices that the forward makes"] * len(program.prepared)

    def inputs(self, potential: nn.Module) -> Inputs:
        """Returns the function from a call of the live potential to the program's inputs."""
        return CallInputs(self, potential)

    def stage(self, index: int, potential: nn.Module) -> CapturedStage:
        """Returns one stage."""
        return CapturedStage(self, index, potential)

    def return_value(self, potential: nn.Module) -> Epilogue:
        """Returns the object that computes the forward's return value."""
        return Epilogue(self, potential)

    def profile(self, potential: nn.Module, tensors: Sequence[Tensor]) -> Profile:
        """Measures every operation on one call's tensors."""
        return measure(self.program, self.regions, potential, tensors)

    def size_words(self) -> SizeWords:
        """Returns the field's words for sizes, from what indices look up."""
        places = [*self.call.tensors, *self.call.sizes]
        return words_of_program(self.program, self.cut.sizes, self.regions.observables, places)

    def bind_sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Returns the values of the size symbols for one call's tensors.

        Raises:
            CaptureError: a size for which the traced forward would have done something else.
        """
        self.require_limits(tensors)
        symbols = self.program.bind(tensors)
        for guard in self.program.guards:
            sizes = violated_sizes(guard, symbols)
            if sizes:
                where = {s: self.program.symbols[s] for s in sizes}
                given = [
                    f"{s} = {sizes[s]} (dimension {d} of its input {self._places[i]})" for s, (i, d) in where.items()
                ]
                raise CaptureError(
                    f"the potential {quoted(self.path)} was captured for sizes with {guard}, but this batch has "
                    f"{', '.join(given)}. {_OTHER_SIZES}"
                )
        return symbols

    def require_limits(self, tensors: Sequence[Tensor]) -> None:
        """Raises an error if an input, of the first ones that are given, has a size that was not captured."""
        for (position, dim), (lower, upper) in self.program.limits.items():
            if position >= len(tensors):
                continue
            shape = tensors[position].shape
            if dim >= len(shape) or not lower <= shape[dim] <= upper:
                expected = str(lower) if lower == upper else f"at least {lower}" if lower else f"at most {upper}"
                raise CaptureError(
                    f"the potential {quoted(self.path)} was captured for size {expected} of dimension {dim} of its "
                    f"input {self._places[position]}, but this batch gives it the shape {tuple(shape)}. {_OTHER_SIZES}"
                )

    def unvalidated_kinds(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], symbols: Mapping[str, int]
    ) -> frozenset[str]:
        """Returns sizes of 0 and 1 and new entries, on which a forward may branch, without :attr:`validated_kinds`."""
        found = {
            f"size {symbols[symbol]} in dimension {dim} of {self._places[position]}"
            for symbol, (position, dim) in self.program.symbols.items()
            if symbols[symbol] < 2
        }
        # What an adapter makes of the arguments has always the same entries.
        if all(type(adapter).arguments is Adapter.arguments for adapter in adapters_of(potential)):
            found |= {f"an entry {place}" for place in self.call.new_entries(args, kwargs)}
        return frozenset(found - self.validated_kinds)

    def with_validated(self, *calls: tuple[nn.Module, PotentialCall]) -> CapturedPotential:
        """Returns the same potential, to which the kinds of these calls count as validated."""
        found = self.validated_kinds
        for potential, call in calls:
            symbols = self.bind_sizes(self.inputs(potential)(call.args, call.kwargs))
            found |= self.unvalidated_kinds(potential, call.args, call.kwargs, symbols)
        return replace(self, validated_kinds=found)

    def with_evaluation(self, potential: nn.Module, call: PotentialCall) -> CapturedPotential:
        """Returns the same potential, which also takes the constants that a call has in evaluation."""
        arguments = adapted(adapters_of(potential, self.graph_size), potential, call.args, call.kwargs)
        return replace(self, call=self.call.with_evaluation(*arguments))

    def received(self, stage: int) -> list[str]:
        """Returns the names of the values that a stage receives from the one before."""
        return self.cut.boundaries[stage - 1] if stage else []

    def sent(self, stage: int) -> list[str]:
        """Returns the names of the values that a stage sends to the next one."""
        return self.cut.boundaries[stage] if stage < len(self.cut.boundaries) else []

    def boundary(self, stage: int) -> list[tuple[str, TensorSpec]]:
        """Returns the names and specs of the values that a stage sends to the next one."""
        return [(name, self.program.spec(name)) for name in self.sent(stage)]

    def computed(self, stage: int) -> list[str]:
        """Returns the names of a stage's results: its boundary, energies, observables and coordinates."""
        body = set(self.cut.bodies[stage])
        owned = [n for n in (*self.program.energies, *self.regions.observables) if n in body]
        return [*self.sent(stage), *owned, *self.program.coordinates]

    def needed(self, stage: int) -> set[str]:
        """Returns the names of all values that a stage computes or reads, without those that it receives."""
        return ancestors(self.program, self.computed(stage), given=set(self.received(stage)))

    def stage_operations(self, stage: int) -> StageOperations:
        """Returns the operations that a stage runs."""
        program, needed, repeated = self.program, self.needed(stage), self.cut.replicated[stage]
        own = [n for n in self.cut.bodies[stage] if n in needed]
        read = {i for n in own for i in program.by_name[n].inputs()}
        values = [(n, program.by_name[n].spec) for n in repeated if n in read]
        return StageOperations(
            own=own,
            repeated=repeated,
            geometry=[n for n in self.regions.geometry if n in needed],
            repeated_values=[(n, spec) for n, spec in values if spec is not None],
        )

    def parameter_stages(self) -> dict[str, set[int]]:
        """Returns for each parameter, by its name inside the potential, the stages that read it.

        Parameters that the epilogue, the values computed for each batch, or the user's step by itself read are read by
        every stage.
        """
        program, everywhere = self.program, set(range(self.num_stages))
        stages: dict[str, set[int]] = {name: set() for name in program.parameters.values()}
        for stage in everywhere:
            for placeholder in self.needed(stage) & program.parameters.keys():
                stages[program.parameters[placeholder]].add(stage)
        of_batch = ancestors(program, program.of_batch) & program.parameters.keys()
        for placeholder in (*self.regions.epilogue_parameters, *of_batch):
            stages[program.parameters[placeholder]] |= everywhere
        for name in self.step_parameters:
            if stages.get(name):
                stages[name] |= everywhere
        return stages

    def why_shared(self, parameter: str) -> str:
        """Returns, in words, why several stages read a parameter: the reason that concerns most of them."""
        placeholder = next(p for p, name in self.program.parameters.items() if name == parameter)
        repeated = {n for again in self.cut.replicated for n in again}
        read_by = readers(self.program)[placeholder]
        if placeholder in self.regions.epilogue_parameters:
            return "read after the derivative, on every rank"
        if parameter in self.step_parameters:
            return "read by the step itself, on every rank"
        if repeated.intersection(read_by):
            return f"{self._last_repeated(repeated.intersection(read_by), repeated)} computed where needed"
        if sum(not self.needed(stage).isdisjoint(read_by) for stage in range(self.num_stages)) > 1:
            return "used by layers of these stages"
        return "a constant made of it is computed where needed"

    def _last_repeated(self, started: set[str], repeated: set[str]) -> str:
        """Returns the shapes of the repeated values that operations of one stage read, computed from some values."""
        program, words = self.program, self.size_words()
        reached = set(started)
        shapes: dict[str, None] = {}
        for node in program.operations:
            reads = [i for i in node.inputs() if i in reached]
            if reads and node.name in repeated:
                reached.add(node.name)
            else:
                specs = [program.by_name[i].spec for i in reads]
                shapes.update(dict.fromkeys(f"({', '.join(map(str, words.shape(s)))})" for s in specs if s is not None))
        found = list(shapes)
        more = ", ..." if len(found) > 2 else ""
        return " and ".join(found[:2]) + more + (" is" if len(found) == 1 else " are")


_OTHER_SIZES = (
    "The forward turns that size into a constant (int(...), len(...)) or has a Python branch that depends on it: use "
    f"tensor.shape and torch.where instead, or train with {WITHOUT_CAPTURE}."
)


class CapturedStage:
    """Runs one stage of a captured potential (a :class:`~lightning_januspipe.engine.specs.StageFunction`).

    Args:
        captured: the captured potential.
        index: position of this stage in the chain.
        potential: the live potential, whose parameters and buffers are read at every call.
    """

    def __init__(self, captured: CapturedPotential, index: int, potential: nn.Module) -> None:
        program, own = captured.program, set(captured.cut.bodies[index])
        self.index = index
        self._captured = captured
        self.function = ProgramFunction(
            program,
            potential,
            {*captured.regions.geometry, *captured.cut.replicated[index], *own},
            captured.computed(index),
            captured.received(index),
            leaves=independent_coordinates(program),
        )
        self.observables: Sequence[int] = [i for i, n in enumerate(captured.regions.observables) if n in own]
        num_energies = sum(n in own for n in program.energies)
        self._counts = len(captured.sent(index)), num_energies, len(self.observables)
        self.boundary_in: Sequence[TensorSpec] = [program.spec(n) for n in captured.received(index)]
        self.boundary_out: Sequence[TensorSpec] = [program.spec(n) for n in captured.sent(index)]
        self.parameters = self.function.parameters

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Evaluates the stage; see :class:`~lightning_januspipe.engine.specs.StageFunction`."""
        values = iter(self.function(tensors, boundary))
        sent, energies, observables = ([next(values) for _ in range(count)] for count in self._counts)
        return StageOutput(sent, energies, observables, list(values))

    @property
    def body(self) -> StageBody:
        """Returns its operations as data, without the live potential."""
        captured, program = self._captured, self._captured.program
        received, outputs = captured.received(self.index), captured.computed(self.index)
        leaves = independent_coordinates(program)
        return stage_body(program, self.function.names, received, outputs, self._counts, leaves)

    @property
    def num_tensors(self) -> int:
        """Returns the number of tensors among the program's inputs."""
        return len(self._captured.program.inputs)

    @property
    def symbols(self) -> dict[str, tuple[int, int]]:
        """Maps each size symbol to the (position, dimension) of the call's tensor that defines it."""
        return self._captured.program.symbols

    @property
    def rows_of_symbols(self) -> Mapping[str, str]:
        """Maps size symbols that count sharded rows to the class of these; there are none without graph ranks."""
        return {}

    @property
    def value_specs(self) -> list[TensorSpec]:
        """Returns the specs of :meth:`values`."""
        return [self._captured.program.spec(n) for n in self.function.names]

    @property
    def exchange_specs(self) -> Sequence[Any]:
        """Returns the specs of all exchanges that sizes follow from; there are none without graph ranks."""
        return ()

    def sizes(self, tensors: Sequence[Any]) -> list[dict[str, int]]:
        """Returns the values of the size symbols for one call's tensors; on graph ranks for each of them."""
        return [self._captured.program.bind(tensors)]

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns all that the stage reads beside its boundary: parameters, buffers, constants, the batch's tensors."""
        return self.function.values(tensors)


class Epilogue:
    """Computes the forward's return value from the derivative and the observables.

    It is a :class:`~lightning_januspipe.capture.stages.staged_potential.ReturnValue`.

    Args:
        captured: the captured potential.
        potential: the live potential.
    """

    def __init__(self, captured: CapturedPotential, potential: nn.Module) -> None:
        program, regions = captured.program, captured.regions
        self._program, self._kept = program, regions.outputs
        self._potential, self._adapters = potential, adapters_of(potential, captured.graph_size)
        wanted, given = [program.outputs[i] for i in regions.outputs], [program.gradient, *regions.observables]
        self.function = ProgramFunction(program, potential, regions.epilogue, wanted, given)
        self.parameters = self.function.parameters

    def __call__(
        self, call_tensors: Sequence[Tensor], observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> Any:
        """Returns the potential's return value.

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
        """Returns the available outputs (``regions.outputs`` has their positions)."""
        return self.function(call_tensors, [list(derivatives), *observables])

    def of_forward(self, returned: Any) -> Any:
        """Returns what the forward itself returned, as adapters make it for the program."""
        return joined(self._adapters, self._potential, returned)

    def for_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        """Returns the return value as adapters make it for the user's step; see :class:`.ReturnValue`."""
        return separated(self._adapters, self._potential, args, kwargs, value)


class _Unavailable:
    """Stands in the place of a returned value that the step did not read when it was captured."""

    def __init__(self, position: int) -> None:
        self._position = position

    def __getattr__(self, name: str) -> object:
        raise CaptureError(
            f"output {self._position} of the potential is read now, but was not read by the step on which the "
            "potential was captured, so it is not computed. Read it in training_step too, or "
            f"train with {WITHOUT_CAPTURE}."
        )

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: object = (), kwargs: object = None) -> object:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, _Unavailable):
                leaf.__getattr__("read")
        raise AssertionError("called without an unavailable output")


def independent_coordinates(program: Program) -> list[str]:
    """Returns the differentiation inputs that depend on no other one: these become leaves of autograd.

    Strained positions that depend on the strain stay what they are. Zeros of the shape of another one depend on none,
    nor does a detached copy.
    """
    names = set(program.coordinates)
    by_shape = {n.name for n in program.operations if operator_of(n) in SHAPE_ONLY | {"aten.detach"}}
    found = []
    for name in in_order(program, names):
        computed = set() if name in by_shape else ancestors(program, [name], given=by_shape)
        read = {source for node in computed for source in program.by_name[node].inputs()}
        if not (computed | read) & names - {name}:
            found.append(name)
    return found
