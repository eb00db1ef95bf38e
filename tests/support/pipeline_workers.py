"""What the ranks of the pipeline's tests run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import strategy_workers
import tiny

from lightning_januspipe import planning
from lightning_januspipe.callbacks import PipelineTimeline
from lightning_januspipe.schedule import Action
from lightning_januspipe.testing import Record, train_in_pipeline


def train_and_replan(strategy: dict[str, Any], steps: int) -> tuple[Record, int]:
    """Train with a planner that takes up every new schedule; returns how many this rank has built."""
    built = 0
    threshold, improved = planning._WORTH_A_CHANGE, planning.Planner.improved

    def counted(self: Any, schedule: Any, costs: Any) -> Any:
        nonlocal built
        found = improved(self, schedule, costs)
        # Another order than the present one, whatever was measured: fewer live micro-batches.
        chunks = len(costs) // self.num_ranks
        other = planning.build_schedule(
            self.name, self.num_ranks, schedule.num_microbatches, costs, max_live=1, chunks=chunks
        )
        assert found is not None and other.actions != schedule.actions
        built += 1
        return other

    planning._WORTH_A_CHANGE, planning.Planner.improved = -1e9, counted  # type: ignore[method-assign]
    try:
        return train_in_pipeline(tiny.module, tiny.data, strategy, steps, {}), built
    finally:
        planning._WORTH_A_CHANGE, planning.Planner.improved = threshold, improved  # type: ignore[method-assign]


def fit(strategy: dict[str, Any], num_batches: int = 1, callbacks: list[Any] | None = None) -> dict[str, Any]:
    """Train a few batches; returns what was planned, and which parameters this rank holds."""
    trainer = strategy_workers.make_trainer(strategy, max_steps=num_batches)
    trainer.callbacks += callbacks or []
    module = tiny.module()
    found: dict[str, Any] = {}

    def look(*_: Any) -> None:
        runner = trainer.strategy.runner
        found["num_microbatches"] = trainer.strategy.num_microbatches()
        found["schedule"] = str(runner.schedule(found["num_microbatches"]))
        found["placement"], found["force_placement"] = runner._placement, runner._force_placement
        found["stages"] = sorted(runner.executor.stages)
        found["holds"] = sorted(n for n, p in module.named_parameters() if runner.holds(p))
        found["latency"], found["memory"] = runner._planner.latency, runner._planner.memory

    module.on_train_batch_end = look
    trainer.fit(module, datamodule=tiny.data())
    return found


def fit_with_error(strategy: dict[str, Any]) -> str:
    """The error that ends a training."""
    try:
        fit(strategy)
    except ValueError as error:
        return str(error)
    return ""


def record_timeline(folder: str, strategy: dict[str, Any]) -> tuple[list[tuple[Action, float, float]], float, float]:
    """Record the fifth step; returns its actions with their times, and its makespan, recorded and predicted."""
    found: dict[str, Any] = {}

    class Keep(PipelineTimeline):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            super().on_train_batch_end(trainer, *arguments)
            found["step"] = trainer.strategy.runner.recorded_step()

    fit(strategy, 6, [Keep(step=4, dirpath=folder, suffix="png")])
    step = found["step"]
    times = [(a, step.recorded.start[a], step.recorded.end[a]) for order in step.schedule.actions for a in order]
    return times, step.recorded.makespan, step.predicted.makespan


def timeline_without_a_pipeline() -> str:
    """The error of the callback in a run of one process."""
    assert os.environ["WORLD_SIZE"] == "1"
    return fit_with_error_of(PipelineTimeline())


def fit_with_error_of(callback: Any) -> str:
    """The error that a callback raises in a run without a pipeline."""
    trainer = strategy_workers.make_trainer({}, max_epochs=1, limit_train_batches=1)
    trainer.callbacks.append(callback)
    try:
        trainer.fit(tiny.module(), datamodule=tiny.data())
    except ValueError as error:
        return str(error)
    return ""


def exists(folder: str) -> list[str]:
    """Names of the files in a folder."""
    return sorted(p.name for p in Path(folder).iterdir())
