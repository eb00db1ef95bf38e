"""What the ranks of the tests of callbacks run: Lightning's own beside this project's."""

from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path
from typing import Any

import lightning
import tiny
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from strategy_workers import namespaced_module, plain

from lightning_januspipe.callbacks import PipelineMonitor, StageSummary
from lightning_januspipe.testing import quiet_trainer
from lightning_januspipe.testing.trainer import library

FOLDED: dict[str, Any] = {"num_microbatches": 2, "schedule": "1f1b-fold"}

HOOKS = sorted(n for n in vars(lightning.Callback) if n.startswith(("on_", "setup", "teardown")))


def recorded_hooks() -> Any:
    """Returns a callback that notes the order in which its hooks are called."""
    order: list[str] = []

    def hook(name: str) -> Any:
        return lambda self, *_, **__: order.append(name)

    callback = type("Hooks", (lightning.Callback,), {name: hook(name) for name in HOOKS})()
    callback.order = order
    return callback


class PredictionWriter(callbacks.BasePredictionWriter):
    """Writes predictions as a user would, to one folder for each rank."""

    def __init__(self, folder: Path, interval: Any) -> None:
        super().__init__(interval)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write_on_batch_end(
        self, trainer: Any, module: Any, prediction: Any, indices: Any, batch: Any, batch_idx: int, loader: int
    ) -> None:
        (self.folder / f"batch-{batch_idx}.json").write_text(json.dumps([plain(prediction), indices]))

    def write_on_epoch_end(self, trainer: Any, module: Any, predictions: Any, batch_indices: Any) -> None:
        (self.folder / "epoch.json").write_text(json.dumps([plain(predictions), batch_indices]))


class StopTimer(lightning.Callback):
    """Lets a Timer's time be up in a certain batch."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 4:
            timer = next(c for c in trainer.callbacks if isinstance(c, callbacks.Timer))
            timer._offset = 1e6


class Summary(callbacks.ModelSummary):
    """Keeps what Lightning's summary counts."""

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        found = self._summary(trainer, module)
        self.found = {"rows": found._get_summary_data(), "total": found.total_parameters}


def fit_with_callbacks(strategy: dict[str, Any] | None, folder: str) -> dict[str, Any]:
    """Trains with most of Lightning's callbacks at once, until EarlyStopping ends it."""
    where = Path(folder) / ("plain" if strategy is None else "pipeline")
    hooks, summary, bar = recorded_hooks(), Summary(), callbacks.RichProgressBar(refresh_rate=1)
    stopping = callbacks.EarlyStopping("val_loss", min_delta=1e9, patience=2)
    given = [hooks, summary, bar, stopping, callbacks.LearningRateMonitor(), callbacks.DeviceStatsMonitor()]
    trainer = quiet_trainer(
        strategy, callbacks=given, max_epochs=9, logger=CSVLogger(where, name="", version=""), num_sanity_val_steps=1,
        log_every_n_steps=1, enable_progress_bar=True, enable_model_summary=True, accumulate_grad_batches=2,
    )  # fmt: skip
    module = tiny.module(lr_scheduler="cosine", learning_rate=1e-4)
    trainer.fit(module, tiny.data())
    rows = (where / "metrics.csv").read_text().splitlines() if trainer.is_global_zero else []
    return {
        "hooks": hooks.order,
        "summary": summary.found,
        "stopped": (stopping.stopped_epoch, trainer.current_epoch, trainer.global_step),
        "wait": stopping.wait_count,
        "best": float(stopping.best_score),
        "progress": plain(trainer.progress_bar_metrics),
        "csv": rows,
    }


def timed(strategy: dict[str, Any] | None) -> int:
    """Returns the step in which a Timer stops training."""
    trainer = quiet_trainer(
        strategy,
        callbacks=[callbacks.Timer(duration={"days": 1}, interval="step"), StopTimer()],
        max_epochs=9,
        limit_val_batches=0,
    )
    trainer.fit(tiny.module(), tiny.data())
    return int(trainer.global_step)


def evaluate_with_callbacks(strategy: dict[str, Any] | None, folder: str) -> dict[str, Any]:
    """Predicts with writers, validates and tests; returns files by name, and hooks."""
    where = Path(folder) / ("plain" if strategy is None else f"rank{os.environ['RANK']}")
    hooks = recorded_hooks()
    writers = [PredictionWriter(where, interval) for interval in ("batch", "epoch")]
    trainer = quiet_trainer(strategy, callbacks=[hooks, *writers])
    module, data = tiny.module(), tiny.data()
    trainer.predict(module, data, return_predictions=False)
    trainer.validate(module, data, verbose=False)
    trainer.test(module, data, verbose=False)
    return {"files": {p.name: json.loads(p.read_text()) for p in sorted(where.iterdir())}, "hooks": hooks.order}


def profiled(name: str, folder: str) -> dict[str, str]:
    """Trains two steps and validates under a profiler of Lightning; returns what it writes on this rank."""
    module = tiny.module()
    cases: dict[str, Any] = {
        "simple": lambda: lightning.pytorch.profilers.SimpleProfiler(folder, "times"),
        "advanced": lambda: lightning.pytorch.profilers.AdvancedProfiler(folder, "times"),
        "pytorch": lambda: lightning.pytorch.profilers.PyTorchProfiler(
            folder, "times", export_to_chrome=False, row_limit=-1
        ),
    }
    strategy = {"num_microbatches": 2, "schedule": "wavek-zb"}
    trainer = quiet_trainer(strategy, profiler=cases[name](), max_steps=2, limit_val_batches=1)
    trainer.fit(module, tiny.data())
    mine = [p for p in Path(folder).iterdir() if p.stem.endswith(f"times-{os.environ['RANK']}") or "times" in p.stem]
    return {p.name: p.read_text() for p in mine}


