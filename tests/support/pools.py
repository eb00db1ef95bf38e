"""Pools whose processes are forked from one that has imported what most ranks need."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_januspipe.testing import RankPool

PRELOADED = (
    "few_refinements",
    "ase.calculators.emt",
    "lightning.pytorch",
    "lightning_januspipe.data",
    "lightning_januspipe.models",
    "lightning_januspipe.strategy.strategy",
    "pytest",
    "torch.export",
    "vesin",
)


def pool_of(size: int) -> RankPool:
    """Returns a pool whose processes start within a fraction of a second, as tests that kill some need them."""
    return RankPool(size, PRELOADED)


class InSessionPool:
    """Has a :class:`~lightning_januspipe.testing.PotentialConformance` use the session's pool of ranks."""

    pool: RankPool | None

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _pool_of_the_session(cls, pool: RankPool) -> Iterator[None]:
        cls.pool = pool
        yield
        cls.pool = None


def slow(*case: object) -> object:
    """Marks a case that takes the path of another one."""
    return pytest.param(*case, marks=pytest.mark.slow)


def state(variable: str) -> tuple[str, str, float]:
    """Returns an environment variable, how processes of this rank start, and a random number of NumPy's."""
    return os.environ.get(variable, ""), multiprocessing.get_start_method(), float(np.random.rand())


def init_twice() -> float:
    """Returns a sum over the ranks, from a second process group after a first."""
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total)
    return float(total)
