"""Times training steps of several configurations on the same work, and compares their gradients.

Every configuration runs in fresh processes with one thread each. Runs of the configurations alternate, so that other
programs on the machine slow all of them alike. Medians over the runs are printed, and ratios of the medians.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lightning_januspipe.bench.work import Work, trainer_of
from lightning_januspipe.runtime.planner import is_unfolded
from lightning_januspipe.schedule.build_schedule import GENERATORS, ScheduleName
from lightning_januspipe.testing import RankPool

_WARM_UP = 5


@dataclass(frozen=True)
class RunTiming:
    """Holds one rank's measurement of one run.

    Attributes:
        step: Median seconds of an optimizer step.
        cpu: Median CPU time of one in seconds, which other programs on the machine change little.
        loss: Loss of the last step, which shows that the work was the same.
        memory: Peak resident memory above what the process had before training, in bytes.
        predicted: Simulated seconds of the phases of each timed step, where steps were recorded.
        recorded: Seconds that these steps took.
    """

    step: float
    cpu: float
    loss: float
    memory: int
    predicted: list[float]
    recorded: list[float]


def run_once(work: Work, strategy: dict[str, Any] | None, record: bool = False) -> RunTiming:
    """Trains for a few steps on this rank.

    Args:
        work: Model, data and number of steps, the same for every configuration.
        strategy: Arguments of the strategy; None for plain Lightning.
        record: Whether the timed steps are compared with their simulation.
    """
    import lightning
    import numpy as np

    torch.set_num_threads(1)
    dtype = torch.float64 if work.dtype == "float64" else torch.float32
    torch.set_default_dtype(dtype)
    module, loader = module_and_loader(work, dtype, energy_weight=1.0)
    times: list[float] = []
    cpu_times: list[float] = []
    losses: list[float] = []
    predicted: list[float] = []
    recorded: list[float] = []

    class Clock(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            if record and len(times) >= _WARM_UP:
                trainer.strategy.runner.record_next_step()
            trainer.strategy.barrier()
            self._began, self._cpu_began = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
            trainer.strategy.barrier()
            times.append(time.perf_counter() - self._began)
            cpu_times.append(time.process_time() - self._cpu_began)
            losses.append(float(outputs["loss"]))
            if record and len(times) > _WARM_UP:
                step = trainer.strategy.runner.recorded_step()
                predicted.append(step.predicted.makespan)
                recorded.append(step.recorded.makespan)

    trainer = trainer_of(strategy, work.steps + _WARM_UP, Clock())
    np.random.seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trainer.fit(module, loader)
    memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    step, cpu = (statistics.median(values[_WARM_UP:]) for values in (times, cpu_times))
    return RunTiming(step, cpu, losses[-1], memory, predicted, recorded)


def module_and_loader(work: Work, dtype: torch.dtype, energy_weight: float) -> tuple[Any, Any]:
    """Returns the seeded module in the default dtype, and a loader of two batches in ``dtype``."""
    from lightning_januspipe.data import StructureDataset, collate_structures, emt_structures
    from lightning_januspipe.models import PotentialModule

    torch.manual_seed(0)
    size = work.batch_size * 2
    structures: Any = work.data or emt_structures(size, sizes=(work.num_atoms,), vacancy_probability=0.0, seed=0)
    dataset = StructureDataset(structures, cutoff=work.cutoff, dtype=dtype)
    samples = [dataset[i % len(dataset)] for i in range(size)]
    potential = work.potential(torch.utils.data.Subset(dataset, range(min(size, len(dataset)))), dataset.species)
    module = PotentialModule(potential, energy_weight=energy_weight, force_weight=1.0)
    loader: Any = torch.utils.data.DataLoader(
        _Samples(samples), batch_size=work.batch_size, collate_fn=collate_structures
    )
    return module, loader


class _Samples(torch.utils.data.Dataset[Any]):
    def __init__(self, samples: list[Any]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Any:
        return self._samples[index]


@dataclass(frozen=True)
class Configuration:
    """Holds the medians of one configuration over its runs; times in seconds, memory and CPU time of each rank."""

    name: str
    step: float
    steps: list[float]
    cpu: list[float]
    memory: list[int]
    loss: float


def time_configurations(
    configurations: dict[str, tuple[int, dict[str, Any] | None]],
    work: Work,
    runs: int,
) -> list[Configuration]:
    """Runs every configuration ``runs`` times, in turn, and prints a line after each run.

    Args:
        configurations: By name the number of ranks and the arguments of the strategy, or None for plain Lightning.
        work: The work of each configuration.
        runs: Number of runs of each.
    """
    found: dict[str, list[list[RunTiming]]] = {name: [] for name in configurations}
    for run in range(runs):
        for name, (ranks, strategy) in configurations.items():
            with RankPool(ranks) as pool:
                found[name].append(pool.run(run_once, work, strategy, timeout=1800))
            print(f"run {run + 1} of {runs}: {name}: {found[name][-1][0].step:.3f} s per step")
    rows = []
    for name, results in found.items():
        steps = [max(t.step for t in ranks) for ranks in results]
        of_rank = list(zip(*results, strict=True))
        memory = [max(timing.memory for timing in timings) for timings in of_rank]
        cpu = [statistics.median(timing.cpu for timing in timings) for timings in of_rank]
        rows.append(Configuration(name, statistics.median(steps), steps, cpu, memory, results[-1][0].loss))
    return rows


def timing_table(rows: list[Configuration]) -> str:
    """Returns a Markdown table; speeds are against the first row."""
    first = rows[0]
    lines = [
        "| configuration | step, median (s) | range (s) | speed | CPU time per rank (s) | peak memory per rank (MB) "
        "| last loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        memory, cpu = ", ".join(f"{m / 1e6:.0f}" for m in row.memory), ", ".join(f"{c:.3f}" for c in row.cpu)
        lines.append(
            f"| {row.name} | {row.step:.3f} | {min(row.steps):.3f} to {max(row.steps):.3f} "
            f"| {first.step / row.step:.2f} | {cpu} | {memory} | {row.loss:.6g} |"
        )
    return "\n".join(lines)


def single_process(work: Work, runs: int = 5) -> str:
    """Times one process with the strategy against plain Lightning, on the whole batch at once."""
    return timing_table(
        time_configurations({"plain Lightning": (1, None), "januspipe, one process": (1, {})}, work, runs)
    )


def two_ranks(work: Work, runs: int = 5, schedules: list[ScheduleName] | None = None, compile: bool = False) -> str:
    """Times two ranks with each schedule against one rank, with one structure in a micro-batch.

    Args:
        work: The work of each configuration.
        runs: Number of runs of each.
        schedules: The schedules; by default all that have such phases.
        compile: Compile all phases before the first step.
    """
    split = _split(work, compile)
    return timing_table(
        time_configurations(
            {
                "one rank": (1, split),
                **{f"two ranks, {n}": (2, {**split, "schedule": n}) for n in _schedules(schedules, compile)},
            },
            work,
            runs,
        )
    )


def contention(work: Work, runs: int = 5) -> str:
    """Times two replicas, which do twice the work of one rank, and so shows what sharing the machine costs."""
    split = {"num_microbatches": work.batch_size}
    replicas = {**split, "pipeline_size": 1, "data_size": 2}
    return timing_table(
        time_configurations({"one rank": (1, split), "two replicas, twice the work": (2, replicas)}, work, runs)
    )


def simulation(work: Work, runs: int = 5, schedules: list[ScheduleName] | None = None, compile: bool = False) -> str:
    """Times steps of two ranks against their simulation, which has the phase times of earlier steps of the run.

    Args:
        work: The work of each configuration.
        runs: Number of runs of each.
        schedules: The schedules; by default all that have such phases.
        compile: Compile all phases before the first step.
    """
    lines = ["| schedule | simulated (s) | recorded, median (s) | difference | range |", "|---|---|---|---|---|"]
    for name in _schedules(schedules, compile):
        predicted, recorded = [], []
        for _ in range(runs):
            with RankPool(2) as pool:
                strategy = {**_split(work, compile), "schedule": name}
                timing = pool.run(run_once, work, strategy, True, timeout=1800)[0]
            predicted += timing.predicted
            recorded += timing.recorded
        errors = [100 * (real / simulated - 1) for real, simulated in zip(recorded, predicted, strict=True)]
        lines.append(
            f"| {name} | {statistics.median(predicted):.3f} | {statistics.median(recorded):.3f} "
            f"| {statistics.median(errors):+.1f} % | {min(errors):+.1f} to {max(errors):+.1f} % |"
        )
    return "\n".join(lines)


def _split(work: Work, compile: bool) -> dict[str, Any]:
    """Returns the arguments of a strategy with one structure in a micro-batch."""
    return {"num_microbatches": work.batch_size, "compile": compile}


def _schedules(names: list[ScheduleName] | None, compile: bool) -> list[str]:
    """Returns the schedules to run, by default all that there are for such phases."""
    usual = [name for name in reversed(list(GENERATORS)) if not (compile and is_unfolded(name))]
    return usual if names is None else list(names)


@dataclass(frozen=True)
class StepGradients:
    """Holds the result of one rank's first step.

    Attributes:
        gradients: Gradients of the parameters that the rank trains, by name, in float64.
        message_bytes: Bytes that it sent to other ranks in the step.
    """

    gradients: dict[str, torch.Tensor]
    message_bytes: int


def gradients_once(work: Work, strategy: dict[str, Any], precision: str) -> StepGradients:
    """Returns the parameter gradients of a force loss, of the same weights and structures in any precision.

    Args:
        work: Model, data and number of steps, the same for every configuration.
        strategy: Arguments of the strategy.
        precision: Precision of the Trainer, as in ``bf16-mixed``.
    """
    import lightning

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    dtype = torch.float64 if precision == "64-true" else torch.float32
    module, loader = module_and_loader(work, dtype, energy_weight=0.0)
    module = module.float().to(dtype)  # the weights are those that float32 has
    torch.set_default_dtype(torch.float32)
    found: list[StepGradients] = []

    class Keep(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
            runner = trainer.strategy.runner
            held = [(n, p) for n, p in module.named_parameters() if runner.parameters.holds(p)]
            whole = runner.parameters.gradients()
            gradients = {n: g.detach().double() for n, p in held if (g := whole.get(p)) is not None}
            found.append(StepGradients(gradients, runner.bytes_sent))

    trainer_of(strategy, 1, Keep(), precision=precision).fit(module, loader)
    return found[0]


def gradient_errors(
    gradients: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """Returns the relative error of the whole gradient, and that of the worst parameter relative to its own gradient.

    Args:
        gradients: Gradients by the names of parameters.
        reference: The same in float64.
    """
    norm = sum(float(g.square().sum()) for g in reference.values()) ** 0.5
    errors = {n: float((gradients[n] - g).norm()) for n, g in reference.items()}
    worst = max(e / max(float(reference[n].norm()), 1e-3 * norm) for n, e in errors.items())
    return sum(e**2 for e in errors.values()) ** 0.5 / norm, worst


def messages(work: Work, runs: int = 1) -> str:
    """Shows errors of the gradients of a force loss in several precisions, and with messages in bfloat16."""
    split = {"num_microbatches": work.batch_size, "schedule": "wavek"}
    rounded = {**split, "message_dtype": "bf16"}
    configurations: dict[str, tuple[int, dict[str, Any], str]] = {
        "float32, one rank": (1, split, "32-true"),
        **{f"float32, {n} ranks": (n, split, "32-true") for n in (2, 4)},
        **{f"float32, {n} ranks, messages in bf16": (n, rounded, "32-true") for n in (2, 4)},
        "bf16-mixed, one rank": (1, split, "bf16-mixed"),
        **{f"bf16-mixed, {n} ranks": (n, split, "bf16-mixed") for n in (2, 4)},
    }

    def joined(ranks: int, strategy: dict[str, Any], precision: str) -> tuple[dict[str, torch.Tensor], int]:
        with RankPool(ranks) as pool:
            found = pool.run(gradients_once, work, strategy, precision, timeout=1800)
        return {n: g for rank in found for n, g in rank.gradients.items()}, sum(rank.message_bytes for rank in found)

    reference, _ = joined(1, split, "64-true")
    lines = [
        "| configuration | relative error of the gradient | of its worst parameter | messages (MB) |",
        "|---|---|---|---|",
    ]
    for name, (ranks, strategy, precision) in configurations.items():
        gradients, sent = joined(ranks, strategy, precision)
        whole, worst = gradient_errors(gradients, reference)
        lines.append(f"| {name} | {whole:.1e} | {worst:.1e} | {sent / 1e6:.2f} |")
    return "\n".join(lines)
