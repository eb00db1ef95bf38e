"""Prove a captured potential before it is used: against the eager module, on a batch of other sizes.

Energies and forces that agree prove nothing about training, so the parameter gradient of a force loss is compared too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.find.grad_call import PotentialCall, as_sequence, grad_arguments
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.trees import leaves, with_leaves
from lightning_januspipe.engine.autocast import OFF, autocast_as
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.loss import LossLeaves
from lightning_januspipe.engine.single_process import SingleProcessResult, run_single_process
from lightning_januspipe.engine.specs import LossGradients
from lightning_januspipe.errors import CaptureError, shown
from lightning_januspipe.schedule import PhaseCosts


@dataclass(frozen=True)
class ProbeResult:
    """The eager module's derivatives, outputs and parameter gradients of :func:`_probe_loss`.

    Attributes:
        derivatives: ∂E/∂x.
        outputs: the outputs that the captured potential gives too.
        gradients: by parameter; none in evaluation mode.
    """

    derivatives: list[Tensor]
    outputs: list[Tensor]
    gradients: dict[nn.Parameter, Tensor]


class _KeepGrad(TorchFunctionMode):
    """Keeps what ``torch.autograd.grad`` was called with and what it returned."""

    def __init__(self) -> None:
        super().__init__()
        self.derivatives: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.autograd.grad:
            inputs = as_sequence(grad_arguments(args, kwargs or {})["inputs"])
            self.derivatives = [torch.zeros_like(x) if g is None else g for g, x in zip(result, inputs, strict=True)]
        return result


def _weights(tensor: Tensor) -> Tensor:
    flat = torch.arange(tensor.numel(), dtype=torch.float64, device=tensor.device)
    return (0.3 + 0.8 * torch.frac(flat * 0.6180339887)).reshape(tensor.shape).to(tensor.dtype)


def _probe_loss(outputs: Sequence[Tensor]) -> Tensor:
    """A loss that reads every floating-point output that carries a gradient, quadratic so that no term is constant."""
    trainable = [x for x in outputs if x.is_floating_point() and x.requires_grad]
    # A structure without a cell has a stress of NaN or infinity, which its loss leaves out.
    finite = [x for x in trainable if bool(x.detach().isfinite().all())]
    total: Tensor | None = None
    for value in finite or trainable:
        scale = value.detach().abs().max().clamp_min(1e-3)
        term = ((value / scale - _weights(value)) ** 2).mean()
        total = term if total is None else total + term
    if total is None:
        raise CaptureError(
            "no output of the potential depends on its parameters in a differentiable way. A detach() or "
            "torch.no_grad() on the way from the energy to the forces cuts the gradient; remove it in training."
        )
    return total


def run_eager(potential: nn.Module, call: PotentialCall, staged: StagedPotential) -> ProbeResult:
    """The eager module on one call, with the parameter gradient of a loss of its outputs."""
    args, kwargs = with_leaves((call.args, call.kwargs), lambda _, leaf: leaf)  # a forward may write to its batch
    with torch.enable_grad(), _KeepGrad() as keep:
        returned = potential(*args, **kwargs)
    value = staged.return_value(potential)
    found = value.of_forward(returned)
    _refuse_other_form(call, returned, value.for_step(call.args, call.kwargs, found))
    tensors = _tensors(found)
    if len(tensors) <= max(staged.outputs, default=-1):
        raise CaptureError(
            f"the potential {shown(call.path)} returns only {len(tensors)} tensors in evaluation, fewer than in "
            "training. Call it with the same options in training_step and validation_step."
        )
    outputs = [tensors[i] for i in staged.outputs]
    gradients: dict[nn.Parameter, Tensor] = {}
    if potential.training:
        parameters = [p for p in potential.parameters() if p.requires_grad]
        with torch.enable_grad():
            _refuse_first_order(potential, call.path, keep.derivatives)
            _refuse_detached(call, tensors, staged)
            loss = _probe_loss(outputs)
            with autocast_as(OFF):  # as a Trainer's backward pass
                found = torch.autograd.grad(loss, parameters, allow_unused=True)
        gradients = {p: g for p, g in zip(parameters, found, strict=True) if g is not None}
    return ProbeResult([d.detach() for d in keep.derivatives], [x.detach() for x in outputs], gradients)


def _tensors(returned: Any) -> list[Tensor]:
    return [x for _, x in leaves(returned) if isinstance(x, Tensor)]


def _refuse_other_form(call: PotentialCall, returned: Any, restored: Any) -> None:
    """What adapters make of the return value for the trace has to become the same values again for the user's step."""
    expected, found = dict(leaves(returned)), dict(leaves(restored))
    for place in (*expected, *found):
        a, b = expected.get(place), found.get(place)
        if a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor)) and not _is_same(a, b):
            raise CaptureError(
                f"an adapter of the potential {shown(call.path)} changes what the forward returns: {place} is another "
                "value after its joined() and separated(), of which the second has to be the inverse of the first"
            )


