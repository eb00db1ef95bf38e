"""Builds stages from the parts that a potential declares: for models that cannot be traced, or need no tracing.

The result is the same as of a capture: each stage is a pure function from (parameters, boundary in, batch) to (boundary
out, outputs).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.find.grad_call import PotentialCall, ReplacedCalls
from lightning_januspipe.capture.size_names import SizeWords, words_of_inputs
from lightning_januspipe.capture.stages.explicit_trace import PartsOfStage, StageTrace, trace_parts
from lightning_januspipe.capture.stages.stage_body import StageBody
from lightning_januspipe.capture.stages.staged_potential import Inputs
from lightning_januspipe.capture.trees import leaves
from lightning_januspipe.engine.autocast import OFF, Autocast, autocast_as
from lightning_januspipe.engine.specs import ChainSpec, StageOutput, TensorSpec
from lightning_januspipe.errors import CaptureError, quoted

ENERGY = "energy"
Tensors = Mapping[str, Tensor]


@runtime_checkable
class ExplicitStages(Protocol):
    """Names the attributes and methods of an ``nn.Module`` that declares its own stages beside its ``forward``.

    The parts run one after the other, and the pipeline may be cut between any two of them::

        features = {}
        for part in self.stage_parts():
            features = part(inputs, features)
        energy = features["energy"]                                          # (B,)
        gradients = torch.autograd.grad(energy.sum(), coordinates, create_graph=True)
        return self.stage_outputs(inputs, features, gradients)

    :func:`run_stages` does the same, and may serve as ``forward``.

    For graph ranks the module also has ``stage_edges``: source and target of the edges, each the name of an input (E,),
    or the name of an input (2, E) and its row. The parts then call :func:`~lightning_januspipe.with_halo`.

    Attributes:
        stage_coordinates: names of the inputs that the energy is differentiated by, such as positions and strain.
    """

    stage_coordinates: Sequence[str]

    def stage_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Returns named tensors from the arguments of ``forward``: all that the parts need of a batch.

        It reads no parameter. It makes coordinates that the batch lacks, such as a strain of zeros (B, 3, 3).
        """

    def stage_parts(self) -> Sequence[nn.Module]:
        """Returns the chain of parts: modules that are called as ``part(inputs, features) -> features``.

        The next part gets only what a part returns. A part reads no parameters but its own; two parts may share
        submodules. Each part computes the geometry that it needs (distances, radial basis) from ``inputs``. The last
        part returns ``"energy"`` (B,) in eV, and everything else that ``stage_outputs`` needs.
        """

    def stage_outputs(self, inputs: Tensors, results: Tensors, gradients: Tensors) -> Any:
        """Returns what ``forward`` returns.

        Args:
            inputs: the tensors that :meth:`stage_inputs` returned.
            results: the features that the last part returned.
            gradients: ∂E/∂x by the coordinate's name, in the shape of the coordinate.
        """


def run_stages(potential: ExplicitStages, *args: Any, **kwargs: Any) -> Any:
    """Runs all parts of a potential with stages of its own, and returns what its forward returns.

    Args:
        potential: an ``nn.Module`` with :class:`ExplicitStages`.
        args: positional arguments of its forward.
        kwargs: keyword arguments of its forward.
    """
    assert isinstance(potential, nn.Module)
    inputs = dict(potential.stage_inputs(*args, **kwargs))
    with torch.enable_grad():
        for name in potential.stage_coordinates:
            inputs[name] = inputs[name].detach().requires_grad_()
        features: Tensors = {}
        for part in potential.stage_parts():
            features = part(inputs, features)
        coordinates = [inputs[name] for name in potential.stage_coordinates]
        found = torch.autograd.grad(features[ENERGY].sum(), coordinates, create_graph=potential.training)
    gradients = dict(zip(potential.stage_coordinates, found, strict=True))
    return potential.stage_outputs(inputs, features, gradients)


