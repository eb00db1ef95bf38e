"""Draws the timeline of one training step."""

from __future__ import annotations

import warnings
from typing import Any

from typing_extensions import override

from lightning_januspipe.callbacks.lightning_classes import (
    Callback,
    LightningModule,
    Trainer,
    check_suffix,
    output_folder,
    runner_of,
)
from lightning_januspipe.schedule import draw
from lightning_januspipe.schedule.chrome_trace import write_chrome_trace

_MOST_APART = 2.0
"""How many times longer than the other one of the two steps may be, for both to have one time axis."""


class PipelineTimeline(Callback):
    """Draws one training step as it ran on all ranks of a pipeline, above the prediction for it.

    Writes ``pipeline-step-N.svg`` (or ``.png``) and ``pipeline-step-N.json``, a trace for ``ui.perfetto.dev``. The
    prediction is the simulation with the phase times that the schedule was made for. These are measured in the second
    to fourth step of training, so a later step compares best. The clocks of the ranks are set at the start of the step,
    when the ranks have compared their batches: they agree to a fraction of a millisecond.

    Args:
        step: Index of the training batch to record, counted from 0 at the start of ``fit``.
        dirpath: Folder for the files; by default the logger's folder, or the Trainer's ``default_root_dir``.
        suffix: ``svg`` or ``png``.

    Raises:
        ValueError: ``step`` is negative, or ``suffix`` is neither of the two.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: lightning_januspipe.callbacks.PipelineTimeline
              init_args: {step: 10}
    """

    def __init__(self, step: int = 10, dirpath: str | None = None, suffix: str = "svg") -> None:
        super().__init__()
        if step < 0:
            raise ValueError(f"step={step}; expected the index of a training batch, at least 0")
        check_suffix(suffix)
        self.step, self.dirpath, self.suffix = step, dirpath, suffix
        self._num_batches = 0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts batches from here."""
        self._num_batches = 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Asks for the recording."""
        runner = runner_of(trainer)
        if runner is None or not runner.is_staged:
            raise ValueError(
                "PipelineTimeline draws the steps of a pipeline, but this run has none; use "
                "Trainer(strategy='januspipe') with at least two processes, or leave the callback out"
            )
        if self._num_batches == self.step:
            runner.record_next_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draws the recorded step, on one rank."""
        self._num_batches += 1
        if self._num_batches != self.step + 1:
            return
        folder = output_folder(trainer, self.dirpath)
        runner = runner_of(trainer)
        found = None if runner is None else runner.recorded_step()  # and so does this
        if not trainer.is_global_zero:
            return
        assert found is not None, "the step was recorded"
        rows = [("predicted", found.schedule, found.predicted), ("recorded", found.schedule, found.recorded)]
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"pipeline-step-{self.step}"
        title = f"{found.schedule.name}, {found.schedule.num_ranks} ranks"
        times = (found.recorded.makespan, found.predicted.makespan)
        file = path.with_suffix(f".{self.suffix}")
        draw.gantt(rows, file, unit="s", title=title, one_axis=max(times) < _MOST_APART * min(times))
        write_chrome_trace(rows, path.with_suffix(".json"))
        print(
            f"januspipe: step {self.step} took {times[0]:.3f} s in the pipeline, {found.recorded.describe_bubbles()} "
            f"(predicted {times[1]:.3f} s, {found.predicted.describe_bubbles()}); timeline in {file}"
        )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warns if the step did not come."""
        if trainer.is_global_zero and self._num_batches <= self.step:
            warnings.warn(
                f"PipelineTimeline: training ended after {self._num_batches} batches, so step {self.step} was not "
                "drawn; ask for an earlier step",
                stacklevel=2,
            )
