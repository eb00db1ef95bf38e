"""Fixtures for all tests: one thread, a restored default dtype, an own cache, and a pool of processes for ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch
from pools import pool_of

import __main__
from lightning_januspipe.capture.cache.store import VARIABLE
from lightning_januspipe.testing import RankPool


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Traced potentials are kept for this session only; processes that it starts inherit that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("programs")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _is_a_script() -> None:
    """The program is a file, as ``python -m pytest`` is; the processes of pytest-xdist come from ``python -c``."""
    if not hasattr(__main__, "__file__"):
        __main__.__file__, sys.argv = pytest.__file__, [pytest.__file__]


@pytest.fixture(autouse=True)
def _one_thread_and_default_dtype() -> Iterator[None]:
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)


@pytest.fixture
def float64(_one_thread_and_default_dtype: None) -> None:
    """New tensors are in float64 for the length of the test."""
    torch.set_default_dtype(torch.float64)


@pytest.fixture(scope="session")
def pool() -> Iterator[RankPool]:
    """Up to four ranks over gloo on loopback; ``pool.run(function, ..., world_size=2)``."""
    with pool_of(4) as ranks:
        yield ranks
