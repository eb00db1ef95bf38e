"""What the ranks of the pipeline's tests run."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tiny
from documents import PACKAGE
from lightning.pytorch import Callback

from lightning_januspipe.callbacks import PipelineTimeline
from lightning_januspipe.capture import balance
from lightning_januspipe.runtime import agreed_schedules, build_pipeline, pipeline
from lightning_januspipe.runtime import planner as planning
from lightning_januspipe.schedule import Action, PhaseCosts
from lightning_januspipe.testing import RunRecord, quiet_trainer, train_in_pipeline


def train_and_replan(strategy: dict[str, Any], steps: int) -> tuple[RunRecord, int]:
    """Trains with a planner that takes up every new schedule; returns how many this rank has built."""
    built = 0
    threshold, improved = planning._WORTH_A_CHANGE, planning.Planner.improved

    def counted(self: Any, schedule: Any, costs: Any) -> Any:
        nonlocal built
        found = improved(self, schedule, costs)
        # Another order than the present one, whatever was measured: fewer live micro-batches.
        chunks = len(costs) // self.num_ranks
        other = planning.build_schedule(
            self.name,
            self.num_ranks,
            schedule.num_microbatches,
            costs,
            max_live=1,
            chunks=chunks,
            placement=self.placement if self.name in planning.CHOOSES_PLACEMENT else None,
        )
        assert found is not None and other.actions != schedule.actions
        built += 1
        return other

    planning._WORTH_A_CHANGE, planning.Planner.improved = -1e9, counted  # type: ignore[method-assign]
    try:
        return train_in_pipeline(tiny.module, tiny.data, strategy, steps, {}), built
    finally:
        planning._WORTH_A_CHANGE, planning.Planner.improved = threshold, improved  # type: ignore[method-assign]


def train_with_placement(
    placement: tuple[int, ...], strategy: dict[str, Any], steps: int
) -> tuple[RunRecord, list[int]]:
    """Trains with stages on given ranks; returns also the stages of this rank."""
    from lightning_januspipe.schedule import request

    stages: list[int] = []
    world, layouts = int(os.environ["WORLD_SIZE"]), request.layouts
    make = pipeline.Pipeline.__init__

    def noted(self: Any, *arguments: Any, **more: Any) -> None:
        make(self, *arguments, **more)
        stages.extend(self.executor.stages)

    with (
        patch.object(build_pipeline, "placements", lambda *_: (placement,)),
        patch.object(request, "layouts", lambda num, *rest: (placement,) if num == world else layouts(num, *rest)),
        patch.object(pipeline.Pipeline, "__init__", noted),
    ):
        return train_in_pipeline(tiny.module, tiny.data, strategy, steps, {}), sorted(stages)


def fit(strategy: dict[str, Any], num_batches: int = 1, callbacks: list[Any] | None = None) -> dict[str, Any]:
    """Trains a few batches; returns what was planned, and which parameters this rank holds."""
    trainer = quiet_trainer(strategy, max_steps=num_batches)
    trainer.callbacks += callbacks or []
    module = tiny.module()
    found: dict[str, Any] = {}

    def look(*_: Any) -> None:
        runner = trainer.strategy.runner
        found["num_microbatches"] = trainer.strategy.num_microbatches()
        found["schedule"] = str(runner.schedules.schedule(found["num_microbatches"]))
        found["placement"], found["force_placement"] = runner.placement, runner.force_placement
        found["stages"] = sorted(runner.executor.stages)
        found["kinds"] = [type(stage).__name__ for stage in runner.executor.stages.values()]
        found["holds"] = sorted(n for n, p in module.named_parameters() if runner.parameters.holds(p))
        planner = runner.schedules.planner
        found["latency"], found["memory"], found["state"] = planner.latency, planner.memory, planner.reserved

    module.on_train_batch_end = look
    trainer.fit(module, datamodule=tiny.data())
    return found


def fit_with_equal_costs(strategy: dict[str, Any]) -> dict[str, Any]:
    """Trains as :func:`fit`, cut as if all operations took the same long time."""
    capture = import_module("lightning_januspipe.capture.capture")
    measured, validated = capture.measure, balance.validate_stages

    def seconds(*arguments: Any) -> Any:
        profile = measured(*arguments)
        return replace(profile, seconds=dict.fromkeys(profile.seconds, 0.01))

    def costs(candidate: Any, *arguments: Any, **options: Any) -> list[PhaseCosts]:
        validated(candidate, *arguments, **options)
        return [PhaseCosts(*(0.01 * len(names),) * 4) for names in candidate.cut.bodies]

    with patch.object(capture, "measure", seconds), patch.object(balance, "validate_stages", costs):
        return fit(strategy)


def fit_with_error(strategy: dict[str, Any], train: Callable[[dict[str, Any]], Any] = fit) -> str:
    """Returns the error that ends a training."""
    try:
        train(strategy)
    except ValueError as error:
        return str(error)
    return ""


def record_timeline(folder: str, strategy: dict[str, Any]) -> tuple[list[tuple[Action, float, float]], float, float]:
    """Records the fifth step; returns its actions with their times, and its makespan, recorded and predicted."""
    found: dict[str, Any] = {}

    class Keep(PipelineTimeline):
        def on_train_batch_end(self, trainer: Any, *arguments: Any) -> None:
            super().on_train_batch_end(trainer, *arguments)
            found["step"] = trainer.strategy.runner.recorded_step()

    fit(strategy, 6, [Keep(step=4, dirpath=folder, suffix="png")])
    step = found["step"]
    times = [(a, step.recorded.start[a], step.recorded.end[a]) for order in step.schedule.actions for a in order]
    return times, step.recorded.makespan, step.predicted.makespan


def timeline_too_late(folder: str) -> list[str]:
    """Returns the warnings of a training that ends before the step that was to be drawn."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit({"num_microbatches": 2}, 2, [PipelineTimeline(step=5, dirpath=folder)])
    return [str(w.message) for w in caught if "PipelineTimeline" in str(w.message)]


