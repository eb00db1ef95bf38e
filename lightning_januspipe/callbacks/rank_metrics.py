"""Computes the numbers of a recorded step: one rank's own, which all ranks exchange, and the metrics of the mesh."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields

import torch
import torch.distributed as dist

from lightning_januspipe.distributed import waiting
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.runtime.step_recorder import RankStep
from lightning_januspipe.schedule import Phase
from lightning_januspipe.schedule.actions import COMPUTED_PHASES

PREFIX = "januspipe/"

_PHASES = COMPUTED_PHASES
_NUM_SCALARS = 8  # the first fields, which are numbers


@dataclass(frozen=True)
class RankNumbers:
    """Holds the measurements of one rank; nan where there is none.

    Attributes:
        seconds: Seconds that the batches since the previous numbers took.
        atoms: Number of atoms in these batches.
        structures: Number of structures in these batches.
        start: Start of the rank's first action in the recorded step, in seconds on the clock of its pipeline.
        end: End of the rank's last action.
        busy: Seconds that the rank's actions took.
        bytes_sent: Bytes that the rank sent to other stages in the recorded step.
        peak_memory: The most bytes that the rank held.
        phases: Mean seconds of an action, by stage and phase.
        microbatches: Seconds of the rank's actions for each micro-batch.
    """

    seconds: float = math.nan
    atoms: float = math.nan
    structures: float = math.nan
    start: float = math.nan
    end: float = math.nan
    busy: float = math.nan
    bytes_sent: float = math.nan
    peak_memory: float = math.nan
    phases: Mapping[tuple[int, Phase], float] = field(default_factory=dict)
    microbatches: Sequence[float] = ()

    @classmethod
    def of_step(cls, own: RankStep | None, measured: tuple[float, int, int], peak_memory: float | None) -> RankNumbers:
        """Returns the numbers of a recorded step.

        Args:
            own: This rank's part of the step; None if no step was recorded.
            measured: Seconds, atoms and structures of the batches since the previous numbers.
            peak_memory: The most bytes that the rank held; None if that is not known.
        """
        seconds, atoms, structures = measured
        peak = math.nan if peak_memory is None else float(peak_memory)
        if own is None or not own.spans:
            return cls(seconds or math.nan, atoms, structures, peak_memory=peak)
        sums: dict[tuple[int, Phase], list[float]] = {}
        microbatches = [0.0] * (1 + max(s.action.microbatch for s in own.spans))
        for span in own.spans:
            taken = span.end - span.start
            microbatches[span.action.microbatch] += taken
            if own.schedule is not None:
                sums.setdefault((span.action.stage, span.action.phase), []).append(taken)
        return cls(
            seconds or math.nan,
            atoms,
            structures,
            min(s.start for s in own.spans),
            max(s.end for s in own.spans),
            math.fsum(microbatches),
            math.nan if own.schedule is None else float(own.bytes_sent),
            peak,
            {key: math.fsum(times) / len(times) for key, times in sums.items()},
            microbatches,
        )

    def vector(self, num_stages: int, num_microbatches: int) -> list[float]:
        """Returns all numbers in a list whose length depends on the arguments only."""
        scalars = [self.seconds, self.atoms, self.structures, self.start, self.end, self.busy]
        phases = [self.phases.get((s, p), math.nan) for s in range(num_stages) for p in _PHASES]
        padding = [math.nan] * (num_microbatches - len(self.microbatches))
        return [*scalars, self.bytes_sent, self.peak_memory, *phases, *self.microbatches, *padding]

    @classmethod
    def from_vector(cls, values: Sequence[float], num_stages: int) -> RankNumbers:
        """Returns the numbers that :meth:`vector` put in a list."""
        first = _NUM_SCALARS + num_stages * len(_PHASES)
        keys = [(s, p) for s in range(num_stages) for p in _PHASES]
        phases = {k: v for k, v in zip(keys, values[_NUM_SCALARS:first], strict=True) if not math.isnan(v)}
        scalars = (f.name for f in fields(cls)[:_NUM_SCALARS])
        measured = dict(zip(scalars, values[:_NUM_SCALARS], strict=True))
        return cls(**measured, phases=phases, microbatches=[v for v in values[first:] if not math.isnan(v)])


def exchanged(
    mine: RankNumbers, num_stages: int, num_microbatches: int, group: dist.ProcessGroup | None
) -> list[RankNumbers]:
    """Returns the numbers of all ranks, by global rank; a single collective over all ranks.

    Args:
        mine: The numbers of this rank.
        num_stages: Number of stages of the pipeline.
        num_microbatches: The largest number of micro-batches of a step.
        group: All ranks, with a backend for the CPU; None if there is one.
    """
    vector = torch.tensor(mine.vector(num_stages, num_microbatches), dtype=torch.float64)
    found = [vector]
    if group is not None:
        found = [torch.empty_like(vector) for _ in range(dist.get_world_size(group))]
        with waiting("gathering of the ranks' numbers", group):
            dist.all_gather(found, vector, group=group)
    return [RankNumbers.from_vector(v.tolist(), num_stages) for v in found]


def metrics(numbers: Sequence[RankNumbers], shape: MeshShape) -> dict[str, float]:
    """Returns the metrics of the whole mesh by name, without metrics that are not known.

    Args:
        numbers: The numbers of all ranks, by global rank.
        shape: Sizes of the mesh.
    """
    replicas = [[numbers[shape.rank(p, d, 0)] for p in range(shape.pipeline)] for d in range(shape.data)]
    found: dict[str, float] = {}
    seconds = _known(n.seconds for n in numbers)
    if seconds:
        found["atoms_per_s"] = sum(r[0].atoms for r in replicas) / max(seconds)
        found["structures_per_s"] = sum(r[0].structures for r in replicas) / max(seconds)
    makespans = [max(n.end for n in r) - min(n.start for n in r) for r in replicas]
    if not any(math.isnan(m) for m in makespans):
        slowest = replicas[makespans.index(max(makespans))]
        found["step_ms"] = 1e3 * max(makespans)
        if shape.pipeline > 1:
            found["bubble_fraction"] = max(0.0, 1.0 - max(n.busy for n in slowest) / max(makespans))
            for rank, of_rank in enumerate(slowest):
                found[f"bubble_fraction/rank{rank}"] = max(0.0, 1.0 - of_rank.busy / max(makespans))
        found["microbatch_imbalance"] = max(_imbalance(_totals(r)) for r in replicas)
        if shape.data > 1:
            found["replica_imbalance"] = _imbalance(makespans)
    for key in sorted({k for n in numbers for k in n.phases}, key=lambda k: (k[0], _PHASES.index(k[1]))):
        times = [n.phases[key] for n in numbers if key in n.phases]
        found[f"{key[1].value}_ms/stage{key[0]}"] = 1e3 * math.fsum(times) / len(times)
    if sent := _known(n.bytes_sent for n in numbers):
        found["message_bytes"] = math.fsum(sent)
    for rank in range(shape.pipeline):
        if held := _known(n.peak_memory for i, n in enumerate(numbers) if shape.coordinates(i)[0] == rank):
            found[f"peak_memory_bytes/rank{rank}"] = max(held)
    return {PREFIX + name: value for name, value in found.items()}


def _known(values: Iterable[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]


def _totals(replica: Sequence[RankNumbers]) -> list[float]:
    """Returns the seconds of each micro-batch, summed over the ranks of a pipeline."""
    return [math.fsum(times) for times in zip(*(n.microbatches for n in replica), strict=True)]


def _imbalance(times: Sequence[float]) -> float:
    """Returns the longest time over the mean time."""
    return max(times) * len(times) / math.fsum(times)
