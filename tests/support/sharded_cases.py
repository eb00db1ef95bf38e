"""What users do beside plain training, for ranks that share their state: the workers of its tests."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import checkpoint_workers
import tiny
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from shard_workers import FewParameters
from torch import Tensor, nn

from lightning_januspipe.testing import quiet_trainer


class ScaledOnly(MixedPrecision):
    """Scales losses as mixed precision does, and leaves numbers as they are, so that steps are exact."""

    def __init__(self) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
        super().__init__("16-mixed", "cpu", scaler)  # type: ignore[arg-type]

    def forward_context(self) -> AbstractContextManager[Any]:
        return nullcontext()


def overflowing() -> Any:
    """Returns a module one of whose gradients is infinite in the third step, on the last rank alone."""
    made = tiny.module(num_layers=2)

    def on_after_backward() -> None:
        trainer = made.trainer
        ranks = trainer.num_devices
        if trainer.global_step == 2 and trainer.global_rank == ranks - 1:
            leaves = [p for g in trainer.optimizers[0].param_groups for p in g["params"] if p.grad is not None]
            if leaves:
                leaves[-1].grad.reshape(-1)[-1] = math.inf

    made.on_after_backward = on_after_backward
    return made


def train_scaled(strategy: dict[str, Any] | None, folder: str, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Trains with a gradient scaler, which leaves out one step; see :func:`checkpoint_workers.train`."""
    plugin = ScaledOnly()
    arguments = {"plugins": [plugin], "gradient_clip_val": 0.5}
    given = {"module": overflowing, "arguments": arguments, **(more or {})}
    found = checkpoint_workers.train(strategy, folder, given)
    return {**found, "scale": plugin.scaler.get_scale()}  # type: ignore[union-attr]


def two_dtypes() -> Any:
    """Returns a module whose optimizer has parameters of two dtypes, in two groups."""
    made = FewParameters()
    made.shift = nn.Parameter(torch.ones(5, dtype=torch.float32))
    step = made.training_step

    def training_step(batch: Any, batch_idx: int) -> Tensor:
        return step(batch, batch_idx) + 0.25 * made.shift.double().sum()

    def configure_optimizers() -> torch.optim.Optimizer:
        groups = [{"params": [made.depth, made.shift]}, {"params": [made.width], "lr": 1e-3}]
        return torch.optim.Adam(groups, lr=2.0**-7)

    made.training_step = training_step  # type: ignore[method-assign]
    made.configure_optimizers = configure_optimizers  # type: ignore[method-assign]
    return made


def partly_trained(trains_layers: bool) -> Any:
    """Returns a module whose optimizer has all parameters, those of its layers frozen or not."""
    made = tiny.module(num_layers=2)
    made.potential.energy_model.layers.requires_grad_(trains_layers)
    made.configure_optimizers = lambda: torch.optim.Adam(made.parameters(), lr=1e-3)
    return made


def train_with_hook(strategy: dict[str, Any] | None, folder: str) -> dict[str, Any]:
    """Trains a module that writes sums of its parameters into each checkpoint; returns these with how it ended."""
    sums: list[float] = []

    def reading() -> Any:
        made = tiny.module(num_layers=2)
        held = list(made.potential.energy_model.layers.parameters())
        made.on_save_checkpoint = lambda checkpoint: sums.append(sum(float(p.detach().abs().sum()) for p in held))
        return made

    found = checkpoint_workers.train(strategy, folder, {"num_steps": 3, "module": reading})
    return {**found, "sums": sums}


def freeze_and_unfreeze(strategy: dict[str, Any] | None, folder: str) -> dict[str, Any]:
    """Trains everything, then all but the layers, then everything again, each from the checkpoint before."""
    found: dict[str, Any] = {}
    for index, trains_layers in enumerate((True, False, True)):  # for an epoch each
        inside = Path(folder) / str(index)
        previous = str(Path(folder) / str(index - 1) / "last.ckpt") if index else None
        more = {"num_steps": 4 * (index + 1), "resume": previous, "module": lambda t=trains_layers: partly_trained(t)}
        found = checkpoint_workers.train(strategy, str(inside), more)
        if found["ended"]:
            return found
    return found


def resume_with(strategy: dict[str, Any] | None, folder: str, checkpoint: str, how: str) -> str:
    """Goes on from a checkpoint with another optimizer than the one that was saved; returns the error."""

    def module() -> Any:
        made = tiny.module(num_layers=4)
        made.configure_optimizers = lambda: _other(made, how)
        return made

    ended: str = checkpoint_workers.train(strategy, folder, {"resume": checkpoint, "module": module})["ended"]
    return ended


def _other(made: Any, how: str) -> torch.optim.Optimizer:
    every = list(made.parameters())
    if how == "SGD":
        return torch.optim.SGD(every, lr=1e-3, momentum=0.9)
    if how == "two groups":
        return torch.optim.Adam([{"params": every[:3]}, {"params": every[3:]}], lr=1e-3)
    return torch.optim.Adam(every[1:], lr=1e-3)


def weights_of(strategy: dict[str, Any] | None, checkpoint: str) -> dict[str, Any]:
    """Validates with a file of weights alone; returns the metrics and the weights."""
    made = tiny.module()
    trainer = quiet_trainer(strategy, use_distributed_sampler=False)
    (metrics,) = trainer.validate(made, checkpoint_workers.data(), ckpt_path=checkpoint, verbose=False)
    return {"metrics": metrics, "state": {k: v.clone() for k, v in made.state_dict().items()}}
