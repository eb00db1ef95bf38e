"""What the ranks of tests on evaluation and on the order of samples run."""

from __future__ import annotations

import os
from typing import Any

import tiny
import torch
from matris_models import matris


class Labels(torch.utils.data.Dataset[torch.Tensor]):
    """Numbers 1, 2, … as samples."""

    def __init__(self, num: int) -> None:
        self.num = num

    def __len__(self) -> int:
        return self.num

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.num:
            raise IndexError(index)
        return torch.tensor([float(index + 1)], dtype=torch.float64)


def evaluated(
    strategy: dict[str, Any] | None, num_test: int, batch_size: int, budget: int | None = None
) -> dict[str, Any]:
    """Test and validation errors of the reference potential on a few structures."""
    from lightning_januspipe.data import EMTDataModule
    from lightning_januspipe.testing import quiet_trainer

    options = {"sizes": (4, 8, 16), "dtype": "float64", "batch_size": batch_size, "max_atoms": budget}
    data = EMTDataModule(4, num_test, num_test, **options)  # type: ignore[arg-type]
    trainer = quiet_trainer(strategy, use_distributed_sampler=True)
    module = tiny.module(stress_weight=10.0)
    (found,) = trainer.test(module, data, verbose=False)
    (validated,) = trainer.validate(module, data, verbose=False)
    return {**found, **validated}


def validated_in_training(
    strategy: dict[str, Any] | None, num_val: int, limit_of_replica: tuple[int, int] | None = None
) -> float:
    """Returns the validation loss of a potential with experts after one step.

    Args:
        strategy: Arguments of the strategy.
        num_val: Number of structures for validation, in batches of two.
        limit_of_replica: Most batches of each replica.
    """
    from lightning_januspipe.data import EMTDataModule
    from lightning_januspipe.testing import quiet_trainer

    data = EMTDataModule(4, num_val, 2, sizes=(4,), dtype="float64", batch_size=2 if strategy else 4, shuffle=False)
    limit = limit_of_replica[int(os.environ["RANK"])] if limit_of_replica else None
    trainer = quiet_trainer(strategy, max_steps=1, use_distributed_sampler=True, limit_val_batches=limit)
    trainer.fit(matris(), data)
    return float(trainer.callback_metrics["val_loss"])


def logged(strategy: dict[str, Any] | None, nums: tuple[int, ...]) -> list[dict[str, Any]]:
    """What a module logs of several test loaders in every way, with torchmetrics too."""
    from lightning.pytorch import LightningModule
    from torchmetrics import MeanMetric, SumMetric

    from lightning_januspipe.testing import quiet_trainer

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
            self.metrics = torch.nn.ModuleList([kind() for _ in nums for kind in (MeanMetric, SumMetric)])

        def test_step(self, batch: torch.Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            for how in ("mean", "sum", "min", "max"):
                value = getattr(batch, how)()
                self.log(how, value, reduce_fx=how, sync_dist=True, batch_size=len(batch), on_epoch=True)
            mean, total = self.metrics[2 * dataloader_idx], self.metrics[2 * dataloader_idx + 1]
            for name, metric in (("torchmetrics_mean", mean), ("torchmetrics_sum", total)):
                metric.update(batch)
                self.log(name, metric, on_epoch=True)

    loaders = [torch.utils.data.DataLoader(Labels(num), batch_size=2) for num in nums]
    trainer = quiet_trainer(strategy, use_distributed_sampler=True)
    return [dict(found) for found in trainer.test(Module(), loaders, verbose=False)]


def order(strategy: dict[str, Any] | str | None, shuffle: bool) -> list[list[float]]:
    """Energies of the structures of each training step of two epochs."""
    from lightning.pytorch import Callback, seed_everything

    from lightning_januspipe.data import EMTDataModule
    from lightning_januspipe.testing import quiet_trainer

    class Order(Callback):
        seen: list[list[float]] = []

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            parts = getattr(batch, "batches", None) or [batch]
            self.seen.append(sorted(round(float(e), 6) for part in parts for e in part["energy"]))

    seed_everything(0)
    callback = Order()
    callback.seen = []
    data = EMTDataModule(12, 0, 0, sizes=(4, 8), dtype="float64", batch_size=4, shuffle=shuffle)
    trainer = quiet_trainer(strategy, callbacks=[callback], max_epochs=2, use_distributed_sampler=True)
    trainer.fit(tiny.module(num_layers=2), data)
    assert trainer._accelerator_connector.use_distributed_sampler
    return callback.seen
