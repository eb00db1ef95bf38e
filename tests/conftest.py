"""Fixtures for all tests: one thread, a restored default dtype, and a pool of processes to run ranks in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from lightning_januspipe.testing import RankPool


@pytest.fixture(autouse=True)
def _one_thread_and_default_dtype() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to four ranks over gloo on loopback; ``pool.run(function, ..., world_size=2)``."""
    with RankPool(4) as ranks:
        yield ranks
