"""What the ranks of the tests of launching run: the Trainer's options for loops, and loaders by replica."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from logging_workers import loader, trainer_of
from plain_modules import Batch, Potential, collate, losses
from strategy_workers import plain
from torch.utils.data import DataLoader

from lightning_januspipe.testing.trainer import library

TIME = "00:01:00:00"

OPTIONS: dict[str, dict[str, Any]] = {
    "fast_dev_run": {"fast_dev_run": True, "logger": True, "enable_checkpointing": True},
    "fast_dev_run=2": {"fast_dev_run": 2},
    "limits": {"max_epochs": 2, "limit_train_batches": 2, "limit_val_batches": 1},
    "parts": {"max_epochs": 2, "limit_train_batches": 0.5, "limit_val_batches": 0.5},
    "overfit": {"max_epochs": 3, "overfit_batches": 1},
    "overfit a part": {"max_epochs": 2, "overfit_batches": 0.5},
    "sanity": {"max_epochs": 1, "num_sanity_val_steps": 2},
    "all sanity": {"max_epochs": 1, "num_sanity_val_steps": -1},
    "every second epoch": {"max_epochs": 4, "check_val_every_n_epoch": 2},
    "every second batch": {"max_epochs": 2, "val_check_interval": 2},
    "every half epoch": {"max_epochs": 1, "val_check_interval": 0.5},
    "every third batch of all": {"max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": None},
    "max_time": {"max_epochs": 9, "max_time": TIME},
    "max_steps": {"max_steps": 5},
    "min_steps": {"max_epochs": 2, "min_steps": 7, "max_steps": 7},
    "reload": {"max_epochs": 3, "reload_dataloaders_every_n_epochs": 1},
    "barebones": {"max_epochs": 2, "barebones": True},
    "accumulate": {"max_epochs": 2, "accumulate_grad_batches": 3},
    "anomaly": {"max_epochs": 1, "detect_anomaly": True},
}


def module_of(namespace: str) -> Any:
    """Returns a potential with a loss on energies, forces and stress, which counts what is called."""

    class Module(library(namespace).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.potential = Potential(num_layers=3)
            self.counts: dict[str, int] = {}
            self.seen: list[list[float]] = []

        def count(self, what: str) -> None:
            self.counts[what] = self.counts.get(what, 0) + 1

        def step(self, batch: Batch) -> Any:
            out = self.potential(batch)
            return losses(batch, out["energy"], out["forces"], out["stress"])

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            loss = self.step(batch)
            self.log("loss", loss.detach(), on_step=True, on_epoch=True, batch_size=len(batch["energy"]))
            self.count("training_step")
            return loss

        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            microbatches = [batch] if isinstance(batch, dict) else list(batch)
            self.seen.append(sorted(x for b in microbatches for x in b["energy"].tolist()))

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            with torch.enable_grad():
                self.log("val_loss", self.step(batch).detach(), batch_size=len(batch["energy"]))
            self.count("sanity" if self.trainer.sanity_checking else "validation_step")

        def on_validation_epoch_end(self) -> None:
            self.count("validations")

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    return Module()


def time_is_up(namespace: str) -> Any:
    """Returns a callback that moves the clock of ``Trainer(max_time=...)``."""

    class Clock(library(namespace).Callback):  # type: ignore[misc]
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 4:
                for callback in trainer.callbacks:
                    if type(callback).__name__ == "Timer":
                        callback._offset = 1e6

    return Clock()


def data_of(namespace: str) -> Any:
    """Returns four batches of other samples in each epoch."""

    class Structures(library(namespace).LightningDataModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.num_asked = 0

        def train_dataloader(self) -> Any:
            self.num_asked += 1
            return loader(16, 4, 50 * self.trainer.current_epoch)

        def val_dataloader(self) -> Any:
            return loader(6, 2, 300)

    return Structures()


def fit_with_options(
    strategy: dict[str, Any] | None, names: list[str], folder: str, namespace: str = "lightning"
) -> dict[str, dict[str, Any]]:
    """Trains once for each named set of the Trainer's arguments."""
    torch.set_default_dtype(torch.float64)
    found = {}
    for name in names:
        arguments = dict(OPTIONS[name])
        if name == "max_time":
            arguments["callbacks"] = [time_is_up(namespace)]
        module, data = module_of(namespace), data_of(namespace)
        trainer = trainer_of(strategy, namespace, default_root_dir=folder, **arguments)
        trainer.fit(module, data)
        found[name] = {
            "steps": trainer.global_step,
            "epoch": trainer.current_epoch,
            "batches": trainer.num_training_batches,
            "counts": module.counts,
            "seen": module.seen,
            "asked": data.num_asked,
            "metrics": plain(trainer.callback_metrics),
            "state": plain(module.potential.state_dict()),
        }
    return found