@dataclass(frozen=True)
class ExplicitPotential:
    """Holds a potential with stages of its own (a :class:`.StagedPotential`).

    Attributes:
        path: dotted name of the potential inside the LightningModule.
        bounds: index of the first part of each stage, and the number of parts.
        inputs_by_name: names and specs of the inputs, in order.
        features: names and specs of the features that each part returns.
        symbols: size symbol -> (input position, dimension) that defines it.
        coordinates: names of the differentiation inputs.
        parameters: names of the parameters that each part reads.
        part_bytes: size of the features that each part returned for the measured batch.
        outputs: positions of all tensors that the forward returns.
        derived: positions of the tensors that depend on the derivative.
        autocast: the autocast under which its parts run and its energy is differentiated.
        replaced: None; see :class:`~lightning_januspipe.capture.find.grad_call.PotentialCall`.
        step_parameters: empty; see there.
    """

    path: str
    bounds: tuple[int, ...]
    inputs_by_name: dict[str, TensorSpec]
    features: tuple[dict[str, TensorSpec], ...]
    symbols: dict[str, tuple[int, int]]
    coordinates: tuple[str, ...]
    parameters: tuple[tuple[str, ...], ...]
    part_bytes: tuple[int, ...]
    outputs: tuple[int, ...]
    derived: tuple[int, ...]
    autocast: Autocast = OFF
    replaced: ReplacedCalls | None = None
    step_parameters: tuple[str, ...] = ()

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Returns the floating-point types of the features that its parts return."""
        return {s.dtype for features in self.features for s in features.values() if s.dtype.is_floating_point}

    @property
    def num_stages(self) -> int:
        """Returns the length of the chain."""
        return len(self.bounds) - 1

    @property
    def num_operations(self) -> list[int]:
        """Returns the number of parts of each stage."""
        return [b - a for a, b in pairwise(self.bounds)]

    @property
    def operation_word(self) -> str:
        """Returns what :attr:`num_operations` counts."""
        return "parts"

    @property
    def coordinate_names(self) -> Sequence[str]:
        """Returns the names of the differentiation inputs."""
        return self.coordinates

    @property
    def observable_names(self) -> Sequence[str]:
        """Returns the names of the results of the last part."""
        return list(self.features[-1])

    @property
    def boundary_bytes(self) -> list[int]:
        """Returns the bytes of each boundary on the batch that was measured."""
        return [self.part_bytes[bound - 1] for bound in self.bounds[1:-1]]

    @property
    def chain(self) -> ChainSpec:
        """Returns the specs of derivative and observables: all features that the last part returns."""
        results = self.features[-1]
        return ChainSpec(
            coordinates=tuple(self.inputs_by_name[n] for n in self.coordinates),
            observables=tuple(results.values()),
            observable_stage=(self.num_stages - 1,) * len(results),
            autocast=self.autocast,
        )

    def bind_sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Returns the values of the size symbols for one call's tensors.

        Raises:
            CaptureError: an input has another size in a dimension that was found to be constant.
        """
        sizes = {s: tensors[i].shape[d] for s, (i, d) in self.symbols.items()}
        for (name, spec), tensor in zip(self.inputs_by_name.items(), tensors, strict=True):
            _require_shape("input", name, tensor, spec, sizes, self.path)
        return sizes

    def unvalidated_kinds(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], symbols: Mapping[str, int]
    ) -> frozenset[str]:
        """Returns nothing: the parts run as they are, with all their branches."""
        return frozenset()

    def with_validated(self, *calls: tuple[nn.Module, PotentialCall]) -> ExplicitPotential:
        """Returns itself: no kind of call has to be validated."""
        return self

    def with_evaluation(self, potential: nn.Module, call: PotentialCall) -> ExplicitPotential:
        """Returns itself: the parts take any constants."""
        return self

    def stage_operations(self, stage: int) -> None:
        """Returns None: a stage is made of parts."""

    def profile(self, potential: nn.Module, tensors: Sequence[Tensor]) -> None:
        """Returns None: a stage is made of parts."""

    def size_words(self) -> SizeWords:
        """Returns the field's words for sizes, from the inputs' shapes."""
        return words_of_inputs(self.inputs_by_name, self.symbols, self.coordinates)

    def boundary(self, stage: int) -> list[tuple[str, TensorSpec]]:
        """Returns the names and specs of the features that a stage sends to the next one."""
        return list(self.features[self.bounds[stage + 1] - 1].items())

    def why_shared(self, parameter: str) -> str:
        """Returns, in words, why several stages read a parameter."""
        return "read by parts of these stages"

    def parameter_stages(self) -> dict[str, set[int]]:
        """Returns for each parameter, by its name inside the potential, the stages that read it."""
        stages: dict[str, set[int]] = {}
        for stage, (first, last) in enumerate(pairwise(self.bounds)):
            for names in self.parameters[first:last]:
                for name in names:
                    stages.setdefault(name, set()).add(stage)
        return stages

    def inputs(self, potential: nn.Module) -> Inputs:
        """Returns the function from a call of the potential to its named tensors, in order."""
        declared = declared_stages(potential)

        def bound(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
            found = named_inputs(declared, self.path, args, kwargs)
            if list(found) != list(self.inputs_by_name):
                raise CaptureError(
                    f"stage_inputs of the potential {quoted(self.path)} returned {list(found)}; it returned "
                    f"{list(self.inputs_by_name)} before. Every batch has to have the same entries."
                )
            return list(found.values())

        return bound

    def stage(self, index: int, potential: nn.Module) -> TraceableExplicitStage:
        """Returns one stage."""
        return TraceableExplicitStage(self, index, potential)

    def return_value(self, potential: nn.Module) -> ExplicitReturnValue:
        """Returns the object that computes the forward's return value."""
        return ExplicitReturnValue(self, potential)


class ExplicitStage:
    """Runs consecutive parts as one stage (a :class:`~lightning_januspipe.engine.specs.StageFunction`).

    Args:
        staged: the whole chain.
        index: position of this stage in it.
        potential: the live potential.
    """

    def __init__(self, staged: ExplicitPotential, index: int, potential: nn.Module) -> None:
        first, last = staged.bounds[index], staged.bounds[index + 1]
        self._staged = staged
        self._parts = list(declared_stages(potential).stage_parts())[first:last]
        self._received = staged.features[first - 1] if first else {}
        self._returned = staged.features[last - 1]
        self._is_last = index == staged.num_stages - 1
        self.index = index
        self.boundary_in: Sequence[TensorSpec] = list(self._received.values())
        self.boundary_out: Sequence[TensorSpec] = [] if self._is_last else list(self._returned.values())
        self.observables: Sequence[int] = range(len(self._returned)) if self._is_last else ()
        used = (p for part in self._parts for p in part.parameters() if p.requires_grad)
        self.parameters: Sequence[nn.Parameter] = list(dict.fromkeys(used))

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Evaluates the stage; see :class:`~lightning_januspipe.engine.specs.StageFunction`."""
        staged = self._staged
        inputs, coordinates = self._inputs(tensors)
        features: Tensors = dict(zip(self._received, boundary, strict=True))
        with autocast_as(staged.autocast):
            for part in self._parts:
                features = part(inputs, features)
            if self._is_last:
                features = self._results(features, inputs)
        returned = [features[name] for name in self._returned]
        sizes = {s: tensors[i].shape[d] for s, (i, d) in staged.symbols.items()}
        for (name, spec), value in zip(self._returned.items(), returned, strict=True):
            _require_shape("feature", name, value, spec, sizes, staged.path)
        return StageOutput(
            boundary=[] if self._is_last else returned,
            energies=[features[ENERGY].sum()] if self._is_last else [],
            observables=returned if self._is_last else [],
            coordinates=coordinates,
        )

    def _inputs(self, tensors: Sequence[Any]) -> tuple[Tensors, list[Tensor]]:
        """Returns the inputs of the parts, and the leaves of the differentiation inputs."""
        staged = self._staged
        inputs: dict[str, Tensor] = dict(zip(staged.inputs_by_name, tensors, strict=True))
        for name in staged.coordinates:
            inputs[name] = inputs[name].detach().requires_grad_()
        return inputs, [inputs[name] for name in staged.coordinates]

    def _results(self, results: Tensors, inputs: Tensors) -> Tensors:
        """Returns the results for all atoms, from what the last part returned."""
        return results


class TraceableExplicitStage(ExplicitStage):
    """Runs consecutive parts as one stage, and traces them if its phases are to be compiled.

    It is a :class:`~lightning_januspipe.compiled.blueprint.TraceableStage`.

    Args:
        staged: the whole chain.
        index: position of this stage in it.
        potential: the live potential.
    """

    rows_of_symbols: Mapping[str, str] = MappingProxyType({})

    def __init__(self, staged: ExplicitPotential, index: int, potential: nn.Module) -> None:
        super().__init__(staged, index, potential)
        self._device = next((p.device for p in potential.parameters()), torch.device("cpu"))

    @cached_property
    def _trace(self) -> StageTrace:
        staged = self._staged
        return trace_parts(
            PartsOfStage(
                path=staged.path,
                parts=self._parts,
                inputs=staged.inputs_by_name,
                received=self._received,
                returned=list(self._returned),
                coordinates=staged.coordinates,
                energy=ENERGY if self._is_last else None,
                autocast=staged.autocast,
                device=self._device,
            )
        )

    @property
    def body(self) -> StageBody:
        """Returns its operations as data, without the live potential.

        Raises:
            CaptureError: its parts cannot be traced.
        """
        return self._trace.body

    @property
    def num_tensors(self) -> int:
        """Returns the number of tensors in the potential's call."""
        return len(self._staged.inputs_by_name)

    @property
    def symbols(self) -> Mapping[str, tuple[int, int]]:
        """Maps each size symbol to the (position, dimension) of the call's tensor that defines it."""
        return self._staged.symbols

    @property
    def value_specs(self) -> Sequence[TensorSpec]:
        """Returns the specs of :meth:`values`."""
        return self._trace.specs

    @property
    def exchange_specs(self) -> Sequence[Any]:
        """Returns nothing: only stages that run eagerly have exchanges."""
        return ()

    def sizes(self, tensors: Sequence[Any]) -> list[dict[str, int]]:
        """Returns the values of the size symbols for one call's tensors."""
        return [self._staged.bind_sizes(tensors)]

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns all that the stage reads beside its boundary: parameters, buffers, constants, the batch's tensors."""
        return self._trace.values.values(tensors)


class ExplicitReturnValue:
    """Computes the return value with ``stage_outputs`` (a :class:`.ReturnValue`)."""

    parameters: Sequence[nn.Parameter] = ()

    def __init__(self, staged: ExplicitPotential, potential: nn.Module) -> None:
        self._staged, self._potential = staged, declared_stages(potential)

    def __call__(
        self, call_tensors: Sequence[Tensor], observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> Any:
        """Returns the potential's return value."""
        staged = self._staged
        inputs = dict(zip(staged.inputs_by_name, call_tensors, strict=True))
        results = dict(zip(staged.features[-1], observables, strict=True))
        gradients = dict(zip(staged.coordinates, derivatives, strict=True))
        return self._potential.stage_outputs(inputs, results, gradients)

    def tensors(
        self, call_tensors: Sequence[Tensor], observables: Sequence[Tensor], derivatives: Sequence[Tensor]
    ) -> list[Tensor]:
        """Returns all tensors in the return value."""
        return returned_tensors(self(call_tensors, observables, derivatives))

    def of_forward(self, returned: Any) -> Any:
        """Returns what the forward itself returned: it has the form of this return value."""
        return returned

    def for_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
        """Returns the return value: it has the form of the forward's own."""
        return value


def declared_stages(potential: nn.Module) -> ExplicitStages:
    """Returns the potential, which declares its stages."""
    assert isinstance(potential, ExplicitStages), f"{type(potential).__name__} declares no stages"
    return potential


def returned_tensors(value: Any) -> list[Tensor]:
    """Returns the tensors in what a forward returned, in order."""
    return [x for _, x in leaves(value) if isinstance(x, Tensor)]


def named_inputs(
    potential: ExplicitStages, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Returns what ``stage_inputs`` returns for a call.

    Raises:
        CaptureError: it is no dict of tensors, or lacks a coordinate.
    """
    found = potential.stage_inputs(*args, **kwargs)
    wrong = [n for n, x in found.items() if not isinstance(x, Tensor)] if isinstance(found, Mapping) else ["(no dict)"]
    if wrong:
        raise CaptureError(
            f"stage_inputs of the potential {quoted(path)} returned no tensor for {', '.join(map(str, wrong[:3]))}; "
            "expected a dict of tensors"
        )
    missing = [n for n in potential.stage_coordinates if n not in found]
    if missing:
        raise CaptureError(
            f"stage_inputs of the potential {quoted(path)} returned {list(found)}, without the coordinates {missing}"
        )
    return dict(found)


def _require_shape(kind: str, name: str, value: Tensor, spec: TensorSpec, sizes: Mapping[str, int], path: str) -> None:
    expected = spec.sizes(sizes)
    if tuple(value.shape) != expected or value.dtype != spec.dtype:
        raise CaptureError(
            f"{kind} {name!r} of the potential {quoted(path)} has shape {tuple(value.shape)} and {value.dtype}; "
            f"expected {expected}, which is {spec.shape}, and {spec.dtype}. Sizes of features have to be constants or "
            "sizes of inputs (atoms, edges, structures), or multiples of them. Take the number of structures from the "
            "shape of an input, not from its values (index.max() + 1)."
        )
