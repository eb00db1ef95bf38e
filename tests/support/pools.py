"""Pools whose processes are forked from one that has imported what most ranks need."""

from __future__ import annotations

import multiprocessing
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_januspipe.testing import RankPool

PRELOADED = (
    "ase.calculators.emt",
    "lightning.pytorch",
    "lightning_januspipe.data",
    "lightning_januspipe.models",
    "pytest",
    "torch.export",
    "vesin",
)


def pool_of(size: int) -> RankPool:
    """Processes that start within a fraction of a second, as tests that kill some need them."""
    return RankPool(size, PRELOADED)


def slow(*case: object) -> object:
    """A case that takes the path of another one."""
    return pytest.param(*case, marks=pytest.mark.slow)


def state(variable: str) -> tuple[str, str, float]:
    """An environment variable, how processes of this rank start, and a random number of NumPy's."""
    return os.environ.get(variable, ""), multiprocessing.get_start_method(), float(np.random.rand())


def init_twice() -> float:
    """A sum over the ranks, in a second process group after a first."""
    dist.init_process_group("gloo")
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group("gloo")
    total = torch.ones(())
    dist.all_reduce(total)
    return float(total)
