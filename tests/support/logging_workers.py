"""What the ranks of the tests of logging run: one module that logs in every way, under any loggers."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from capture_models import Batch, Potential, make_batch
from plain_modules import collate
from strategy_workers import plain
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_januspipe.strategy.gradient_norm import grad_norm
from lightning_januspipe.testing import quiet_trainer
from lightning_januspipe.testing.trainer import library

SIZES = (4, 3, 5, 2, 6, 1, 3, 4, 5, 2, 4, 3)
DDP = "ddp_find_unused_parameters_true"
SEEN = ("callback_metrics", "logged_metrics", "progress_bar_metrics")


def check(expected: Any, found: Any, where: str = "") -> None:
    """Nested numbers agree."""
    if isinstance(expected, dict):
        assert sorted(expected) == sorted(found), where
        for key in expected:
            check(expected[key], found[key], f"{where} {key}")
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(found), where
        for i, (x, y) in enumerate(zip(expected, found, strict=True)):
            check(x, y, f"{where} {i}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12, nan_ok=True), where
    else:
        assert expected == found, where


def loader(num: int, batch_size: int, first: int = 0, shuffle: bool = False) -> Any:
    """Returns structures of one to six atoms."""
    samples: Any = [make_batch((SIZES[i % len(SIZES)],), first + i) for i in range(num)]
    return DataLoader(samples, batch_size=batch_size, collate_fn=collate, shuffle=shuffle)


def module_that_logs(namespace: str, learning_rate: float, sync: bool) -> Any:
    """Returns a module with every form of ``self.log`` in its steps and hooks.

    Args:
        namespace: which Lightning.
        learning_rate: 0 for the same losses however the batches are split.
        sync: reduce over the replicas.
    """
    from torchmetrics import MaxMetric, MeanAbsoluteError, MeanMetric, MeanSquaredError, MetricCollection, SumMetric

    class Module(library(namespace).LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"learning_rate": learning_rate, "width": 6})
            self.potential = Potential(num_layers=3)
            self.num_atoms = SumMetric()
            self.mean, self.largest, self.by_epoch = MeanMetric(), MaxMetric(), MeanMetric()
            for stage in ("train", "val"):
                metrics: Any = {"mae": MeanAbsoluteError(), "mse": MeanSquaredError()}
                setattr(self, f"{stage}_errors", MetricCollection(metrics, prefix=f"{stage}_"))

        def differences(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
            """Returns loss, energies and their errors."""
            out = self.potential(batch)
            error = out["energy"] - batch["energy"]
            force = (out["forces"] - batch["forces"]).square().sum(-1)
            force = torch.zeros_like(error).index_add(0, batch["index"], force)
            return (error.square() + 0.1 * force).mean(), out["energy"].detach(), error.detach()

        def training_step(self, batch: Batch, batch_idx: int) -> Any:
            self.num_atoms.update(len(batch["species"]))  # before the potential
            loss, energy, error = self.differences(batch)
            n, value = len(error), error.square().mean()
            sized: dict[str, Any] = {"batch_size": n, "sync_dist": sync}
            self.log("step", value, on_step=True, on_epoch=False, **sized)
            self.log("epoch", value, on_step=False, on_epoch=True, **sized)
            self.log("both", value, on_step=True, on_epoch=True, prog_bar=True, **sized)
            self.log("hidden", value, on_epoch=True, logger=False, prog_bar=True, **sized)
            self.log("default", value, **sized)
            self.log("number", float(value), on_epoch=True, **sized)
            self.log("own", value, on_epoch=True, batch_size=n)  # of this replica alone
            self.log("zero", value, on_epoch=True, batch_size=n, rank_zero_only=True)
            self.log("unsized", value, on_step=False, on_epoch=True, sync_dist=sync)
            self.log_dict({"pair/a": value, "pair/b": 2 * value}, on_step=True, on_epoch=True, **sized)
            for name, reduced in {
                "mean": value, "sum": error.square().sum(), "max": error.max(), "min": error.min()
            }.items():  # fmt: skip
                self.log(f"reduced_{name}", reduced, reduce_fx=name, on_step=False, on_epoch=True, sync_dist=sync)
            self.mean.update(error)
            self.largest.update(error)
            self.by_epoch.update(error)
            self.log("metric_mean", self.mean, on_step=False, on_epoch=True)
            self.log("metric_max", self.largest, on_step=False, on_epoch=True)
            self.log("metric_atoms", self.num_atoms, on_step=False, on_epoch=True)
            self.train_errors.update(energy, batch["energy"])
            self.log_dict(self.train_errors, on_step=False, on_epoch=True)
            if self.logger is not None:
                self.logger.log_metrics({"by_hand": float(value)}, step=self.global_step)
            return {"loss": loss, "atoms": len(batch["species"])}

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.log("end", batch_idx + 1.0, on_step=True, on_epoch=True, sync_dist=sync)

        def on_train_epoch_end(self) -> None:
            self.log("epoch_end", self.by_epoch.compute())
            self.by_epoch.reset()

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.log_dict(grad_norm(self, norm_type=2))

        def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
            with torch.enable_grad():
                loss, energy, error = self.differences(batch)
            sized: dict[str, Any] = {"batch_size": len(error), "sync_dist": sync}
            self.log("val_loss", loss.detach(), prog_bar=True, **sized)
            self.log("val_step", error.mean(), on_step=True, on_epoch=True, **sized)
            self.log(f"val_own_{dataloader_idx}", error.mean(), add_dataloader_idx=False, **sized)
            self.val_errors.update(energy, batch["energy"])

        def on_validation_epoch_end(self) -> None:
            self.log_dict(self.val_errors.compute(), prog_bar=True)
            self.val_errors.reset()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=learning_rate)

    return Module()


def seen_callback(namespace: str) -> Any:
    """Returns a callback that logs too, and keeps what the Trainer shows after each batch and each epoch."""

    class Seen(library(namespace).Callback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.history: list[tuple[str, dict[str, Any]]] = []

        def _note(self, when: str, trainer: Any) -> None:
            self.history.append((when, {name: plain(dict(getattr(trainer, name))) for name in SEEN}))

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx:
                self._note("batch", trainer)

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            self.log("from_callback", float(trainer.global_step), on_epoch=True)

        def on_validation_end(self, trainer: Any, module: Any) -> None:
            self._note("validation", trainer)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self._note("epoch", trainer)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            self._note("end", trainer)

    return Seen()


def has_replicas(strategy: dict[str, Any] | str | None) -> bool:
    """Whether a strategy is DDP, or has replicas."""
    return isinstance(strategy, str) or "data_size" in (strategy or {})


def trainer_of(strategy: dict[str, Any] | str | None, namespace: str = "lightning", **arguments: Any) -> Any:
    """Returns a quiet Trainer, with Lightning's sampler for replicas."""
    replicas = has_replicas(strategy)
    if arguments.get("barebones"):  # it wants these arguments to be left out
        flags = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        arguments = {**dict.fromkeys((*flags, "num_sanity_val_steps")), **arguments}
    return quiet_trainer(strategy, namespace, **{"use_distributed_sampler": replicas, **arguments})


