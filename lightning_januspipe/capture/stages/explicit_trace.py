"""Traces a stage of a potential that declares its own stages, so that its phases can be compiled.

The parts of the stage run on made-up tensors of the right shapes, with the same tracer as whole potentials. Values of
the tensors have no effect on the trace, or it is refused. Sizes may have: the trace notes for which ones it is right.
The first micro-batch of a compiled stage is compared with the eager one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import sympy
import torch
from torch import Tensor, nn

from lightning_januspipe.capture.find.call_format import CallFormat, call_leaves
from lightning_januspipe.capture.find.grad_call import PotentialCall
from lightning_januspipe.capture.side_effects import unchanged
from lightning_januspipe.capture.stages.explicit_trial import Trial
from lightning_januspipe.capture.stages.stage_body import StageBody, stage_body
from lightning_januspipe.capture.trace.function import PlaceholderValues
from lightning_januspipe.capture.trace.graph_walks import ancestors, placeholders
from lightning_januspipe.capture.trace.operators import is_random
from lightning_januspipe.capture.trace.program import LARGEST_SIZE, Program, symbols_in
from lightning_januspipe.capture.trace.trace import trace_potential
from lightning_januspipe.engine.autocast import Autocast, autocast_as
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.errors import CaptureError

_EXAMPLE_SIZES = (5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


@dataclass(frozen=True)
class PartsOfStage:
    """Describes a stage for the tracer.

    Attributes:
        path: dotted name of the potential inside the LightningModule.
        parts: the modules that run one after the other.
        inputs: names and specs of the potential's inputs.
        received: names and specs of the features that the stage before returned.
        returned: names of the features that the last part returns.
        coordinates: names of the differentiation inputs.
        energy: the name of the feature that is differentiated; None for all stages but the last.
        autocast: the autocast under which the parts run.
        device: the device that the stage runs on.
    """

    path: str
    parts: Sequence[nn.Module]
    inputs: Mapping[str, TensorSpec]
    received: Mapping[str, TensorSpec]
    returned: Sequence[str]
    coordinates: Sequence[str]
    energy: str | None
    autocast: Autocast
    device: torch.device


@dataclass(frozen=True)
class StageTrace:
    """Holds the trace of a stage.

    Attributes:
        body: its operations, without the live modules.
        specs: specs of the values that it reads beside its boundary, in the size symbols of the potential.
        values: reads these values from the live modules and a call's tensors.
    """

    body: StageBody
    specs: list[TensorSpec]
    values: PlaceholderValues


class _Parts(nn.Module):
    """Runs the parts of a stage on the tensors of a call, followed by the features received."""

    def __init__(self, stage: PartsOfStage) -> None:
        super().__init__()
        self.parts = nn.ModuleList(stage.parts)
        self._stage = (stage,)  # no module of this one

    def features(self, *tensors: Tensor) -> list[Tensor]:
        """Returns the features that the last part returns."""
        return self._run(*tensors)[1]

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        """Returns the same and the derivatives of the energy, by which the tracer knows energy and coordinates."""
        (stage,) = self._stage
        inputs, found = self._run(*tensors)
        energies = [x.sum() for x in found if x.is_floating_point()]
        if stage.energy is not None:
            energies = [found[list(stage.returned).index(stage.energy)].sum()]
        return [*found, *torch.autograd.grad(energies, [inputs[name] for name in stage.coordinates])]

    def _run(self, *tensors: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
        (stage,) = self._stage
        num_own = len(stage.inputs)
        inputs = dict(zip(stage.inputs, tensors[:num_own], strict=True))
        features: Mapping[str, Tensor] = dict(zip(stage.received, tensors[num_own:], strict=True))
        for part in self.parts:
            features = part(inputs, features)
        return inputs, [features[name] for name in stage.returned]


def trace_parts(stage: PartsOfStage) -> StageTrace:
    """Traces the parts of one stage.

    Args:
        stage: the parts, which stay as they are.

    Raises:
        CaptureError: they cannot be traced, are right for one size only, read values, draw random numbers, change
            derivatives, or do something else in evaluation.
    """
    specs = [*stage.inputs.values(), *stage.received.values()]
    symbols = sorted({s for spec in specs for size in spec.shape for s in symbols_in(size)})
    if len(symbols) > len(_EXAMPLE_SIZES):
        raise CaptureError(f"its inputs have {len(symbols)} sizes; expected at most {len(_EXAMPLE_SIZES)}")
    sizes = dict(zip(symbols, _EXAMPLE_SIZES, strict=False))
    module = _Parts(stage)
    module.training = stage.parts[0].training
    coordinates = [stage.inputs[name] for name in stage.coordinates]
    trial = Trial(module, module.features, specs, coordinates, stage.device)
    with unchanged(module), torch.enable_grad(), autocast_as(stage.autocast):
        trial.refuse_changed_derivatives(sizes)
        tensors = trial.tensors(sizes)
        program = trace_potential(module, PotentialCall(stage.path, tuple(tensors), {}))
        found = _of_program(stage, module, program, tensors)
        trial.refuse_another_evaluation(sizes)
        run = partial(_features_of, found, len(stage.inputs))
        found.body.conditions += tuple(trial.sizes_that_differ(run, sizes))
    return found


def _features_of(trace: StageTrace, num_own: int, *tensors: Tensor) -> list[Tensor]:
    """Returns the features that a trace returns."""
    out = trace.body(trace.values.values(tensors[:num_own]), tensors[num_own:])
    return [*out.boundary, *out.observables]


def _of_program(stage: PartsOfStage, module: nn.Module, program: Program, tensors: Sequence[Tensor]) -> StageTrace:
    """Returns the trace of a stage from its program, whose inputs come in another order.

    Args:
        stage: the parts.
        module: the module that was traced.
        program: its program.
        tensors: the tensors on which it was traced.
    """
    place_of = {id(tensor): place for place, tensor in call_leaves(tuple(tensors), {}).items()}
    order = [CallFormat.of(tuple(tensors), {}).tensors.index(place_of[id(tensor)]) for tensor in tensors]
    given = [program.inputs[i] for i in order]
    names_given = [*stage.inputs, *stage.received]
    spec_of = dict(zip(given, [*stage.inputs.values(), *stage.received.values()], strict=True))
    conditions = _conditions(program, dict(zip(given, names_given, strict=True)), spec_of)
    num_own = len(stage.inputs)
    inputs, received = given[:num_own], given[num_own:]
    sent = program.outputs[: len(stage.returned)]
    name_of = dict(zip(stage.inputs, inputs, strict=True))
    coordinates = [name_of[name] for name in stage.coordinates]
    if stage.energy is None:
        outputs, counts = [*sent, *coordinates], (len(sent), 0, 0)
    else:
        outputs, counts = [*program.energies, *sent, *coordinates], (0, len(program.energies), len(sent))
    read = [n for n in placeholders(program, ancestors(program, outputs, given=set(received))) if n not in received]
    names = [*read, *_unread_parameters(program, module, read)]
    program.inputs = given
    body = stage_body(program, names, received, outputs, counts, coordinates)
    body.conditions = conditions
    return StageTrace(
        body=body,
        specs=[spec_of.get(name) or program.spec(name) for name in names],
        values=PlaceholderValues(program, module, names),
    )


def _unread_parameters(program: Program, module: nn.Module, read: Sequence[str]) -> list[str]:
    """Returns one placeholder of each trained parameter that the parts own and do not read, under none of its names."""
    names = program.parameters
    known = {id(module.get_parameter(names[placeholder])) for placeholder in read if placeholder in names}
    live = {
        id(p): placeholder for placeholder, name in names.items() if (p := module.get_parameter(name)).requires_grad
    }
    return [placeholder for parameter, placeholder in live.items() if parameter not in known]


def _conditions(program: Program, names: Mapping[str, str], specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """Returns the relations between sizes for which a program is right, in the size symbols of the potential.

    Sizes of 0 and 1 are left out: :meth:`.Trial.sizes_that_differ` tries them.

    Args:
        program: the traced parts.
        names: the names of its inputs, by placeholder.
        specs: the specs of its inputs, in the size symbols of the potential.

    Raises:
        CaptureError: it is right for some values only, or for one size.
    """
    if program.sizes or program.fixed_values:
        raise CaptureError("its parts read values from tensors")
    if any(map(is_random, program.operations)) or any("dropout_noise" in str(n.target) for n in program.operations):
        raise CaptureError("its parts draw random numbers")
    sizes_of = {n.name: n.spec.shape for n in program.nodes if n.spec is not None}
    if any(symbols_in(size) - program.symbols.keys() for shape in sizes_of.values() for size in shape):
        raise CaptureError("its parts make tensors whose sizes depend on values")
    found: list[str] = []
    for (position, dim), (lower, upper) in program.limits.items():
        placeholder = program.inputs[position]
        size = specs[placeholder].shape[dim]
        if isinstance(size, int):
            continue
        if lower == upper:
            raise CaptureError(
                f"its parts are right for one size of dimension {dim} of {names[placeholder]!r} only, because they "
                "loop over it, or make a constant of it"
            )
        found += [f"{size} >= {lower}"] * (lower > 0) + [f"{size} <= {upper}"] * (upper < LARGEST_SIZE)
    size_of = {s: str(specs[program.inputs[i]].shape[d]) for s, (i, d) in program.symbols.items()}
    found += [re.sub(r"\b[a-z]\w*", lambda match: size_of.get(match[0], match[0]), guard) for guard in program.guards]
    return tuple(dict.fromkeys(condition for condition in found if not _holds_above_one(condition)))


def _holds_above_one(condition: str) -> bool:
    """Tells whether a relation between sizes holds for all that are above 1."""
    relation = sympy.sympify(condition)
    above = {s: sympy.Symbol(f"{s}_", integer=True, positive=True) + 1 for s in relation.free_symbols}
    return bool(relation.subs(above) is sympy.true)
