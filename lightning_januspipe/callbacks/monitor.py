"""Logs the costs of pipelined training (throughput, bubbles, phases, messages, memory), and draws them at the end."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from typing_extensions import override

from lightning_januspipe.callbacks.lightning_classes import (
    LightningModule,
    Trainer,
    check_suffix,
    output_folder,
    runner_of,
)
from lightning_januspipe.callbacks.picture import Curve, draw_run
from lightning_januspipe.callbacks.rank_metrics import PREFIX, RankNumbers, exchanged, metrics
from lightning_januspipe.callbacks.throughput import Metered
from lightning_januspipe.distributed import waiting
from lightning_januspipe.schedule.figures import Panel

_MEMORY_EVERY = 10  # recorded steps


class PipelineMonitor(Metered):
    """Records a training step at regular intervals and logs its costs; draws and writes all of them at the end.

    All loggers get these metrics under ``januspipe/``, and so does ``trainer.callback_metrics``, where
    ``EarlyStopping`` finds them:

    - ``atoms_per_s``, ``structures_per_s``: throughput over all replicas since the last recorded step, without
      validations and without the first batch of the run;
    - ``step_ms``: time from the first to the last action of the pipeline, of the slowest replica;
    - ``bubble_fraction``: the share of that time in which the busiest rank waits; ``bubble_fraction/rank0`` and so on:
      the share in which each rank waits;
    - ``FE_ms/stage0`` and so on: mean time of each phase of each stage for one micro-batch;
    - ``message_bytes``: bytes that all ranks send to other stages in a step, without parameter gradients;
    - ``peak_memory_bytes/rank0`` and so on: memory of each rank of the pipeline, with all its stages; on CUDA
      ``torch.cuda.max_memory_allocated``, on the CPU the most bytes of saved tensors and messages between actions;
    - ``microbatch_imbalance``: time of the slowest micro-batch over the mean; ``replica_imbalance``: the same for
      replicas.

    All ranks get the same values. Without a pipeline only throughput, time, imbalance and memory on CUDA are known;
    with other strategies than JanusPipe only the throughput. At the end, rank 0 writes ``pipeline-monitor.svg`` (or
    ``.png``), with the last recorded step and curves of these metrics, and ``pipeline-monitor.json``. After an
    exception in training both hold the metrics up to then, without the step.

    Recording costs one small collective, in the recorded step only. On the CPU memory is measured in the batch before
    a recorded step, which then takes about twice as long: once, and again before every tenth recorded step (never with
    ``every_n_steps=1``, nor in the first batches, whose times decide on the schedule).

    Args:
        every_n_steps: Interval of recorded steps, in training batches.
        dirpath: Folder for the files; by default the logger's folder, or the Trainer's ``default_root_dir``.
        suffix: ``svg`` or ``png``.

    Attributes:
        history: Metrics of every recorded step, with the index of its ``batch`` and the ``global_step`` after it.

    Raises:
        ValueError: ``every_n_steps`` is below 1, or ``suffix`` is neither of the two.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: lightning_januspipe.callbacks.PipelineMonitor
              init_args: {every_n_steps: 50}
    """

    def __init__(self, every_n_steps: int = 50, dirpath: str | None = None, suffix: str = "svg") -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps={every_n_steps}; expected a number of batches, at least 1")
        check_suffix(suffix)
        super().__init__(window=every_n_steps)
        self.every_n_steps, self.dirpath, self.suffix = every_n_steps, dirpath, suffix
        self.history: list[dict[str, float]] = []
        self._num_batches = 0
        self._folder = Path()
        self._is_running = False

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier run."""
        super().on_train_start(trainer, pl_module)
        self.history, self._num_batches, self._is_running = [], 0, True
        self._folder = output_folder(trainer, self.dirpath)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Asks for a recording of this batch, if it is due."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        runner = runner_of(trainer)
        left = -(self._num_batches + 1) % self.every_n_steps
        if runner is None:
            return
        if left == 0:
            runner.step_recorder.ask()
        elif left == 1 and runner.is_staged and trainer.strategy.root_device.type == "cpu":
            is_due = runner.step_recorder.held is None or len(self.history) % _MEMORY_EVERY == 0
            if is_due:
                runner.step_recorder.ask(memory=True)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the metrics of a recorded batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._num_batches += 1
        if self._num_batches % self.every_n_steps:
            return
        found = self._metrics(trainer)
        self.history.append({"batch": self._num_batches - 1, "global_step": trainer.global_step, **found})
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({k: torch.tensor(v, device=device) for k, v in found.items()})
        for logger in trainer.loggers:
            logger.log_metrics(found, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws and writes, on one rank."""
        self._is_running = False
        if not self.history:
            if trainer.is_global_zero:
                warnings.warn(
                    f"PipelineMonitor: training ended after {self._num_batches} batches, so none was recorded; ask for "
                    f"every_n_steps below {self.every_n_steps}",
                    stacklevel=2,
                )
            return
        rows = self._rows(trainer)  # which asks all ranks
        if trainer.is_global_zero:
            self._write(trainer, rows)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Writes what this rank knows: others may have ended."""
        if self._is_running and trainer.is_global_zero and self.history:
            self._write(trainer, [])
        self._is_running = False

    def _metrics(self, trainer: Trainer) -> dict[str, float]:
        runner, mesh = runner_of(trainer), getattr(trainer.strategy, "mesh", None)
        if runner is None or mesh is None:
            seconds, atoms, structures = self.measured()
            rates = torch.tensor([atoms, structures], dtype=torch.float64) / (seconds or float("nan"))
            rates = trainer.strategy.reduce(rates.to(trainer.strategy.root_device), reduce_op="sum")
            names = ("atoms_per_s", "structures_per_s")
            return {PREFIX + n: r for n, r in zip(names, rates.tolist(), strict=True) if seconds}
        device = trainer.strategy.root_device
        held = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else runner.step_recorder.held
        mine = RankNumbers.of_step(runner.step_recorder.rank_step, self.measured(), held)
        strategy: Any = trainer.strategy
        return metrics(exchanged(mine, runner.num_stages, strategy.num_microbatches(), mesh.host_group), mesh.shape)

    def _rows(self, trainer: Trainer) -> list[Panel]:
        """Returns the last recorded step of each pipeline, on global rank 0."""
        runner, mesh = runner_of(trainer), getattr(trainer.strategy, "mesh", None)
        if runner is None or not runner.is_staged or mesh is None or mesh.aborted:
            return []
        own = runner.recorded_step()
        steps: list[Any] | None = [own]
        if mesh.shape.size > 1:
            steps = [None] * mesh.shape.size if mesh.rank == 0 else None
            with waiting("gathering of recorded steps", mesh.host_group):
                dist.gather_object(own if mesh.pipeline_rank == 0 else None, steps, 0, group=mesh.host_group)
        replicas = [step for step in steps or [] if step is not None]
        names = [f"replica {i}" if len(replicas) > 1 else "recorded" for i in range(len(replicas))]
        predicted = [("predicted", replicas[0].schedule, replicas[0].predicted)] if replicas else []
        return [*predicted, *((n, s.schedule, s.recorded) for n, s in zip(names, replicas, strict=True))]

    def _write(self, trainer: Trainer, rows: list[Panel]) -> None:
        path = self._folder / "pipeline-monitor"
        self._folder.mkdir(parents=True, exist_ok=True)
        mesh = getattr(trainer.strategy, "mesh", None)
        shape = {} if mesh is None else {"pipeline": mesh.shape.pipeline, "data": mesh.shape.data}
        schedule = rows[0][1].name if rows else getattr(trainer.strategy, "schedule", None)
        facts = {"mesh": shape, "schedule": schedule, "every_n_steps": self.every_n_steps, "steps": self.history}
        path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
        panels = [c for c in (self._curves("atoms_per_s", "bubble_fraction"), self._curves("step_ms")) if c]
        if panels:
            title = f"{schedule}, batch {self.history[-1]['batch']:.0f}" if rows else "Training"
            draw_run(rows, panels, path.with_suffix(f".{self.suffix}"), title)

    def _curves(self, *names: str) -> list[Curve]:
        labels = {"atoms_per_s": "atoms/s", "bubble_fraction": "bubble fraction", "step_ms": "step (ms)"}
        found = []
        for name in names:
            points = [(int(h["batch"]), h[PREFIX + name]) for h in self.history if PREFIX + name in h]
            if points:
                found.append(Curve(labels[name], [b for b, _ in points], [v for _, v in points]))
        return found