class Noisy(torch.utils.data.Dataset[Batch]):
    """Structures with a label that a worker draws."""

    def __init__(self, num: int) -> None:
        self._samples = loader(num, 1).dataset

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Batch:
        return {**self._samples[index], "energy": torch.rand(1, dtype=torch.float64) + index}


def seeded_workers(strategy: dict[str, Any] | str | None, num_workers: int) -> dict[str, Any]:
    """What workers draw after ``seed_everything(workers=True)``, and a number that this rank draws in training."""
    lightning = library("lightning")
    lightning.seed_everything(5, workers=True, verbose=False)
    torch.set_default_dtype(torch.float64)
    module = module_of("lightning")
    drawn: list[float] = []
    module.on_train_epoch_end = lambda: drawn.append(float(torch.rand(())))
    data = DataLoader(Noisy(8), batch_size=2, num_workers=num_workers, collate_fn=collate, shuffle=True)
    trainer = trainer_of(strategy, max_epochs=1, use_distributed_sampler=True)
    trainer.fit(module, data)
    return {"seen": module.seen, "drawn": drawn}


class Pairs(torch.utils.data.BatchSampler):
    """A batch sampler of a user: batches in pairs of neighbours, in a drawn order."""

    def __iter__(self) -> Any:
        batches = list(super().__iter__())
        return iter([batches[i] for i in torch.randperm(len(batches)).tolist()])


def sampled(strategy: dict[str, Any] | str | None, how: str, distributed: bool) -> list[list[float]]:
    """Returns the labels of the batches of two epochs, for a sampler and ``use_distributed_sampler``."""
    library("lightning").seed_everything(5, verbose=False)
    torch.set_default_dtype(torch.float64)
    source = loader(16, 4)
    kinds: dict[str, dict[str, Any]] = {
        "shuffled": {"batch_size": 4, "shuffle": True},
        "batch sampler": {"batch_sampler": Pairs(torch.utils.data.RandomSampler(source.dataset), 4, False)},
    }
    data = DataLoader(source.dataset, collate_fn=collate, **kinds[how])
    module = module_of("lightning")
    trainer = trainer_of(strategy, max_epochs=2, use_distributed_sampler=distributed)
    trainer.fit(module, data)
    return module.seen


def fit_in_order(strategy: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    """Trains two epochs with validation, on samples in their order."""
    torch.set_default_dtype(torch.float64)
    module = module_of("lightning")
    trainer = trainer_of(strategy, max_epochs=2, use_distributed_sampler=False, **arguments)
    trainer.fit(module, loader(16, 4), loader(6, 2, 300))
    return {
        "steps": trainer.global_step,
        "metrics": plain(trainer.callback_metrics),
        "state": plain(module.potential.state_dict()),
    }


def main() -> None:
    """What a script of a user does: train, and write down what came of it on this rank; arguments as JSON."""
    import lightning_januspipe

    folder, sizes, strategy = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    module = module_of("lightning")
    trainer = library("lightning").Trainer(
        accelerator="cpu", **sizes, strategy=lightning_januspipe.JanusPipeStrategy(**strategy), max_epochs=2,
        use_distributed_sampler=False, num_sanity_val_steps=0, default_root_dir=folder, enable_progress_bar=False,
    )  # fmt: skip
    trainer.fit(module, loader(16, 4), loader(6, 2, 300))
    trainer.strategy.barrier()
    result = {
        "rank": [trainer.global_rank, trainer.local_rank, trainer.node_rank, trainer.num_nodes],
        "precision": [torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32],
        "steps": trainer.global_step,
        "metrics": plain(trainer.callback_metrics),
        "state": plain(module.potential.state_dict()),
    }
    (Path(folder) / f"{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
