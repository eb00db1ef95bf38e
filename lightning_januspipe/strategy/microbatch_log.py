"""Collects what a step logs for each micro-batch: ``self.log`` logs each name once, for the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.engine.loss import loss_in

_LOG_ARGUMENTS = (
    *("prog_bar", "logger", "on_step", "on_epoch", "reduce_fx", "enable_graph", "sync_dist", "sync_dist_group"),
    *("add_dataloader_idx", "batch_size", "metric_attribute", "rank_zero_only"),
)
"""The arguments of ``LightningModule.log`` after name and value, in its order."""


class LogRecorder:
    """Replaces ``LightningModule.log`` while the micro-batches run, and records the calls.

    Attributes:
        num_samples: The number of samples in the micro-batch that runs now; None if it is not known. Values are
            weighted with it, unless a call has a ``batch_size``.
    """

    def __init__(self) -> None:
        self._calls: dict[str, list[tuple[Any, float, dict[str, Any]]]] = {}
        self.num_samples: int | None = None

    def __call__(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        """Records one call of ``self.log``."""
        given = {**dict(zip(_LOG_ARGUMENTS, args, strict=False)), **kwargs}
        size = given.get("batch_size") or self.num_samples or 1
        kept = value.detach().clone() if isinstance(value, Tensor) else value
        self._calls.setdefault(name, []).append((kept, float(size), given))

    def replay(self, log: Callable[..., None]) -> None:
        """Logs every name once: the mean over the micro-batches, or the result of its ``reduce_fx``."""
        for name, calls in self._calls.items():
            _, _, kwargs = calls[-1]
            sizes = [s for _, s, _ in calls]
            total = {"batch_size": int(sum(sizes))} if kwargs.get("batch_size") or self.num_samples else {}
            log(name, _merge([v for v, _, _ in calls], sizes, kwargs.get("reduce_fx", "mean")), **{**kwargs, **total})


def _merge(values: list[Any], sizes: list[float], reduce_fx: Any) -> Any:
    if len(values) == 1 or not isinstance(values[-1], (Tensor, int, float)):
        return values[-1]  # a metric of torchmetrics holds its own sum
    stacked = torch.stack([torch.as_tensor(v) for v in values])
    how = getattr(reduce_fx, "__name__", reduce_fx)
    if how in ("max", "min"):
        return stacked.amax(0) if how == "max" else stacked.amin(0)
    if how == "sum":
        return stacked.sum(0)
    weights = torch.tensor(sizes, dtype=torch.float64, device=stacked.device)
    weights = (weights / weights.sum()).reshape(-1, *[1] * (stacked.dim() - 1))
    floating = stacked if stacked.is_floating_point() else stacked.float()
    return (floating * weights.to(floating.dtype)).sum(0)


def merge_outputs(outputs: list[Any], name: str) -> Any:
    """Returns the output of the whole step: the mean loss, and the other entries of the last micro-batch."""
    loss = torch.stack([loss_in(o, name).detach().reshape(()) for o in outputs]).mean()
    return {**outputs[-1], "loss": loss} if isinstance(outputs[-1], Mapping) else loss
