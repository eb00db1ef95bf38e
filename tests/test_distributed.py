"""Errors of waits: which errors are about other ranks, whom a rank blames, and a store that never answers."""

from __future__ import annotations

import json
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_januspipe import distributed
from lightning_januspipe.distributed import PatientStore, waiting
from lightning_januspipe.errors import RankLostError
from lightning_januspipe.testing import RankPool

GLOO = "[/gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:4. Check the logs of the remote worker"


def test_errors_of_users_code_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """In blocks with more than collectives; an error of gloo is known by its text."""
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda group: [2, 5, 7])
    monkeypatch.setattr(dist, "get_rank", lambda group: 1)
    monkeypatch.setattr(distributed._Notes, "missing", lambda self, others: ([7], True))
    with pytest.raises(RuntimeError, match="^no such table$"), waiting("a step", mixed=True):
        raise RuntimeError("no such table")
    with pytest.raises(torch.OutOfMemoryError), waiting("a reduction"):
        raise torch.OutOfMemoryError("full")
    for mixed in (True, False):
        with pytest.raises(RankLostError) as caught, waiting("a reduction", mixed=mixed):
            raise RuntimeError(GLOO)
        assert str(caught.value) == (
            "global rank 5 waited 0.0 s for global rank 7, which did not come (a reduction): Connection closed by peer "
            "[127.0.0.1]:4. That rank has ended or hangs; its own output has the cause."
        )


@pytest.mark.parametrize(
    ("notes", "missing"),
    [
        ({}, [1]),
        ({1: ("x", [0, 2])}, [2]),
        ({1: ("x", [2]), 2: ("y", [3, 4]), 3: ("z", [1])}, [4]),
        ({1: ("x", [0]), 5: ("y", [6])}, []),
    ],
)
def test_blame_follows_who_waits_for_whom(
    monkeypatch: pytest.MonkeyPatch, notes: dict[int, tuple[str, list[int]]], missing: list[int]
) -> None:
    store: Any = dist.HashStore()
    for rank, note in notes.items():
        store.set(distributed._note_of(rank), json.dumps(note))
    monkeypatch.setattr(distributed, "_shared_store", lambda: store)
    monkeypatch.setattr(distributed, "NOTES_TIME", 0.3)
    assert distributed._Notes(0, "here").missing([1]) == (missing, True)


def different_waits() -> str:
    """Rank 0 waits in a barrier for rank 1, which waits in another one for it."""
    dist.init_process_group("gloo")
    groups = [dist.new_group(timeout=timedelta(seconds=1)) for _ in range(2)]
    try:
        rank = dist.get_rank()
        with waiting(f"barrier {rank}", groups[rank]):
            dist.barrier(groups[rank])
    except RankLostError as error:
        return str(error)
    return ""


def test_ranks_that_wait_for_one_another(pool: RankPool) -> None:
    for rank, said in enumerate(pool.run(different_waits, world_size=2)):
        assert f"but all of them wait, too: global rank {1 - rank} in barrier {1 - rank}" in said
        assert "The ranks do not take the same steps" in said


class Silent:
    """A store that is held by a rank that hangs."""

    def check(self, keys: list[str]) -> bool:
        time.sleep(30)
        return True


def test_a_store_that_does_not_answer() -> None:
    began, store = time.monotonic(), PatientStore(Silent(), patience=0.2)
    for _ in range(3):
        with pytest.raises(RuntimeError, match="does not answer"):
            store.check(["x"])
    assert time.monotonic() - began < 5
    answering = PatientStore(dist.HashStore())
    answering.set("x", "1")
    assert answering.get("x") == b"1" and answering.check(["x"]) and answering.add("n", 2) == 2
