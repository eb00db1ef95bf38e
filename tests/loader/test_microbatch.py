"""Samples in groups of equal cost."""

from __future__ import annotations

import itertools
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data._utils.pin_memory import pin_memory

from lightning_januspipe.loader import microbatch
from lightning_januspipe.loader.microbatch import MicroBatchCollate, MicroBatches, example_groups, split_samples
from lightning_januspipe.loader.sample_fields import sample_cost

COSTS = st.lists(st.integers(1, 40), min_size=1, max_size=30)


def _samples(costs: list[int]) -> list[dict[str, Any]]:
    return [{"index": i, "x": torch.zeros(c)} for i, c in enumerate(costs)]


@settings(deadline=None, max_examples=50)
@given(COSTS, st.integers(1, 9))
def test_every_sample_once_in_order_and_balanced(costs: list[int], num_groups: int) -> None:
    groups = split_samples(_samples(costs), num_groups)
    indices = [[s["index"] for s in g] for g in groups]
    assert len(groups) == min(num_groups, len(costs)) and all(groups)
    assert sorted(itertools.chain(*indices)) == list(range(len(costs)))
    assert all(g == sorted(g) for g in indices)
    assert [g[0] for g in indices] == sorted(g[0] for g in indices)
    loads = [sum(costs[i] for i in g) for g in indices]
    assert max(loads) - min(loads) <= max(costs)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 20), min_size=3, max_size=7))
def test_largest_first_is_within_its_bound_of_the_best_split(costs: list[int]) -> None:
    num = 3
    loads = [sum(costs[s["index"]] for s in g) for g in split_samples(_samples(costs), num)]
    ways = itertools.product(range(num), repeat=len(costs))
    best = min(max(sum(c for c, g in zip(costs, way, strict=True) if g == k) for k in range(num)) for way in ways)
    assert max(loads) <= (4 / 3 - 1 / (3 * num)) * best + 1e-9


def test_equal_samples_are_shared_out_evenly() -> None:
    assert [len(g) for g in split_samples(_samples([5] * 10), 4)] in ([3, 3, 2, 2],)


def test_fewer_samples_than_groups() -> None:
    assert [[s["index"] for s in g] for g in split_samples(_samples([3, 1]), 8)] == [[0], [1]]


def test_no_samples() -> None:
    with pytest.raises(ValueError, match="without samples cannot be split; check the batch sampler"):
        split_samples([], 4)


class _Graph:
    """Like torch_geometric's Data: its tensors are behind ``to_dict``."""

    def __init__(self, **values: Any) -> None:
        self._store = {"_hidden": values}

    def to_dict(self) -> dict[str, Any]:
        return dict(self._store["_hidden"])


@dataclass
class _Record:
    positions: torch.Tensor
    energy: float


class _Odd:
    """Its ``to_dict`` is something else."""

    def __init__(self) -> None:
        self.positions = np.zeros((5, 3))

    def to_dict(self, path: str) -> None: ...


_Named = namedtuple("_Named", ["nbr_list", "xyz"])


@pytest.mark.parametrize(
    ("sample", "cost"),
    [
        ({"pos": torch.zeros(4, 3), "edge_index": torch.zeros(2, 20)}, 36),
        ({"pos": torch.zeros(4, 3), "edge_index": torch.zeros(2, 0)}, 16),
        ({"_positions": torch.zeros(4, 3), "_idx_i": torch.zeros(9), "_idx_j": torch.zeros(9)}, 25),
        ({"_positions": torch.zeros(4, 3), "_n_atoms": torch.tensor([4]), "_cell": torch.zeros(1, 3, 3)}, 4),
        ({"pos": np.zeros((4, 3)), "name": "a name", "id": 7}, 4),
        (_Graph(pos=torch.zeros(4, 3), edge_index=torch.zeros(2, 5), y=1.0), 21),
        ((_Graph(pos=torch.zeros(4, 3), edge_index=torch.zeros(2, 5)), torch.zeros(3, 3), {"forces": [[0.0]]}), 21),
        (_Record(torch.zeros(2, 3), -1.0), 2),
        (_Named(torch.zeros(6, 2), torch.zeros(3, 3)), 18),
        (_Odd(), 5),
        ((torch.zeros(5), [np.zeros(2), None]), 7),
        (torch.zeros(9), 9),
        (np.zeros((2, 2)), 4),
        ({"kind": _Odd, "x": torch.zeros(2)}, 2),
        (3, 1),
        ({}, 1),
    ],
)
def test_sample_cost(sample: Any, cost: int) -> None:
    """Edges and four for each atom; without edges, atoms; without both, all numbers."""
    assert sample_cost(sample) == cost