def _is_same(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return False
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


_VANISHING = 1e-9
"""Derivatives below this, in eV/Å, are rounding."""


def _refuse_first_order(potential: nn.Module, path: str, derivatives: Sequence[Tensor]) -> None:
    """A force loss has to have a parameter gradient, or forces would not be trained, without a word."""
    parameters = [p for p in potential.parameters() if p.requires_grad]
    if not parameters:
        raise CaptureError(f"the potential {shown(path)} has no trainable parameters (requires_grad is False for all)")
    trainable = [d for d in derivatives if d.requires_grad]
    found: Sequence[Tensor | None] = []
    if trainable:
        loss = sum(((d - _weights(d)) ** 2).sum() for d in trainable)
        assert isinstance(loss, Tensor)
        with autocast_as(OFF):
            found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
    known = [g for g in found if g is not None]
    # Forces that vanish by symmetry, in a perfect crystal say, vanish whatever the parameters are.
    vanish = all(bool((d.detach().abs() < _VANISHING).all()) for d in trainable)
    if not known or (not vanish and not any(bool((g != 0).any()) for g in known)):
        raise CaptureError(
            f"the potential {shown(path)} ({type(potential).__name__}) is not twice differentiable: a loss of its "
            "forces has zero or missing gradients for every parameter. Look for a detach(), a torch.no_grad() or a "
            "non-differentiable operation between positions and energy, or create_graph=False."
        )


def _refuse_detached(call: PotentialCall, outputs: Sequence[Tensor], staged: StagedPotential) -> None:
    """Forces that the step reads have to carry their gradient out of the potential."""
    read = [outputs[i] for i in staged.derived if i in call.read_outputs]
    if read and not any(x.requires_grad for x in read):
        raise CaptureError(
            f"the potential {shown(call.path)} returns detached derivatives in training (forces without a gradient), "
            "so a force loss would train nothing. Remove the detach() after torch.autograd.grad, or do it in"
            " evaluation."
        )


@dataclass(frozen=True)
class PhaseMode:
    """How the phases are run: the way that is validated is the way that trains.

    Attributes:
        defer: leave weight gradients to WF and WE.
        split_stages: run FF and BF of every stage as on another rank than its FE and BE.
    """

    defer: bool = False
    split_stages: bool = False


DEFAULT_MODE = PhaseMode()
"""The phases of each stage on one rank, nothing deferred."""


def run_staged(
    staged: StagedPotential,
    potential: nn.Module,
    call: PotentialCall,
    phase_mode: PhaseMode = DEFAULT_MODE,
    measure_memory: bool = False,
    num_runs: int = 1,
) -> tuple[ProbeResult, SingleProcessResult]:
    """The same through the phases of all stages, in this process; of several runs, what the last one took.

    In evaluation mode all phases run too, for their times, with cotangents of zero.
    """
    stages = [staged.stage(i, potential) for i in range(staged.num_stages)]
    epilogue = staged.return_value(potential)
    tensors = staged.inputs(potential)(call.args, call.kwargs)

    def loss(observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        probe = LossLeaves(observables, derivatives)
        num = len(probe.inputs)
        with torch.enable_grad():
            outputs.extend(epilogue.tensors(tensors, probe.observables, probe.derivatives))
            if not potential.training:
                return probe.seeds([None] * num)
            total = _probe_loss(outputs)
            with autocast_as(OFF):
                found = torch.autograd.grad(total, [*probe.inputs, *epilogue.parameters], allow_unused=True)
        outside.add(epilogue.parameters, found[num:])
        return probe.seeds(found[:num])

    eager: ProbeResult | None = None
    for _ in range(num_runs):
        outputs: list[Tensor] = []
        outside = GradientBuffers()
        result = run_single_process(
            stages,
            staged.chain,
            tensors,
            loss,
            defer=phase_mode.defer,
            split_stages=range(len(stages)) if phase_mode.split_stages else (),
            measure_memory=measure_memory,
        )
        if eager is None:
            gradients = _sum_of(potential.parameters() if potential.training else (), result.gradients, outside)
            eager = ProbeResult(result.derivatives, [x.detach() for x in outputs], gradients)
    assert eager is not None
    return eager, result


def _sum_of(parameters: Iterable[nn.Parameter], *buffers: GradientBuffers) -> dict[nn.Parameter, Tensor]:
    gradients: dict[nn.Parameter, Tensor] = {}
    for parameter in parameters:
        for found in (b.get(parameter) for b in buffers):
            if found is not None:
                gradients[parameter] = gradients[parameter] + found if parameter in gradients else found
    return gradients


def validate(
    staged: StagedPotential,
    potential: nn.Module,
    call: PotentialCall,
    phase_mode: PhaseMode = DEFAULT_MODE,
    num_runs: int = 1,
) -> list[PhaseCosts]:
    """Compare a captured potential with the eager module.

    Args:
        staged: the captured potential.
        potential: the live potential.
        call: a call with other numbers of atoms, edges and structures than the one that was traced.
        phase_mode: how the phases are run.
        num_runs: how often; the first run takes longer.

    Returns:
        Measured phase times of each stage in the last run.

    Raises:
        CaptureError: a quantity differs; the message names the first one and the usual cause.
    """
    staged.bind_sizes(staged.inputs(potential)(call.args, call.kwargs))
    names = {p: n for n, p in potential.named_parameters()}
    eager = run_eager(potential, call, staged)
    found, result = run_staged(staged, potential, call, phase_mode, num_runs=num_runs)
    # A model may give its strain another shape for one structure than for several; what it returns decides.
    derivatives = [
        ("∂E/∂x", a.reshape(b.shape), b)
        for a, b in zip(eager.derivatives, found.derivatives, strict=True)
        if a.numel() == b.numel()
    ]
    pairs = [
        *derivatives,
        *zip((f"output {k}" for k in staged.outputs), eager.outputs, found.outputs, strict=True),
    ]
    scale = max((float(g.abs().max()) for g in eager.gradients.values() if g.numel()), default=0.0)
    tolerance = rounding_tolerance(staged, potential)
    for what, a, b in pairs:
        _compare(what, a, b, _scale(a), tolerance, staged.path)
    for parameter, name in names.items():
        if parameter in eager.gradients or parameter in found.gradients:
            a, b = (g.get(parameter, torch.zeros_like(parameter)) for g in (eager.gradients, found.gradients))
            _compare(f"the parameter gradient of a force loss for {name!r}", a, b, scale, tolerance, staged.path)
    return result.costs


def validate_evaluation(staged: StagedPotential, potential: nn.Module, call: PotentialCall) -> None:
    """Compare what a potential that was captured in training mode returns with the eager module in evaluation mode.

    The captured potential is used for evaluation too, so the two modes have to agree.

    Raises:
        CaptureError: an output differs.
    """
    found, _ = run_staged(staged, potential, call)
    modes = {m: m.training for m in potential.modules()}
    potential.eval()
    try:
        eager = run_eager(potential, call, staged)
    finally:
        for module, mode in modes.items():
            module.training = mode
    tolerance = rounding_tolerance(staged, potential)
    for position, a, b in zip(staged.outputs, eager.outputs, found.outputs, strict=True):
        _compare(f"in evaluation mode output {position}", a, b, _scale(a), tolerance, staged.path)


def rounding_tolerance(staged: StagedPotential, potential: nn.Module) -> float:
    """The largest relative difference that rounding explains.

    The coarsest type that a potential computes in decides: positions, forces and energies may be of a finer one.
    Double differentiation in float32 loses digits; a wrong graph is off by far more than this. In half precision, where
    stages add up what they compute in another order than the module, up to 14 units of rounding were seen.
    """
    dtypes = staged.dtypes | {p.dtype for p in potential.parameters() if p.is_floating_point()}
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    return 1e-8 if coarsest < 1e-15 else 2e-3 if coarsest < 1e-6 else 32 * coarsest


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
        no_numbers = ~(eager.isfinite() | captured.isfinite())
        error = float((eager - captured).abs().masked_fill(no_numbers, 0.0).max()) if eager.numel() else 0.0
        if error <= tolerance * max(scale, 1e-12):
            return
        reason = f"largest difference {error:.2e} at a scale of {scale:.2e}"
    raise CaptureError(
        f"the captured potential {shown(path)} differs from the module itself on a batch of other sizes: {what} has "
        f"{reason}. Usual causes: a size that was turned into a constant (int(...), TorchScript), a Python branch that "
        "depends on the batch, torch.no_grad() in the forward, or state that the forward changes. Train with "
        "pipeline_size=1 and graph_size=1, or rewrite that part."
    )


def _scale(tensor: Tensor) -> float:
    """Largest finite entry."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0.0
    return float(tensor.abs().nan_to_num(0.0, 0.0, 0.0).max())


def _without_ones(tensor: Tensor) -> list[int]:
    return [size for size in tensor.shape if size != 1]
