"""Owners of atoms chosen in the loader, from batches of any form."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from capture_models import make_batch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_januspipe.graph.owners_in_loader import OwnersInLoader, owners_by_name
from lightning_januspipe.graph.partition import partition_atoms
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.split import split_batches

BATCH = make_batch((9, 4))
POSITIONS, EDGES = BATCH["positions"], BATCH["edges"]
SOURCE, TARGET = EDGES
EXPECTED = partition_atoms(TARGET, SOURCE, 13, 2, POSITIONS)


@pytest.mark.parametrize(
    "batch",
    [
        {"edge_index": EDGES, "pos": POSITIONS},
        {"neighbor_list": EDGES.T, "R": POSITIONS, "R_free": POSITIONS.repeat(2, 1)},
        {"_idx_i": TARGET, "_idx_j": SOURCE, "_positions": POSITIONS, "_idx_m": torch.zeros(13)},
        {"edge_src": SOURCE, "edge_dst": TARGET, "coords": POSITIONS},
        (SimpleNamespace(edge_index=EDGES, pos=POSITIONS), [SimpleNamespace(pbc=torch.zeros(3))], None),
    ],
    ids=["pairs", "columns", "lists", "ends", "objects in a tuple"],
)
def test_edges_and_positions_are_found_by_their_names(batch: Any) -> None:
    found = owners_by_name(batch, 2)
    assert found is not None and 0 < int(found.sum()) < 13
    torch.testing.assert_close(found, EXPECTED)


@pytest.mark.parametrize(
    "batch",
    [
        {"a": EDGES, "b": POSITIONS},
        {"edge_index": EDGES},
        {"pos": POSITIONS},
        {"edge_index": EDGES.double(), "pos": POSITIONS},
        {"edge_index": EDGES + 9, "pos": POSITIONS},
        {"edge_index": EDGES - 1, "pos": POSITIONS},
        {"edge_index": EDGES.to_sparse(), "pos": POSITIONS},
        {"edge_index": EDGES.to("meta"), "pos": POSITIONS},
        {"edge_index": torch.nested.nested_tensor([SOURCE, TARGET]), "pos": POSITIONS},
        {"edge_index": EDGES.to(torch.uint16), "pos": POSITIONS},
    ],
    ids=[
        *("other names", "no positions", "no edges", "features of edges", "too large", "negative"),
        *("sparse", "on no device", "nested", "unsigned"),
    ],
)
def test_nothing_is_guessed(batch: Any) -> None:
    assert owners_by_name(batch, 2) is None


def test_no_edges_at_all() -> None:
    found = owners_by_name({"edge_index": EDGES[:, :0], "pos": POSITIONS}, 2)
    assert found is not None and found.tolist().count(0) in (6, 7)


def as_it_is(samples: list[Any]) -> dict[str, Tensor]:
    return {"edge_index": EDGES, "pos": POSITIONS, "samples": torch.tensor(samples)}


@pytest.mark.parametrize(("num_workers", "is_turn"), [(0, [False] * 5), (1, [False, True, False, False, True])])
def test_ranks_take_turns_in_the_loaders_workers(num_workers: int, is_turn: list[bool]) -> None:
    loader: Any = DataLoader(list(range(5)), 5, num_workers=num_workers, collate_fn=as_it_is)  # type: ignore[arg-type]
    (batch,) = split_batches(loader, 5, True, OwnersInLoader(2, rank=1, size=3))
    assert isinstance(batch, MicroBatches)
    assert [owners is not None for owners in batch.owners] == is_turn
    for owners in batch.owners:
        assert owners is None or torch.equal(owners, EXPECTED)