Loggers = Literal["csv", "several", "wandb"]


def loggers_of(kind: Loggers, namespace: str, where: str) -> list[Any]:
    """Returns loggers that write below a folder."""
    logs = library(namespace).loggers
    if kind == "wandb":
        Path(where).mkdir(parents=True, exist_ok=True)
        return [logs.WandbLogger("run", where, offline=True, project="test", log_model=False)]
    csv = logs.CSVLogger(where, name="", version="")
    return [csv] if kind == "csv" else [csv, logs.TensorBoardLogger(where, name="", version="board")]


def fit_and_log(
    strategy: dict[str, Any] | str | None,
    folder: str,
    namespace: str = "lightning",
    batch_size: int = 4,
    learning_rate: float = 1e-3,
    num_train: int = 12,
    loggers: Loggers = "csv",
    **arguments: Any,
) -> dict[str, Any]:
    """Trains two epochs with two validation loaders; returns what was to be seen, and the trained parameters."""
    torch.set_default_dtype(torch.float64)
    where = str(Path(folder) / (strategy if isinstance(strategy, str) else "plain" if strategy is None else "pipeline"))
    module, seen = module_that_logs(namespace, learning_rate, sync=True), seen_callback(namespace)
    trainer = trainer_of(
        strategy, namespace, callbacks=[seen], max_epochs=2, log_every_n_steps=1,
        logger=loggers_of(loggers, namespace, where), **arguments,
    )  # fmt: skip
    # DDP shuffles the samples of replicas whether or not the loader does.
    train = loader(num_train, batch_size, shuffle=has_replicas(strategy))
    trainer.fit(module, train, [loader(4, 2, 100), loader(6, 3, 200)])
    if loggers == "wandb":
        finish_wandb()
    return {"folder": where, "history": seen.history, "state": plain(dict(module.potential.state_dict()))}