def test_atoms_of_ase_count() -> None:
    build = pytest.importorskip("ase.build")
    from ase.calculators.singlepoint import SinglePointCalculator

    small, large = build.bulk("Cu"), build.bulk("Cu").repeat(3)
    large.calc = SinglePointCalculator(large, energy=1.0, forces=np.zeros((27, 3)))
    assert (sample_cost(small), sample_cost(large)) == (1, 27)


def test_collate_uses_the_projects_own_function() -> None:
    collated: list[list[int]] = []

    def collate(samples: list[dict[str, Any]]) -> torch.Tensor:
        collated.append([s["index"] for s in samples])
        return torch.cat([s["x"] for s in samples])

    batches = MicroBatchCollate(collate, 2)(_samples([6, 2, 2, 2]))
    assert collated == [[0], [1, 2, 3]]
    assert batches.num_samples == [1, 3] and len(batches) == 2
    assert [b.numel() for b in batches] == [6, 6]


@settings(deadline=None)
@given(COSTS, st.integers(1, 40))
def test_examples_differ_in_number(costs: list[int], num_typical: int) -> None:
    traced, typical = example_groups(_samples(costs), num_typical)
    assert len(typical) == num_typical and len(traced) in (2, 3) and len(traced) != num_typical
    sizes = [s["x"].numel() for s in typical]
    assert sizes == sorted(sizes)
    assert traced[0]["x"].numel() == max(costs)


def test_examples_are_of_samples_as_they_were() -> None:
    """The first batch carries them, also where collating changes its samples."""

    def collate(samples: list[dict[str, Any]]) -> list[int]:
        return [s.pop("index") for s in samples]

    wrapped = MicroBatchCollate(collate, 2, num_typical=1)
    first, second = wrapped(_samples([1, 2, 3, 4])), wrapped(_samples([1, 2, 3, 4]))
    assert first.batches == second.batches == [[0, 3], [1, 2]]
    assert first.examples == ([3, 2], [2]) and second.examples is None


def test_pinning_reaches_every_micro_batch() -> None:
    class Batch:
        pinned = False

        def pin_memory(self) -> Batch:
            batch = Batch()
            batch.pinned = True
            return batch

    found = pin_memory(MicroBatches([Batch(), {"a": Batch()}], [2, 1]))
    assert isinstance(found, MicroBatches) and found.num_samples == [2, 1]
    assert found.batches[0].pinned and found.batches[1]["a"].pinned


def test_examples_that_one_process_can_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the samples within the limit as usual, or else the smallest ones."""
    samples = _samples([9, 1, 7, 3, 5])
    monkeypatch.setattr(microbatch, "MAX_EXAMPLE", 6.0)
    traced, typical = example_groups(samples, 1, limited=True)
    assert [s["x"].numel() for s in traced] == [5, 3]
    assert [s["x"].numel() for s in typical] == [3]
    monkeypatch.setattr(microbatch, "MAX_EXAMPLE", 0.5)
    traced, typical = example_groups(samples, 1, limited=True)
    assert sorted(s["x"].numel() for s in traced) == [1, 3] and len(typical) == 1