def under_torch_profiler() -> dict[str, int]:
    """Counts of the named ranges that torch's own profiler sees in the second of two steps."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    class Profile(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 1:
                profiler.start()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 2:
                profiler.stop()

    trainer = quiet_trainer({"num_microbatches": 2}, callbacks=[Profile()], max_steps=2, limit_val_batches=0)
    trainer.fit(tiny.module(), tiny.data())
    return {e.key: e.count for e in profiler.key_averages() if e.key.startswith("[JanusPipe]")}


class Sent(lightning.Callback):
    """Measures the bytes of messages by itself, and what a recorded schedule is predicted to hold."""

    def __init__(self) -> None:
        self.sent: list[int] = []
        self.held: tuple[float, ...] = ()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        self._before = trainer.strategy.runner.bytes_sent

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        runner = trainer.strategy.runner
        self.sent.append(runner.bytes_sent - self._before)
        self.held = runner.schedules.planner.report(runner.schedules.schedule(4)).peak_memory


def monitored(strategy: dict[str, Any], folder: str, every: int = 3, **arguments: Any) -> dict[str, Any]:
    """Trains with a monitor, a logger, validations and accumulation."""
    monitor, sent = PipelineMonitor(every_n_steps=every), Sent()
    trainer = quiet_trainer(
        strategy, callbacks=[monitor, sent], max_epochs=3, logger=CSVLogger(folder, name="", version=""),
        log_every_n_steps=1000, accumulate_grad_batches=2, default_root_dir=folder, **arguments,
    )  # fmt: skip
    trainer.fit(tiny.module(), tiny.data())
    kept = {k: v for k, v in plain(trainer.callback_metrics).items() if k.startswith("januspipe/")}
    return {"history": monitor.history, "metrics": kept, "sent": sent.sent, "held": sent.held}


def stopped_by_a_metric(namespace: str) -> tuple[int, int]:
    """Stops early on a value that does not change, the bytes of messages; returns epochs and how many were noted."""
    stopping = library(namespace).callbacks.EarlyStopping(
        "januspipe/message_bytes", mode="max", patience=2, check_on_train_epoch_end=True
    )
    monitor = PipelineMonitor(every_n_steps=2, dirpath=os.devnull + ".d")
    monitor.on_train_end = lambda *_: None  # type: ignore[method-assign]
    trainer = quiet_trainer(FOLDED, namespace, callbacks=[monitor, stopping], max_epochs=9)
    trainer.fit(namespaced_module(namespace, 1e-4), tiny.data(16).train_dataloader())
    return trainer.current_epoch, len(monitor.history)


def slow_replica(strategy: dict[str, Any], folder: str) -> tuple[list[dict[str, float]], list[float]]:
    """The steps of the second replica are slower; returns the history, and the atoms of this replica's batches."""
    module = tiny.module()
    step, atoms = module.training_step, []

    def training_step(batch: Any, batch_idx: int) -> Any:
        if module.trainer.strategy.mesh.data_rank == 1:
            time.sleep(0.2)
        return step(batch, batch_idx)

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        atoms.append(float(sum(len(b["positions"]) for b in batch)))

    module.training_step, module.on_train_batch_start = training_step, on_train_batch_start
    monitor = PipelineMonitor(every_n_steps=2, dirpath=folder)
    trainer = quiet_trainer(
        strategy, callbacks=[monitor], max_steps=2, limit_val_batches=0, use_distributed_sampler=True
    )
    trainer.fit(module, tiny.data(16, 4))
    return monitor.history, atoms


def failing(folder: str) -> str:
    """Has one rank fail in its own callback, outside a step."""

    class Failing(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if os.environ["RANK"] == "1" and trainer.global_step == 3:
                raise OSError("disk full")

    monitor = PipelineMonitor(every_n_steps=1, dirpath=folder)
    try:
        trainer = quiet_trainer(
            {**FOLDED, "timeout": 20}, callbacks=[Failing(), monitor], max_steps=6, limit_val_batches=0
        )
        trainer.fit(tiny.module(), tiny.data())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def stage_summary(strategy: dict[str, Any] | None) -> tuple[str, dict[str, list[int]]]:
    """Returns what StageSummary prints on this rank, and the stages in which each layer's parameters are held."""
    import contextlib

    text = io.StringIO()
    held: dict[str, list[int]] = {}

    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            runner = getattr(trainer.strategy, "runner", None)
            if runner is not None:
                held.update({n: sorted(runner.parameters.ranks_of[p]) for n, p in module.named_parameters()})

    os.environ["COLUMNS"] = "160"
    with contextlib.redirect_stdout(text):
        trainer = quiet_trainer(
            strategy, callbacks=[StageSummary(), Look()], max_steps=2, limit_val_batches=0, enable_model_summary=True
        )
        trainer.fit(tiny.module(), tiny.data())
    return text.getvalue(), held