def fit_unreduced(strategy: dict[str, Any]) -> tuple[dict[str, float], list[str]]:
    """Trains two steps; returns what is logged with and without ``sync_dist``, and the warnings about it."""
    from lightning.pytorch import LightningModule
    from lightning.pytorch.trainer.connectors.logger_connector import result

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.potential = Potential(num_layers=3)

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            return self.loss_of(batch, "train")

        def validation_step(self, batch: Batch, batch_idx: int) -> None:
            self.loss_of(batch, "val")

        def loss_of(self, batch: Batch, stage: str) -> Tensor:
            out = self.potential(batch)
            loss = (out["energy"] - batch["energy"]).square().mean() + out["forces"].square().mean()
            settings: dict[str, Any] = {"on_step": False, "on_epoch": True, "batch_size": len(batch["energy"])}
            self.log(f"{stage}_own", loss.detach(), **settings)
            self.log(f"{stage}_mean", loss.detach(), sync_dist=True, **settings)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-4)

    torch.set_default_dtype(torch.float64)
    result.warning_cache.clear()  # Lightning warns once in a process
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of(strategy, max_epochs=1, limit_val_batches=1.0)
        trainer.fit(Module(), loader(8, 2), loader(4, 1, 100))
    texts = [str(w.message) for w in caught if "sync_dist=True" in str(w.message)]
    return {name: float(value) for name, value in trainer.callback_metrics.items()}, texts


def start_of_a_fit(num_microbatches: int, batch_size: int) -> tuple[list[str], list[str]]:
    """Trains one step in a pipeline; returns the lines at its start, and the warnings about micro-batches."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_module

    torch.set_default_dtype(torch.float64)
    lines: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return True

    logger = rank_zero_module.log  # of the Lightning that was imported last
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(keep)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_of({"num_microbatches": num_microbatches}, max_steps=1)
        trainer.fit(module_that_logs("lightning", 1e-3, sync=False), loader(8, batch_size))
    logger.removeFilter(keep)
    logger.setLevel(level)
    found = [str(w.message) for w in caught if str(w.message).startswith("num_microbatches=")]
    return [line for line in lines if line.startswith("januspipe: ")], found


def finish_wandb() -> None:
    """Writes the run to its file."""
    import wandb

    wandb.finish()


def fit_for_wandb(strategy: dict[str, Any] | None, folder: str) -> dict[str, Any]:
    """Does what :func:`fit_and_log` does, in a run of W&B that needs no network."""
    import wandb

    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    found = fit_and_log(strategy, folder, loggers="wandb")
    wandb.finish()  # only then all records are in the file
    return found


def wandb_run(folder: str) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Returns values by name, and hyperparameters, in the one run below a folder.

    The file is a log of records in blocks of 32 KiB, each record in one or several parts with a head of 7 bytes.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = Path(folder).rglob("run-*.wandb")
    data, position, content = path.read_bytes(), 7, b""
    values: dict[str, list[float]] = {}
    config: dict[str, Any] = {}
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        content += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # the whole, or the last part
            record, content = Record.FromString(content), b""
            for item in record.history.item:
                name = item.key or "/".join(item.nested_key)
                values.setdefault(name, []).append(json.loads(item.value_json))
            config.update({u.key or "/".join(u.nested_key): json.loads(u.value_json) for u in record.config.update})
    return values, config


def shown_by_tqdm(strategy: dict[str, Any] | None) -> str:
    """Returns what the progress bar writes on this rank."""
    from lightning.pytorch.callbacks import TQDMProgressBar

    torch.set_default_dtype(torch.float64)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        trainer = trainer_of(strategy, max_steps=2, enable_progress_bar=True, callbacks=[TQDMProgressBar()])
        trainer.fit(module_that_logs("lightning", 1e-3, sync=False), loader(8, 4))
    return text.getvalue()
