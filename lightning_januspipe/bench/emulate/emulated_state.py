"""Holds the sharded state of emulated stages: real collectives of a few bytes, which then take a given time."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.bench.emulate.emulated_stage import EmulationError, sleep_until
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.state_units import all_gather, reduce_scatter
from lightning_januspipe.schedule import StateCosts

_ENTRIES = 8  # of a shard


class _Running:
    """Stands for a collective that a thread waits for."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


class EmulatedState:
    """Gathers and reduces with the ranks that hold the same stages; one collective of a rank follows the other.

    What comes is compared with what the other ranks have sent, so that collectives of two stages or steps cannot meet.

    Args:
        mesh: This rank's process groups.
        costs: The time of the collectives of each stage, in seconds.
    """

    def __init__(self, mesh: Mesh, costs: Mapping[int, StateCosts]) -> None:
        mesh.join_stage_ranks()
        self._group: dist.ProcessGroup | None = mesh.stage_group
        self._size, self._rank, self._costs = len(mesh.stage_ranks), mesh.stage_rank, costs
        self._thread = ThreadPoolExecutor(1)
        self._gathering: dict[int, _Running] = {}
        self._reducing: dict[int, _Running] = {}
        self._there: set[int] = set()
        self.factor, self.step = 0.0, 0

    def unshard(self, stage: int) -> Sequence[_Running]:
        """Starts to gather the parameters of a stage."""
        mine, came = self._label(stage), torch.empty(self._size * _ENTRIES, dtype=torch.float64)
        work = all_gather(came, mine, group=self._group, async_op=True)
        expected = torch.cat([self._label(stage, rank) for rank in range(self._size)])
        self._gathering[stage] = self._started(work, self._costs[stage].gather, came, expected)
        return [self._gathering[stage]]

    def wait_for_parameters(self, stage: int) -> None:
        """Waits for the parameters of a stage, if they are on their way."""
        if stage in self._gathering:
            self._gathering.pop(stage).wait()
            self._there.add(stage)

    def reshard(self, stage: int) -> None:
        """Forgets the parameters of a stage."""
        if stage not in self._there:
            raise EmulationError(f"stage {stage} is released, but its parameters are not there")
        self._there.remove(stage)

    def reduce(self, stage: int) -> Sequence[_Running]:
        """Starts to reduce the gradients of a stage."""
        sent, came = self._label(stage).repeat(self._size), torch.empty(_ENTRIES, dtype=torch.float64)
        work = reduce_scatter(came, sent, group=self._group, async_op=True)
        expected = torch.stack([self._label(stage, rank) for rank in range(self._size)]).sum(0)
        self._reducing[stage] = self._started(work, self._costs[stage].reduce, came, expected)
        return [self._reducing[stage]]

    def finish(self) -> None:
        """Waits for all reductions of the step."""
        while self._reducing:
            self._reducing.popitem()[1].wait()

    def close(self) -> None:
        """Drops the group."""
        self._thread.shutdown(cancel_futures=True)
        self._group = None

    def _label(self, stage: int, rank: int | None = None) -> Tensor:
        values = [float(self.step), float(stage), float(self._rank if rank is None else rank)]
        return torch.tensor([*values, *[1.0] * (_ENTRIES - len(values))], dtype=torch.float64)

    def _started(self, work: Any, seconds: float, came: Tensor, expected: Tensor) -> _Running:
        lasts = seconds * self.factor

        def run() -> None:
            work.wait()
            sleep_until(time.perf_counter() + lasts)
            if came.tolist() != expected.tolist():
                raise EmulationError(f"a collective brought {came.tolist()}, expected {expected.tolist()}")

        return _Running(self._thread.submit(run))
