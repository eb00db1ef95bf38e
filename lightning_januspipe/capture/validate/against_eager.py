"""Validates a potential in stages against the eager module, on a batch of other sizes, before it is used.

Energies and forces that agree say nothing about training, so the parameter gradient of a force loss is compared too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.find.grad_call import PotentialCall, as_sequence, grad_arguments
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.trees import leaves, with_leaves
from lightning_januspipe.capture.validate.probe_loss import probe_loss, probe_targets
from lightning_januspipe.engine.autocast import OFF, autocast_as
from lightning_januspipe.engine.eager_stages import eager_stages
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.loss import LossLeaves
from lightning_januspipe.engine.single_process import SingleProcessResult, StageFactory, run_single_process
from lightning_januspipe.engine.specs import LossGradients, StageFunction, StageOutput
from lightning_januspipe.errors import WITHOUT_CAPTURE, CaptureError, quoted
from lightning_januspipe.random_state import seeded
from lightning_januspipe.schedule import PhaseCosts


@dataclass(frozen=True)
class ProbeResult:
    """Holds the results of one call of a potential, eager or in stages.

    Attributes:
        derivatives: ∂E/∂x.
        outputs: the outputs that a staged potential makes available.
        gradients: of :func:`~.probe_loss.probe_loss` of the outputs, by parameter; none in evaluation mode.
    """

    derivatives: list[Tensor]
    outputs: list[Tensor]
    gradients: dict[nn.Parameter, Tensor]


class _KeepGrad(TorchFunctionMode):
    """Keeps the derivatives that all calls of ``torch.autograd.grad`` return."""

    def __init__(self) -> None:
        super().__init__()
        self.derivatives: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.autograd.grad:
            inputs = as_sequence(grad_arguments(args, kwargs or {})["inputs"])
            self.derivatives += [torch.zeros_like(x) if g is None else g for g, x in zip(result, inputs, strict=True)]
        return result


def run_eager(
    potential: nn.Module,
    call: PotentialCall,
    staged: StagedPotential,
    groups: Sequence[Sequence[nn.Parameter]] | None = None,
    is_known: bool = False,
) -> ProbeResult:
    """Runs the eager module on one call, and differentiates a loss of its outputs.

    Args:
        potential: the live potential.
        call: the arguments that the potential is called with.
        staged: the staged potential, which says which outputs are available.
        groups: trained parameters whose gradients may be there together, those of the first group to be computed; None
            for all in one group.
        is_known: whether the potential is known to be twice differentiable.

    Raises:
        CaptureError: the forward returns something else than in training, is not twice differentiable in training, or
            detaches its forces.
    """
    args, kwargs = with_leaves((call.args, call.kwargs), lambda _, leaf: leaf)  # a forward may write to its batch
    with seeded(_SEED), torch.enable_grad(), _KeepGrad() as keep:
        returned = potential(*args, **kwargs)
    value = staged.return_value(potential)
    found = value.of_forward(returned)
    _refuse_other_form(call, returned, value.for_step(call.args, call.kwargs, found))
    tensors = _tensors(found)
    if len(tensors) <= max(staged.outputs, default=-1):
        raise CaptureError(
            f"the potential {quoted(call.path)} returns only {len(tensors)} tensors in evaluation, fewer than in "
            "training. Call it with the same options in training_step and validation_step."
        )
    outputs = [tensors[i] for i in staged.outputs]
    gradients: dict[nn.Parameter, Tensor] = {}
    if potential.training:
        groups = gradient_groups(potential, None) if groups is None else groups
        with torch.enable_grad():
            if not is_known:
                _refuse_first_order(potential, call.path, keep.derivatives, groups)
                _refuse_detached(call, tensors, staged)
            loss = probe_loss(outputs)
            with autocast_as(OFF):  # as a Trainer's backward pass
                found = torch.autograd.grad(loss, groups[0], allow_unused=True)
        gradients = {p: g for p, g in zip(groups[0], found, strict=True) if g is not None}
    return ProbeResult([d.detach() for d in keep.derivatives], [x.detach() for x in outputs], gradients)


def _tensors(returned: Any) -> list[Tensor]:
    return [x for _, x in leaves(returned) if isinstance(x, Tensor)]


def _refuse_other_form(call: PotentialCall, returned: Any, restored: Any) -> None:
    """Refuses adapters that give the user's step other values than the forward returned."""
    expected, found = dict(leaves(returned)), dict(leaves(restored))
    for place in (*expected, *found):
        a, b = expected.get(place), found.get(place)
        if a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor)) and not _is_same(a, b):
            raise CaptureError(
                f"an adapter of the potential {quoted(call.path)} changes what the forward returns: {place} is another "
                "value after joined() and separated(); separated() has to be the inverse of joined()"
            )


