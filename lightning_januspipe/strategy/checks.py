"""Checks before training starts that the strategy can train the module with this Trainer."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lightning_januspipe.errors import WITHOUT_CAPTURE
from lightning_januspipe.strategy.precision import SUPPORTED


def check_module(module: Any, lib: Any, precision: str) -> None:
    """Raises an error if the module runs its own backward pass, or if the precision is not available.

    Args:
        module: The LightningModule.
        lib: The modules of the Lightning that the module comes from.
        precision: The precision of the Trainer, such as ``"bf16-mixed"``.

    Raises:
        ValueError: The module cannot be trained; the message says why, and what to change.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} uses manual optimization (automatic_optimization=False), but the strategy has to run the backward "
            "pass itself. Use automatic optimization, or another strategy."
        )
    if lib.helpers.is_overridden("backward", module):
        raise ValueError(
            f"{name} overrides backward(), but the strategy has to run the backward pass itself. Move the code to "
            "on_after_backward(), or use another strategy."
        )
    if precision not in SUPPORTED:
        raise ValueError(f"precision={precision!r} is not available; use one of {', '.join(SUPPORTED)}")


def check_compiler(device: str) -> None:
    """Raises an error if nothing can compile for a type of device.

    Raises:
        ValueError: The compiler is missing; the message says which.
    """
    from lightning_januspipe.compiled.compiler import require_compiler

    require_compiler(device)


def check_trainer(trainer: Any, is_captured: bool, has_parts: bool, spreads_experts: bool = False) -> None:
    """Raises an error if loaders, hooks or callbacks would give wrong results with micro-batches or on stages.

    Args:
        trainer: The Trainer, with its loaders.
        is_captured: Whether the potential is captured, so that stages are made when training starts.
        has_parts: Whether a rank has the gradients of its own stages or segments only.
        spreads_experts: Whether a rank has its own experts only.

    Raises:
        ValueError: Training would go wrong; the message says why, and what to change.
    """
    combined = trainer.fit_loop._combined_loader
    if len(combined.flattened) != 1 or combined.iterables is not combined.flattened[0]:
        raise ValueError(
            "train_dataloader returns several loaders, or a loader in a list or dict; expected a single DataLoader. "
            "Concatenate datasets (torch.utils.data.ConcatDataset), or use pipeline_size=1 with num_microbatches=1."
        )
    module = trainer.lightning_module
    for owner in (module, *trainer.callbacks) if has_parts else ():
        _check_clipping(owner)
    if is_captured:
        _refuse_watching(module)
        _refuse_gradient_hooks(module)
    for callback in trainer.callbacks if is_captured or has_parts else ():
        _check_callback(callback, module)
        if spreads_experts:
            _refuse_averages(callback)


def _refuse_watching(module: nn.Module) -> None:
    """Refuses modules whose gradients and forwards Weights & Biases watches: these hooks would run within phases."""
    if any(getattr(m, "_wandb_hook_names", ()) for m in module.modules()):
        raise ValueError(
            f"logger.watch of Weights & Biases sees gradients and parameters of the whole {type(module).__name__}, "
            "but each rank runs its own stages, micro-batch by micro-batch. Leave it out and log norms, with "
            "lightning_januspipe.strategy.gradient_norm.grad_norm in on_before_optimizer_step; or train with "
            f"{WITHOUT_CAPTURE}."
        )


def _refuse_gradient_hooks(module: nn.Module) -> None:
    """Refuses hooks on gradients of parameters and submodules: phases compute a gradient in parts, or without them."""
    hooked = [f"parameter {n}" for n, p in module.named_parameters() if _has_gradient_hooks(p)]
    hooked += [
        f"submodule {n or type(module).__name__}"
        for n, m in module.named_modules()
        if m._backward_hooks or m._backward_pre_hooks
    ]
    if hooked:
        raise ValueError(
            f"{', '.join(hooked[:3])}{f' and {len(hooked) - 3} more' if len(hooked) > 3 else ''} of "
            f"{type(module).__name__} has a hook that sees gradients (register_hook, "
            "register_post_accumulate_grad_hook, register_full_backward_hook), but phases compute a gradient in "
            "several parts. Change .grad in on_before_optimizer_step instead, entry by entry; or train with "
            f"{WITHOUT_CAPTURE}."
        )


def _has_gradient_hooks(parameter: nn.Parameter) -> bool:
    return any(getattr(parameter, name, None) for name in ("_backward_hooks", "_post_accumulate_grad_hooks"))


def _check_callback(callback: Any, module: nn.Module) -> None:
    name, bases = type(callback).__name__, {c.__name__ for c in type(callback).__mro__}
    if "BaseFinetuning" in bases:
        raise ValueError(
            f"{name} unfreezes parameters in the middle of training, but the stages are made when training starts. "
            "Freeze parameters before Trainer.fit, for example in the module's __init__, and unfreeze them before "
            f'another Trainer.fit of the same module; or use {WITHOUT_CAPTURE}, and shard="none".'
        )
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    if "StochasticWeightAveraging" in bases and has_norms:
        raise ValueError(
            f"{name} adds an epoch for the statistics of batch normalization, which is not available in a pipeline. "
            "Use WeightAveraging or EMAWeightAveraging, or pipeline_size=1."
        )


def _refuse_averages(callback: Any) -> None:
    bases = {c.__name__ for c in type(callback).__mro__}
    if bases & {"WeightAveraging", "StochasticWeightAveraging"}:
        raise ValueError(
            f"{type(callback).__name__} averages whole parameters, but with expert_size > 1 each rank holds its own "
            "experts only. Leave it out, or use expert_size=1."
        )


_AFTER_BACKWARD = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
_NORMS = ("clip_grad_norm_", "clip_grads_with_norm_", "get_total_norm")


def _check_clipping(owner: Any) -> None:
    """Raises an error if a hook calls one of torch's norms: each rank would clip by the norm of its own gradients."""
    for hook in _AFTER_BACKWARD:
        function = inspect.unwrap(getattr(owner, hook, None) or _no_hook)
        used = getattr(getattr(function, "__code__", None), "co_names", ())
        found = next((name for name in _NORMS if name in used), None)
        if found is not None:
            raise ValueError(
                f"{type(owner).__name__}.{hook} calls {found}, which sees the gradients of this rank only. "
                "Use Trainer(gradient_clip_val=...), or call self.clip_gradients(optimizer, gradient_clip_val=..., "
                'gradient_clip_algorithm="norm") in configure_gradient_clipping: these take the norm over all ranks.'
            )


def _no_hook() -> None: ...
