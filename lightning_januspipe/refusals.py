"""What the strategy cannot train, said before training starts."""

from __future__ import annotations

from typing import Any

from lightning_januspipe.precision import SUPPORTED


def refuse_module(module: Any, lib: Any, precision: str) -> None:
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


def refuse_trainer(trainer: Any, is_pipeline: bool) -> None:
    """Refuse what no rank could do right with micro-batches, or with one stage's parameters.

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
    for callback in trainer.callbacks if is_pipeline else ():
        if any(c.__name__ == "StochasticWeightAveraging" for c in type(callback).__mro__):
            raise ValueError(
                f"{type(callback).__name__} changes the learning rate schedule and adds an epoch of its own, which is "
                "not available in a pipeline. Use WeightAveraging or EMAWeightAveraging, or pipeline_size=1."
            )