def _is_same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


_SEED = 0
"""Of the random numbers that a forward draws."""

_VANISHING = 1e-9
"""Derivatives below this, in eV/Å, are rounding."""


def _refuse_first_order(
    potential: nn.Module, path: str, derivatives: Sequence[Tensor], groups: Sequence[Sequence[nn.Parameter]]
) -> None:
    """Refuses a potential whose force loss has no parameter gradient: its forces would silently not be trained."""
    if not groups:
        raise CaptureError(f"the potential {quoted(path)} has no trainable parameters (requires_grad is False for all)")
    trainable = [d for d in derivatives if d.requires_grad]
    # Forces that vanish by symmetry, in a perfect crystal say, vanish whatever the parameters are.
    vanish = all(bool((d.detach().abs() < _VANISHING).all()) for d in trainable)
    if trainable:
        loss = sum(((d - probe_targets(d)) ** 2).sum() for d in trainable)
        assert isinstance(loss, Tensor)
        for parameters in groups:
            with autocast_as(OFF):
                found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
            if any(g is not None and (vanish or bool((g != 0).any())) for g in found):
                return
    raise CaptureError(
        f"the potential {quoted(path)} ({type(potential).__name__}) is not twice differentiable: a loss of its "
        "forces has zero or missing gradients for every parameter. Look for a detach(), a torch.no_grad() or a "
        "non-differentiable operation between positions and energy, or create_graph=False."
    )


def _refuse_detached(call: PotentialCall, outputs: Sequence[Tensor], staged: StagedPotential) -> None:
    """Refuses a potential that returns detached forces to a training step that reads them."""
    read = [outputs[i] for i in staged.derived if i in call.read_outputs]
    if read and not any(x.requires_grad for x in read):
        raise CaptureError(
            f"the potential {quoted(call.path)} returns detached derivatives in training (forces without a gradient), "
            "so a force loss would train nothing. Remove the detach() after torch.autograd.grad, or do it in"
            " evaluation."
        )


@dataclass(frozen=True)
class PhaseMode:
    """Says how the phases are run; potentials are validated in the mode in which they train.

    Attributes:
        defer: leave weight gradients to WF and WE.
        split_stages: run FF and BF of every stage as on another rank than its FE and BE.
        activation: what stages keep between phases; see :data:`~lightning_januspipe.engine.eager_stages.EAGER_STAGES`.
        gradient_bytes: the most bytes of parameter gradients that a validation has at once, twice; None for all. With
            several groups of them the phases run once for each.
    """

    defer: bool = False
    split_stages: bool = False
    activation: str = "keep"
    gradient_bytes: float | None = None


DEFAULT_MODE = PhaseMode()
"""All phases of a stage on one rank, and nothing deferred."""


def gradient_groups(potential: nn.Module, most_bytes: float | None) -> list[list[nn.Parameter]]:
    """Returns the trained parameters of a potential in groups; a group has at most so many bytes, or one parameter."""
    groups: list[list[nn.Parameter]] = []
    size = 0
    for parameter in (p for p in potential.parameters() if p.requires_grad):
        if not groups or (most_bytes is not None and size + parameter.nbytes > most_bytes):
            groups.append([])
            size = 0
        groups[-1].append(parameter)
        size += parameter.nbytes
    return groups


class _CheckedStage:
    """Runs a stage, and compares its messages with the shapes that the receiving ranks expect."""

    def __init__(self, function: StageFunction, symbols: Mapping[str, int], path: str) -> None:
        self._function, self._symbols, self._path = function, symbols, path
        self.index, self.parameters, self.observables = function.index, function.parameters, function.observables
        self.boundary_in, self.boundary_out = function.boundary_in, function.boundary_out

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        out = self._function(tensors, boundary)
        for spec, tensor in zip(self.boundary_out, out.boundary, strict=True):
            if spec.sizes(self._symbols) != tensor.shape:
                raise CaptureError(
                    f"stage {self.index} of the potential {quoted(self._path)} sends a tensor of shape "
                    f"{tuple(tensor.shape)}, but the next one expects {spec.sizes(self._symbols)}: the forward turns a "
                    "size into a constant, or has a length that depends on values of parameters"
                )
        return out


