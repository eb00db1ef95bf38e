"""Times training steps with compiled phases against eager ones, in one process with one thread.

Each configuration runs in a fresh process. CPU times stand beside times on the clock, since other programs on the
machine change these.
"""

from __future__ import annotations

import os
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

from lightning_januspipe.bench.gpu_counts import GpuCounts, phase_bytes
from lightning_januspipe.bench.training_steps import module_and_loader
from lightning_januspipe.bench.work import Work, function_of, trainer_of
from lightning_januspipe.capture.cache.store import VARIABLE
from lightning_januspipe.testing import RankPool
from lightning_januspipe.testing.trainer import library, namespace_of

_WARM_UP = 2
_KEPT_AFTER = ("FE", "FF", "BF")

RowName = Literal[
    "plain", "eager", "eager-offload", "eager-recompute", "keep", "pointwise", "recompute", "offload", "own"
]

_ROWS: dict[RowName, tuple[str, dict[str, Any] | None]] = {
    "plain": ("plain Lightning", None),
    "eager": ("januspipe, eager", {}),
    "eager-offload": ("januspipe, eager, offload", {"activation": "offload"}),
    "eager-recompute": ("januspipe, eager, recompute", {"activation": "recompute"}),
    "keep": ("januspipe, compiled, keep", {"compile": True, "activation": "keep"}),
    "pointwise": ("januspipe, compiled, pointwise", {"compile": True, "activation": "pointwise"}),
    "recompute": ("januspipe, compiled, recompute", {"compile": True, "activation": "recompute"}),
    "offload": ("januspipe, compiled, offload", {"compile": True, "activation": "offload"}),
    "own": ("the package's own compiled training", None),
}
_USUAL_ROWS: tuple[RowName, ...] = ("plain", "eager", "eager-recompute", "keep", "pointwise", "recompute")


@dataclass(frozen=True)
class Job:
    """Says what one process trains.

    Attributes:
        work: The size of the work, the same for every configuration.
        strategy: Arguments of the strategy; None for plain Lightning.
        factory: ``module:function``, which makes module and loader; None for the reference potential.
        accelerator: The Trainer's accelerator.
        cache: Folder of the cache of traced potentials and compiled phases.
    """

    work: Work
    strategy: dict[str, Any] | None
    factory: str | None
    accelerator: str
    cache: str


@dataclass(frozen=True)
class StepTimes:
    """Holds the measurement of one process; times in seconds, with CPU time beside time on the clock.

    Attributes:
        wall: Median time of a step.
        cpu: Median CPU time of a step.
        loss: Loss of the last step, which shows that the work was the same.
        kept: Bytes that a micro-batch keeps on the device after FE, FF and BF; none without compiled phases.
        on_host: The most bytes that it keeps on the host.
        kept_eagerly: What eager phases keep, as the capture measured them.
        compiling: Time of tracing and compiling; of a package's own compiled training, of the first step.
        compiling_cpu: CPU time of that, with the compiler's processes.
        gpu: What a GPU did in a step.
    """

    wall: float
    cpu: float
    loss: float
    kept: tuple[int, ...] = ()
    on_host: int = 0
    kept_eagerly: tuple[int, ...] = ()
    compiling: float = 0.0
    compiling_cpu: float = 0.0
    gpu: GpuCounts | None = None


def time_steps(job: Job) -> StepTimes:
    """Trains for a few steps in this process."""
    import torch

    os.environ[VARIABLE] = job.cache
    # A package's own compiled training begins without what earlier runs have compiled, as januspipe does.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(job.cache, "inductor")
    torch.set_num_threads(1)
    work = job.work
    dtype = torch.float64 if work.dtype == "float64" else torch.float32
    torch.set_default_dtype(dtype)
    if job.factory is None:
        module, loader = module_and_loader(work, dtype, energy_weight=1.0)
    else:
        module, loader = function_of(job.factory)(work)
    times: list[tuple[float, float]] = []
    losses: list[float] = []
    found: list[Any] = []
    kept: dict[str, tuple[int, int]] = {}
    is_gpu = job.accelerator == "gpu"
    counts = GpuCounts()
    namespace = namespace_of(module)

    began: list[tuple[float, float]] = []

    def start(trainer: Any, *_: Any) -> None:
        runner = getattr(trainer.strategy, "runner", None)
        is_counted = is_gpu and len(times) == work.steps + _WARM_UP
        if runner is not None and runner.is_staged:
            found[:] = [runner]
            report = runner.compile_report
            is_noted = report is not None and not report.eager and len(times) < _WARM_UP
            runner.executor.annotate = _noting(kept, runner.executor) if is_noted else None
            if is_counted and report is not None:
                runner.executor.annotate = counts.timed
        if is_counted:
            counts.begin()
        began[:] = [_now(is_gpu)]

    def end(trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        if len(times) == work.steps + _WARM_UP:
            counts.end()
            return
        wall, cpu = _now(is_gpu)
        times.append((wall - began[0][0], cpu - began[0][1]))
        losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))

    clock = library(namespace).callbacks.LambdaCallback(on_train_batch_start=start, on_train_batch_end=end)
    steps = work.steps + _WARM_UP + is_gpu
    with phase_bytes(counts) if is_gpu else nullcontext():
        trainer_of(job.strategy, steps, clock, accelerator=job.accelerator, namespace=namespace).fit(module, loader)
    wall, cpu = (statistics.median(column) for column in zip(*times[_WARM_UP:], strict=True))
    gpu = counts if is_gpu else None
    if not found or found[0].compile_report is None:
        first = [a - b for a, b in zip(times[0], (wall, cpu), strict=True)]
        return StepTimes(wall, cpu, losses[-1], compiling=first[0], compiling_cpu=first[1], gpu=gpu)
    report, eager = found[0].compile_report, found[0].schedules.planner.memory[0]
    if report.eager:
        raise ValueError(f"nothing to time: {'; '.join(report.eager)}")
    of_eager = eager.energy, eager.energy + eager.force, eager.energy + eager.kept
    own, on_host = tuple(kept[phase][0] for phase in _KEPT_AFTER), max(host for _, host in kept.values())
    return StepTimes(wall, cpu, losses[-1], own, on_host, of_eager, report.seconds, report.cpu_seconds, gpu)


