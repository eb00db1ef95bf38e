"""Runs ``januspipe bench state``: counts the bytes of parameters, gradients and optimizer state on each rank."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from lightning_januspipe.bench.emulate.emulated_mesh import device_pool
from lightning_januspipe.callbacks.lightning_classes import Callback
from lightning_januspipe.runtime.state_share import LEVELS, state_share
from lightning_januspipe.schedule.costs import format_bytes
from lightning_januspipe.schedule.state_actions import ShardLevel
from lightning_januspipe.testing import RankPool, quiet_trainer

_COLUMNS = (
    *("shard", "D·G", "in phases, counted", "in phases, predicted"),
    *("optimizer steps, counted", "optimizer steps, predicted"),
)
_MICROBATCHES = 2


def state_bytes(
    ranks: str = "1,2,4",
    num_layers: int = 2,
    num_features: int = 32,
    accumulate_grad_batches: int = 1,
    pool: RankPool | None = None,
) -> str:
    """Counts the bytes of parameters, gradients and Adam's state on replicas, which hold the same stage.

    The reference potential trains on two micro-batches of metal for two steps, in float32. Bytes are those of the
    memory that tensors have on the fullest rank: in the last micro-batch of the second step (of its last batch, where
    batches are accumulated), and before its optimizer step.

    Args:
        ranks: Numbers of replicas, with commas between them.
        num_layers: Layers of the potential.
        num_features: Channels of the potential.
        accumulate_grad_batches: Batches of an optimizer step.
        pool: The processes; None starts some for each number.

    Returns:
        The table.
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for size in map(int, ranks.split(",")):
        own = pool or device_pool(size)
        try:
            for level in LEVELS if size > 1 else LEVELS[:1]:
                given = level, size, num_layers, num_features, accumulate_grad_batches
                found = own.run(count_on_rank, *given, world_size=size)
                whole = found[0]["parameters"]
                share = state_share(level, size, whole, 2 * whole, accumulate_grad_batches > 1)
                counted = [max(of_rank[when] for of_rank in found) for when in ("in phases", "optimizer")]
                cells = level, str(size), counted[0], share.in_phases, counted[1], share.between
                lines.append(f"| {' | '.join(c if isinstance(c, str) else format_bytes(c) for c in cells)} |")
        finally:
            if pool is None:
                own.close()
    return "\n".join(lines)


def count_on_rank(
    level: ShardLevel, size: int, num_layers: int, num_features: int, accumulate_grad_batches: int = 1
) -> dict[str, int]:
    """Trains as one replica, and counts the bytes of its state.

    Args:
        level: What the ranks share.
        size: Number of replicas.
        num_layers: Layers of the potential.
        num_features: Channels of the potential.
        accumulate_grad_batches: Batches of an optimizer step.

    Returns:
        Bytes of the whole parameters, and of all that this rank has of them, of gradients and of moments, in phases and
        when the optimizer steps.
    """
    from lightning_januspipe.data import EMTDataModule
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    torch.manual_seed(0)
    potential = EquivariantPotential(["Cu", "Ni", "Al"], 5.0, num_layers=num_layers, num_features=num_features, l_max=1)
    module: Any = PotentialModule(potential, stress_weight=1.0)
    data = EMTDataModule(num_train=4 * size, num_val=2, num_test=2, sizes=(4,), batch_size=2, shuffle=False)
    strategy = {"pipeline_size": 1, "data_size": size, "num_microbatches": _MICROBATCHES, "shard": level}
    counter = _Counter()
    step = module.training_step

    def counting(batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        if module.trainer.global_step == 1:
            counter.count(module.trainer, "in phases")
        return loss

    module.training_step = counting
    world = int(os.environ["WORLD_SIZE"])
    steps: dict[str, Any] = {"max_steps": 2, "accumulate_grad_batches": accumulate_grad_batches}
    trainer = quiet_trainer(strategy, devices=world, limit_val_batches=0, callbacks=[counter], **steps)
    trainer.fit(module, data)
    parameters = sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return {"parameters": parameters, **counter.found}


class _Counter(Callback):
    """Counts the memory of state in the second step."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}

    @override
    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1:
            self.count(trainer, "optimizer")

    def count(self, trainer: Any, when: str) -> None:
        """Notes the bytes that parameters, gradients and optimizer state have at a time."""
        (optimizer,) = trainer.optimizers
        leaves = [p for group in optimizer.param_groups for p in group["params"]]
        trained = [p for p in trainer.lightning_module.parameters() if p.requires_grad]
        states = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
        gradients = [p.grad for p in leaves if p.grad is not None]
        kept = trainer.strategy.runner.parameters.gradient_tensors()
        self.found[when] = _memory([*trained, *leaves, *states, *gradients, *kept])


def _memory(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the memory of tensors, that of views once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())
