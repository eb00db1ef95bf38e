"""What the strategy cannot train, said before training starts."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from lightning_januspipe.strategy.precision import SUPPORTED


def check_module(module: Any, lib: Any, precision: str) -> None:
    """Refuse a module whose backward pass a pipeline cannot own, and a precision that is not available.

    Args:
        module: the LightningModule.
        lib: the modules of its Lightning.
        precision: the Trainer's.

    Raises:
        ValueError: it cannot be trained.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise ValueError(
            f"{name} uses manual optimization (automatic_optimization=False); a pipeline has to own the backward pass. "
            "Use automatic optimization, or another strategy."
        )
    if lib.helpers.is_overridden("backward", module):
        raise ValueError(
            f"{name} overrides backward(); a pipeline has to own the backward pass. Move what it does to "
            "on_after_backward(), or use another strategy."
        )
    if precision not in SUPPORTED:
        raise ValueError(f"precision={precision!r} is not available; use one of {', '.join(SUPPORTED)}")


def check_trainer(trainer: Any, is_pipeline: bool) -> None:
    """Refuse what no rank could do right with micro-batches, or with its own stages' parameters alone.

    Args:
        trainer: the Trainer, with its loaders.
        is_pipeline: whether there are several stages.

    Raises:
        ValueError: it cannot be trained.
    """
    combined = trainer.fit_loop._combined_loader
    if len(combined.flattened) != 1 or combined.iterables is not combined.flattened[0]:
        raise ValueError(
            "train_dataloader gives several loaders, or one in a list or dict; a single DataLoader is supported. "
            "Concatenate datasets (torch.utils.data.ConcatDataset), or use pipeline_size=1 with num_microbatches=1."
        )
    if is_pipeline:
        module = trainer.lightning_module
        _check_clipping(module)
        for callback in trainer.callbacks:
            _check_clipping(callback)
            _check_callback(callback, module)


def _check_callback(callback: Any, module: nn.Module) -> None:
    name, bases = type(callback).__name__, {c.__name__ for c in type(callback).__mro__}
    if "BaseFinetuning" in bases:
        raise ValueError(
            f"{name} unfreezes parameters in the middle of training, when the stages of a pipeline have been made. "
            "Freeze parameters before Trainer.fit, for example in the module's __init__, and unfreeze them before "
            "another Trainer.fit of the same module; or use pipeline_size=1."
        )
    has_norms = any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in module.modules())
    if "StochasticWeightAveraging" in bases and has_norms:
        raise ValueError(
            f"{name} adds an epoch for the statistics of batch normalization, which is not available in a pipeline. "
            "Use WeightAveraging or EMAWeightAveraging, or pipeline_size=1."
        )


_AFTER_BACKWARD = ("on_after_backward", "on_before_optimizer_step", "configure_gradient_clipping", "optimizer_step")
_NORMS = ("clip_grad_norm_", "clip_grads_with_norm_", "get_total_norm")


def _check_clipping(owner: Any) -> None:
    """Refuse norms of the gradients at hand, which are those of one rank's stages: each rank would clip otherwise."""
    for hook in _AFTER_BACKWARD:
        function = inspect.unwrap(getattr(owner, hook, None) or _no_hook)
        used = getattr(getattr(function, "__code__", None), "co_names", ())
        found = next((name for name in _NORMS if name in used), None)
        if found is not None:
            raise ValueError(
                f"{type(owner).__name__}.{hook} calls {found}, which sees the gradients of this rank's stages only. "
                "Use Trainer(gradient_clip_val=...), or call self.clip_gradients(optimizer, gradient_clip_val=..., "
                'gradient_clip_algorithm="norm") in configure_gradient_clipping: these take the norm over all stages.'
            )


def _no_hook() -> None: ...