def _now(is_gpu: bool) -> tuple[float, float]:
    """Returns the time on the clock and the CPU time, with that of compilers, when the GPU has ended its work."""
    if is_gpu:
        import torch

        torch.cuda.synchronize()
    of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), time.process_time() + of_children.ru_utime + of_children.ru_stime


def _noting(kept: dict[str, tuple[int, int]], executor: Any) -> Any:
    """Returns a context for actions, which notes the bytes that are kept after each on the device and on the host."""

    @contextmanager
    def annotate(name: str) -> Iterator[None]:
        yield
        stage = executor.stages[0]
        on_host = sum(tensor.nbytes for tensor in stage.host_tensors())
        kept[name.removeprefix("[JanusPipe]").split()[0]] = stage.held_bytes(), on_host

    return annotate


def compiled(
    work: Work,
    runs: int = 1,
    rows: list[RowName] | None = None,
    factory: str | None = None,
    own_factory: str | None = None,
    accelerator: Literal["cpu", "gpu"] = "cpu",
) -> str:
    """Times compiled phases, and what they keep, with each activation against eager training in one process.

    Args:
        work: What is trained.
        runs: Runs of each configuration, of which medians are taken.
        rows: The configurations: plain, eager, eager-offload, eager-recompute; compiled: keep, pointwise, recompute,
            offload; own. By default all but those that offload, and own if there is an --own_factory.
        factory: A function as module:function, which gets the work and returns a LightningModule and a loader. By
            default the reference potential is trained.
        own_factory: The same with the package's own compiled training, which runs without januspipe.
        accelerator: cpu or gpu.
    """
    if rows is None:
        rows = [*_USUAL_ROWS, "own"] if own_factory else [*_USUAL_ROWS]
    if "own" in rows and own_factory is None:
        raise ValueError("the row own needs --own_factory, which makes the module that its package compiles")
    found: dict[RowName, list[StepTimes]] = {name: [] for name in rows}
    warm: dict[RowName, StepTimes] = {}
    for run in range(runs):
        for name in rows:
            title, strategy = _ROWS[name]
            with tempfile.TemporaryDirectory() as cache:
                made_by = own_factory if name == "own" else factory
                job = Job(work, strategy, made_by, accelerator, cache)
                found[name].append(_in_fresh_process(job))
                if run == 0 and (name == "own" or (strategy and "compile" in strategy)):
                    warm[name] = _in_fresh_process(replace(job, work=replace(work, steps=1)))
            print(f"run {run + 1} of {runs}: {title}: {found[name][-1].cpu:.3f} s of CPU time per step", flush=True)
    return _table(found, warm)


def _in_fresh_process(job: Job) -> StepTimes:
    with RankPool(1) as pool:
        (times,) = pool.run(time_steps, job, timeout=7200)
    return times


def _table(found: dict[RowName, list[StepTimes]], warm: dict[RowName, StepTimes]) -> str:
    """Returns a Markdown table; speeds are by CPU time, against the first row, or on GPUs by the time on the clock."""
    is_gpu = any(times[0].gpu is not None for times in found.values())
    columns = [
        *("configuration", "step, CPU (s)", "step (s)", "speed", "kept after FE / FF / BF (MB)", "on the host (MB)"),
        *("compiled in, CPU (s)", "second start, CPU (s)", "last loss"),
        *(("kernels", "longest phase, share of the memory's bandwidth") if is_gpu else ()),
    ]
    lines = [_line(columns), "|---" * len(columns) + "|"]
    first: float | None = None
    of_eager = ""
    for name, times in found.items():
        cpu, wall = (statistics.median(getattr(t, column) for t in times) for column in ("cpu", "wall"))
        counted = wall if is_gpu else cpu
        first = first or counted
        one = times[0]
        kept, on_host, compiling, again = "", "", "", ""
        if one.kept:
            kept, of_eager = _megabytes(one.kept), _megabytes(one.kept_eagerly)
            on_host = f"{one.on_host / 1e6:.1f}"
        if name in warm:
            compiling, again = (f"{t.compiling:.0f}, {t.compiling_cpu:.0f}" for t in (one, warm[name]))
        cells = [_ROWS[name][0], f"{cpu:.3f}", f"{wall:.3f}", f"{first / counted:.2f}", kept, on_host, compiling, again]
        cells.append(f"{times[-1].loss:.6g}")
        if one.gpu is not None:
            cells += [str(one.gpu.num_kernels), one.gpu.describe()]
        lines.append(_line(cells))
    return "\n".join([*lines, *(["", f"Eager phases of the same stage keep {of_eager} MB."] if of_eager else [])])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _megabytes(sizes: tuple[int, ...]) -> str:
    return " / ".join(f"{size / 1e6:.1f}" for size in sizes)