def run_staged(
    staged: StagedPotential,
    potential: nn.Module,
    call: PotentialCall,
    phase_mode: PhaseMode = DEFAULT_MODE,
    measure_memory: bool = False,
    num_runs: int = 1,
    make_stage: StageFactory | None = None,
    kept: Collection[nn.Parameter] | None = None,
) -> tuple[ProbeResult, SingleProcessResult]:
    """Runs one call through the phases of all stages in this process, with the loss of :func:`run_eager`.

    In evaluation mode all phases run too, for their times, with cotangents of zero.

    Args:
        staged: the potential in stages.
        potential: the live potential.
        call: the arguments that the potential is called with.
        phase_mode: how the phases are run.
        measure_memory: measure the memory of each stage.
        num_runs: how often the phases run; times and memory are those of the last run.
        make_stage: makes what runs the phases; None for stages that run eagerly.
        kept: the parameters whose gradients are kept; None for all.
    """
    epilogue = staged.return_value(potential)
    with seeded(_SEED):  # the forward draws the same numbers as that of the module
        tensors = staged.inputs(potential)(call.args, call.kwargs)
    symbols = staged.bind_sizes(tensors)
    stages: list[Any] = [staged.stage(i, potential) for i in range(staged.num_stages)]
    if make_stage is None:
        stages = [_CheckedStage(function, symbols, staged.path) for function in stages]
        make_stage = eager_stages(phase_mode.activation)

    def loss(observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        from_loss = LossLeaves(observables, derivatives)
        num = len(from_loss.inputs)
        with torch.enable_grad():
            outputs.extend(epilogue.tensors(tensors, from_loss.observables, from_loss.derivatives))
            if not potential.training:
                return from_loss.seeds([None] * num)
            total = probe_loss(outputs)
            with autocast_as(OFF):
                found = torch.autograd.grad(total, [*from_loss.inputs, *epilogue.parameters], allow_unused=True)
        outside.add(epilogue.parameters, found[num:])
        return from_loss.seeds(found[:num])

    probe: ProbeResult | None = None
    for _ in range(num_runs):
        outputs: list[Tensor] = []
        outside = GradientBuffers(kept)
        result = run_single_process(
            stages,
            staged.chain,
            tensors,
            loss,
            defer=phase_mode.defer,
            split_stages=range(len(stages)) if phase_mode.split_stages else (),
            measure_memory=measure_memory,
            make_stage=make_stage,
            gradients=GradientBuffers(kept),
        )
        if probe is None:
            parts = [
                (p, [g for g in (result.gradients.get(p), outside.get(p)) if g is not None])
                for p in (potential.parameters() if potential.training else ())
            ]
            gradients = {p: torch.stack(found).sum(0) for p, found in parts if found}
            probe = ProbeResult(result.derivatives, [x.detach() for x in outputs], gradients)
    assert probe is not None
    return probe, result


def validate_stages(
    staged: StagedPotential,
    potential: nn.Module,
    call: PotentialCall,
    phase_mode: PhaseMode = DEFAULT_MODE,
    num_runs: int = 1,
    one_group: bool = False,
) -> list[PhaseCosts]:
    """Compares a potential in stages with the eager module.

    Args:
        staged: the potential in stages.
        potential: the live potential.
        call: a call with other numbers of atoms, edges and structures than the traced call.
        phase_mode: how the phases are run.
        num_runs: how often the phases run; the first run takes longer.
        one_group: whether to compare the gradients of the first of several groups only.

    Returns:
        Measured phase times of each stage in the last run.

    Raises:
        CaptureError: they differ; the message names the first value that does, and usual causes.
    """
    staged.bind_sizes(staged.inputs(potential)(call.args, call.kwargs))
    names = {p: n for n, p in potential.named_parameters()}
    groups = gradient_groups(potential, phase_mode.gradient_bytes)
    is_whole = len(groups) <= 1
    compared = groups[:1] or [[]] if one_group or is_whole or not potential.training else groups
    tolerance = rounding_tolerance(staged, potential)
    largest: dict[str, float] = {}
    scale = 0.0
    for index, group in enumerate(compared):
        eager = run_eager(potential, call, staged, groups[index:] if group else None, is_known=index > 0)
        kept = None if is_whole else group
        found, result = run_staged(staged, potential, call, phase_mode, num_runs=num_runs, kept=kept)
        if not index:
            _compare_outputs(staged, eager, found, tolerance)
        scale = max([scale, *(float(g.abs().max()) for g in eager.gradients.values() if g.numel())])
        for parameter in dict.fromkeys([*eager.gradients, *found.gradients]):
            a, b = (g.get(parameter, torch.zeros_like(parameter)) for g in (eager.gradients, found.gradients))
            largest[names[parameter]] = _largest_difference(a, b)
    for name in (name for name in names.values() if name in largest):
        if not largest[name] <= tolerance * max(scale, 1e-12):
            what = f"the parameter gradient of a force loss for {name!r}"
            raise _differs(what, f"largest difference {largest[name]:.2e} at a scale of {scale:.2e}", staged.path)
    return result.costs


def _compare_outputs(staged: StagedPotential, eager: ProbeResult, found: ProbeResult, tolerance: float) -> None:
    expected, given = eager.derivatives, found.derivatives
    if len(expected) != len(given):  # of each structure's own tensors, which an adapter has joined in their order
        expected, given = ([torch.cat([x.reshape(-1) for x in values])] for values in (expected, given))
    # A model may give its strain another shape for one structure than for several; what it returns decides.
    derivatives = [
        ("∂E/∂x", a.reshape(b.shape), b) for a, b in zip(expected, given, strict=True) if a.numel() == b.numel()
    ]
    outputs = zip((f"output {k}" for k in staged.outputs), eager.outputs, found.outputs, strict=True)
    floor = smallest_scale([a for _, a, _ in derivatives], tolerance)
    for what, a, b in (*derivatives, *outputs):
        _compare(what, a, b, max(_scale(a), floor), tolerance, staged.path)


def validate_evaluation(staged: StagedPotential, potential: nn.Module, call: PotentialCall) -> None:
    """Compares what a potential in stages returns with what the eager module returns in evaluation mode.

    The stages were made in training mode, and are used for evaluation too, so the two modes have to agree.

    Raises:
        CaptureError: an output differs.
    """
    modes = {m: m.training for m in potential.modules()}
    potential.eval()
    try:
        found, _ = run_staged(staged, potential, call, kept=())
        eager = run_eager(potential, call, staged)
    finally:
        for module, mode in modes.items():
            module.training = mode
    tolerance = rounding_tolerance(staged, potential)
    floor = smallest_scale(eager.derivatives, tolerance)
    for position, a, b in zip(staged.outputs, eager.outputs, found.outputs, strict=True):
        scale = max(_scale(a), floor)
        _compare(f"in evaluation mode output {position}", a, b, scale, tolerance, staged.path)


def rounding_tolerance(staged: StagedPotential, potential: nn.Module) -> float:
    """Returns the largest relative difference that rounding explains.

    The coarsest type that a potential computes in decides: positions, forces and energies may be of a finer one.
    Double differentiation in float32 loses digits; a wrong graph is off by far more than this. In half precision, where
    stages add up what they compute in another order than the module, up to 14 units of rounding were seen.
    """
    dtypes = staged.dtypes | {p.dtype for p in potential.parameters() if p.is_floating_point()}
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return 1e-8 if coarsest < 1e-15 else 2e-3 if coarsest < 1e-6 else 32 * coarsest


def smallest_scale(derivatives: Sequence[Tensor], tolerance: float) -> float:
    """Returns the least scale at which derivatives are compared.

    Derivatives that vanish by symmetry, in a perfect crystal say, are sums of terms that cancel but for rounding. These
    terms are about as large as the other derivatives.

    Args:
        derivatives: ∂E/∂x, of positions, strain, ...
        tolerance: relative to the scale.
    """
    return max((_scale(d) for d in derivatives), default=0.0) * (1e-3 if tolerance < 1e-2 else 0.5)


def _compare(what: str, eager: Tensor, captured: Tensor, scale: float, tolerance: float, path: str) -> None:
    if eager.dim() < captured.dim() and _without_ones(eager) == _without_ones(captured):
        eager = eager.reshape(captured.shape)  # a forward may squeeze what it returns of one structure
    if eager.shape != captured.shape:
        reason = f"shape {tuple(captured.shape)} instead of {tuple(eager.shape)}"
    elif not eager.is_floating_point():
        if torch.equal(eager, captured):
            return
        reason = "other values"
    else:
        error = _largest_difference(eager, captured)
        if error <= tolerance * max(scale, 1e-12):
            return
        reason = f"largest difference {error:.2e} at a scale of {scale:.2e}"
    raise _differs(what, reason, path)


def _largest_difference(eager: Tensor, captured: Tensor) -> float:
    """Returns the largest difference of two tensors of one shape; entries that are finite in neither are equal."""
    no_numbers = ~(eager.isfinite() | captured.isfinite())
    return float((eager - captured).abs().masked_fill(no_numbers, 0.0).max()) if eager.numel() else 0.0


def _differs(what: str, reason: str, path: str) -> CaptureError:
    return CaptureError(
        f"the captured potential {quoted(path)} differs from the module itself on a batch of other sizes: {what} has "
        f"{reason}. Usual causes: a size that was turned into a constant (int(...), TorchScript), a Python branch that "
        "depends on the batch, torch.no_grad() in the forward, or state that the forward changes. Rewrite "
        f"that part, or train with {WITHOUT_CAPTURE}."
    )


def _scale(tensor: Tensor) -> float:
    """Returns the largest finite entry."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(tensor.abs().nan_to_num(0.0, 0.0, 0.0).max())


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]
