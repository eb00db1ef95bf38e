"""Times training steps with compiled phases against eager ones, in one process with one thread.

Each configuration runs in a fresh process. CPU times stand beside times on the clock, since other programs on the
machine change these.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from lightning_januspipe.bench.training_steps import module_and_loader
from lightning_januspipe.bench.work import Work, trainer_of
from lightning_januspipe.capture.cache.store import VARIABLE
from lightning_januspipe.testing import RankPool

_WARM_UP = 2
_KEPT_AFTER = ("FE", "FF", "BF")
_ACTIVATIONS = ("keep", "pointwise", "recompute")


@dataclass(frozen=True)
class StepTimes:
    """Holds the measurement of one process; times in seconds, with CPU time beside time on the clock.

    Attributes:
        wall: Median time of a step.
        cpu: Median CPU time of a step.
        loss: Loss of the last step, which shows that the work was the same.
        kept: Bytes that a micro-batch keeps after FE, FF and BF; none without compiled phases.
        kept_eagerly: The same of eager phases, as the capture measured them.
        compiling: Time of tracing and compiling.
        compiling_cpu: CPU time of that, with the compiler's processes.
    """

    wall: float
    cpu: float
    loss: float
    kept: tuple[int, ...] = ()
    kept_eagerly: tuple[int, ...] = ()
    compiling: float = 0.0
    compiling_cpu: float = 0.0


def time_steps(work: Work, strategy: dict[str, Any] | None, cache: str) -> StepTimes:
    """Trains for a few steps in this process.

    Args:
        work: Model, data and number of steps, the same for every configuration.
        strategy: Arguments of the strategy; None for plain Lightning.
        cache: Folder of the cache of traced potentials and compiled phases.
    """
    import lightning
    import torch

    os.environ[VARIABLE] = cache
    os.environ.pop("TORCHINDUCTOR_CACHE_DIR", None)
    torch.set_num_threads(1)
    dtype = torch.float64 if work.dtype == "float64" else torch.float32
    torch.set_default_dtype(dtype)
    module, loader = module_and_loader(work, dtype, energy_weight=1.0)
    times: list[tuple[float, float]] = []
    losses: list[float] = []
    found: list[Any] = []
    kept: dict[str, int] = {}

    class Clock(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            runner = getattr(trainer.strategy, "runner", None)
            if runner is not None and runner.is_staged:
                found[:] = [runner]
                is_noted = runner.compile_report is not None and len(times) < _WARM_UP
                runner.executor.annotate = _noting(kept, runner.executor) if is_noted else None
            self._began = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            times.append((time.perf_counter() - self._began[0], time.process_time() - self._began[1]))
            losses.append(float(outputs["loss"]))

    trainer_of(strategy, work.steps + _WARM_UP, Clock()).fit(module, loader)
    wall, cpu = (statistics.median(column) for column in zip(*times[_WARM_UP:], strict=True))
    if not found or found[0].compile_report is None:
        return StepTimes(wall, cpu, losses[-1])
    report, eager = found[0].compile_report, found[0].schedules.planner.memory[0]
    if report.eager:
        raise ValueError(f"nothing to time: {'; '.join(report.eager)}")
    of_eager = eager.energy, eager.energy + eager.force, eager.energy + eager.kept
    own = tuple(kept[phase] for phase in _KEPT_AFTER)
    return StepTimes(wall, cpu, losses[-1], own, of_eager, report.seconds, report.cpu_seconds)


def _noting(kept: dict[str, int], executor: Any) -> Any:
    """Returns a context for actions, which notes the bytes that are kept after each."""

    @contextmanager
    def annotate(name: str) -> Iterator[None]:
        yield
        phase = name.removeprefix("[JanusPipe]").split()[0]
        kept[phase] = executor.stages[0].held_bytes()

    return annotate


def compiled(work: Work, runs: int = 1) -> str:
    """Times compiled phases, and what they keep, with each activation against eager training in one process."""
    strategies: dict[str, dict[str, Any] | None] = {"plain Lightning": None, "januspipe, eager": {}}
    strategies["januspipe, eager, recompute"] = {"activation": "recompute"}
    strategies |= {f"januspipe, compiled, {a}": {"compile": True, "activation": a} for a in _ACTIVATIONS}
    found: dict[str, list[StepTimes]] = {name: [] for name in strategies}
    warm: dict[str, StepTimes] = {}
    for run in range(runs):
        for name, strategy in strategies.items():
            with tempfile.TemporaryDirectory() as cache:
                found[name].append(_in_fresh_process(work, strategy, cache))
                if strategy and "compile" in strategy and run == 0:
                    warm[name] = _in_fresh_process(replace(work, steps=1), strategy, cache)
            print(f"run {run + 1} of {runs}: {name}: {found[name][-1].cpu:.3f} s of CPU time per step", flush=True)
    return _table(found, warm)


def _in_fresh_process(work: Work, strategy: dict[str, Any] | None, cache: str) -> StepTimes:
    with RankPool(1) as pool:
        (times,) = pool.run(time_steps, work, strategy, cache, timeout=7200)
    return times


def _table(found: dict[str, list[StepTimes]], warm: dict[str, StepTimes]) -> str:
    """Returns a Markdown table; speeds are by CPU time, against the first row."""
    lines = [
        "| configuration | step, CPU (s) | step (s) | speed | kept after FE / FF / BF (MB) | compiled in, CPU (s) "
        "| second start, CPU (s) | last loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: float | None = None
    of_eager = ""
    for name, times in found.items():
        cpu, wall = (statistics.median(getattr(t, column) for t in times) for column in ("cpu", "wall"))
        first = first or cpu
        one = times[0]
        kept, compiling, again = "", "", ""
        if one.kept:
            kept, of_eager = _megabytes(one.kept), _megabytes(one.kept_eagerly)
            compiling = f"{one.compiling:.0f}, {one.compiling_cpu:.0f}"
            again = f"{warm[name].compiling:.0f}, {warm[name].compiling_cpu:.0f}"
        lines.append(
            f"| {name} | {cpu:.3f} | {wall:.3f} | {first / cpu:.2f} | {kept} | {compiling} | {again} "
            f"| {times[-1].loss:.6g} |"
        )
    return "\n".join([*lines, "", f"Eager phases of the same stage keep {of_eager} MB."])


def _megabytes(sizes: tuple[int, ...]) -> str:
    return " / ".join(f"{size / 1e6:.1f}" for size in sizes)