def timeline_in_the_default_folder(folder: str) -> int:
    """Records the first step into the Trainer's own folder; returns how many phases were timed for planning."""
    trainer = quiet_trainer({"num_microbatches": 2}, max_steps=1, default_root_dir=folder)
    trainer.callbacks.append(PipelineTimeline(step=0, suffix="png"))
    found: list[int] = []
    module = tiny.module()
    module.on_train_end = lambda: found.append(len(trainer.strategy.runner.schedules._times.means()))
    trainer.fit(module, datamodule=tiny.data())
    trainer.strategy.barrier()
    return found[0]


def places_after_measuring(strategy: dict[str, Any]) -> tuple[Any, Any]:
    """Where the stages are, and where a schedule puts them that is made after costs turned out quite different."""
    measured, found = agreed_schedules.measured_costs, []

    def skewed(*arguments: Any) -> Any:
        return (PhaseCosts(5.0, 1e-3, 1e-3, 5.0),) * len(measured(*arguments))

    def look(trainer: Any) -> None:
        runner = trainer.strategy.runner
        assert runner.schedules.costs[0].fe == 5.0
        later = runner.schedules.schedule(3)
        found.append((runner.placement, runner.force_placement))
        found.append((later.placement, later.force_placement))

    agreed_schedules.measured_costs = skewed  # type: ignore[attr-defined]
    try:
        fit(strategy, 5, [_AtTheEnd(look)])
    finally:
        agreed_schedules.measured_costs = measured  # type: ignore[attr-defined]
    return found[0], found[1]


def costs_of_replicas(strategy: dict[str, Any]) -> tuple[float, Any]:
    """Returns the latency and the costs that a rank plans with, where each rank measures others."""
    measured, latency, found = agreed_schedules.measured_costs, build_pipeline.message_latency, []
    rank = int(os.environ["RANK"])

    def look(trainer: Any) -> None:
        planner = trainer.strategy.runner.schedules.planner
        found.append((planner.latency, planner.costs))

    agreed_schedules.measured_costs = lambda *a: (PhaseCosts(1.0 + rank, 1.0, 1.0, 1.0),) * len(measured(*a))  # type: ignore
    build_pipeline.message_latency = lambda links: 1e-6 * (1 + rank % 2)  # type: ignore[attr-defined]
    try:
        fit(strategy, 5, [_AtTheEnd(look)])
    finally:
        agreed_schedules.measured_costs, build_pipeline.message_latency = measured, latency  # type: ignore[attr-defined]
    return found[0]


def validate_only(strategy: dict[str, Any]) -> float:
    """Returns the loss of a validation without training."""
    trainer = quiet_trainer(strategy, limit_val_batches=1)
    (metrics,) = trainer.validate(tiny.module(), datamodule=tiny.data(), verbose=False)
    return float(metrics["val_loss"])


class _AtTheEnd(Callback):
    """Calls a function with the Trainer when training ends."""

    def __init__(self, function: Callable[[Any], None]) -> None:
        self._function = function

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._function(trainer)


def timeline_without_a_pipeline() -> str:
    """Returns the error of the callback in a run of one process."""
    assert os.environ["WORLD_SIZE"] == "1"
    return fit_with_error_of(PipelineTimeline())


def fit_with_error_of(callback: Any) -> str:
    """Returns the error that a callback raises in a run without a pipeline."""
    trainer = quiet_trainer({}, max_epochs=1, limit_train_batches=1)
    trainer.callbacks.append(callback)
    try:
        trainer.fit(tiny.module(), datamodule=tiny.data())
    except ValueError as error:
        return str(error)
    return ""


def exists(folder: str) -> list[str]:
    """Returns the names of the files in a folder."""
    return sorted(p.name for p in Path(folder).iterdir())


def functions_of_a_step() -> list[tuple[str, str]]:
    """Trains for one step with clipping; returns file and name of the package's functions, in the order of first calls.

    What capture calls is left out.
    """
    called: dict[tuple[str, str], None] = {}
    root = f"{PACKAGE}/"
    build = build_pipeline.PipelineBuilder.pipeline

    def note(frame: Any, event: str, _: Any) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(root):
            called.setdefault((file.removeprefix(root), frame.f_code.co_name))

    def unseen(*arguments: Any) -> Any:
        sys.setprofile(None)
        try:
            return build(*arguments)
        finally:
            sys.setprofile(note)

    trainer = quiet_trainer({"num_microbatches": 2, "schedule": "wavek"}, max_steps=1, gradient_clip_val=1.0)
    with patch.object(build_pipeline.PipelineBuilder, "pipeline", unseen):
        sys.setprofile(note)
        try:
            trainer.fit(tiny.module(), tiny.data())
        finally:
            sys.setprofile(None)
    return list(called)
