"""Shares the cores of a machine evenly among the ranks that may run on them."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

from lightning_januspipe.distributed import waiting

VARIABLE = "OMP_NUM_THREADS"

Place = tuple[str, frozenset[int]]
"""The machine of a rank, and the cores that it may run on."""


def share_cores(group: dist.ProcessGroup | None, rank: int, world_size: int) -> None:
    """Gives this rank its share of the cores as threads, unless OMP_NUM_THREADS is set or it has fewer already.

    All ranks call this. Processes that this one starts later, such as workers of loaders, get the same.

    Args:
        group: All ranks, on the host.
        rank: This rank.
        world_size: The number of ranks.
    """
    places: list[Place | None] = [None] * world_size
    with waiting("comparison of the ranks' cores", group):
        dist.all_gather_object(places, (socket.gethostname(), _cores()), group=group)
    if VARIABLE not in os.environ:
        known = [place for place in places if place is not None]
        num_threads = min(threads_of(known[rank], known), torch.get_num_threads())
        torch.set_num_threads(num_threads)
        os.environ[VARIABLE] = str(num_threads)


def threads_of(mine: Place, places: Sequence[Place]) -> int:
    """Returns the share of a rank: each core counts for as many parts as there are ranks that may run on it.

    Args:
        mine: The place of the rank.
        places: The places of all ranks.
    """
    host, cores = mine
    neighbours = [others for machine, others in places if machine == host]
    return max(1, int(sum(1 / sum(core in others for others in neighbours) for core in cores) + 1e-6))


def _cores() -> frozenset[int]:
    try:
        return frozenset(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return frozenset(range(os.cpu_count() or 1))
