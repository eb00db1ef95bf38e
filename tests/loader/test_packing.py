"""Samples in groups of equal work."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_januspipe.loader.packing import ATOM_WEIGHT, imbalance, pack_samples, plan, work

COSTS = st.lists(st.integers(0, 60), min_size=1, max_size=30)


def _loads(costs: list[float], groups: list[list[int]]) -> list[float]:
    return [sum(costs[i] for i in group) for group in groups]


def _long_tailed(num: int, seed: int = 0) -> list[float]:
    numbers = random.Random(seed)
    return [min(numbers.paretovariate(1.1) * 50, 900.0) for _ in range(num)]


@settings(deadline=None)
@given(COSTS, st.integers(1, 9), st.integers(0, 3))
def test_each_sample_once_and_every_bin_its_share(costs: list[float], num_bins: int, at_least: int) -> None:
    groups = pack_samples(costs, num_bins, at_least)
    assert len(groups) == num_bins and sorted(itertools.chain(*groups)) == list(range(len(costs)))
    assert all(group == sorted(group) for group in groups)
    if len(costs) >= num_bins * at_least:
        assert min(map(len, groups)) >= at_least
    assert pack_samples(costs, num_bins, at_least) == groups


@settings(deadline=None)
@given(COSTS, st.integers(2, 6))
def test_no_single_exchange_lowers_the_fullest_bin(costs: list[float], num_bins: int) -> None:
    groups = pack_samples(costs, num_bins)
    loads = _loads(costs, groups)
    top = max(range(num_bins), key=loads.__getitem__)
    for other, i in itertools.product(range(num_bins), groups[top]):
        its = [0, *(costs[j] for j in groups[other])] if len(groups[top]) > 1 else [costs[j] for j in groups[other]]
        if other != top:
            for cost in its:
                change = costs[i] - cost
                assert max(loads[top] - change, loads[other] + change) >= loads[top] * (1 - 1e-3)


def test_exchanges_improve_on_largest_first() -> None:
    costs = [5.0, 5, 4, 4, 3, 3, 3]  # largest first gives 11, 8 and 8
    assert imbalance(costs, pack_samples(costs, 3)) == pytest.approx(1)


def test_large_numbers_of_samples_are_packed_well_and_soon() -> None:
    costs = _long_tailed(10_000)
    began = time.perf_counter()
    groups = pack_samples(costs, 64)
    assert time.perf_counter() - began < 3
    assert imbalance(costs, groups) < 1.001


@settings(deadline=None)
@given(st.lists(st.integers(1, 60), min_size=4, max_size=60), st.integers(1, 4), st.integers(1, 6))
def test_plan_of_all_replicas(costs: list[float], num_replicas: int, num_groups: int) -> None:
    dealt = plan(costs, num_replicas, num_groups)
    assert sorted(i for mine in dealt for group in mine for i in group) == list(range(len(costs)))
    expected = min(num_groups, len(costs) // num_replicas)
    assert [len(mine) for mine in dealt] == [expected] * num_replicas
    assert all(group for mine in dealt for group in mine)
    for mine in dealt:
        loads = _loads(costs, mine)
        assert loads == sorted(loads)


def test_replicas_get_equal_sums() -> None:
    for seed in range(20):
        costs = _long_tailed(64, seed)
        dealt = plan(costs, 4, 4)
        assert imbalance(costs, [[i for group in mine for i in group] for mine in dealt]) < 1.05
        loads = _loads(costs, [group for mine in dealt for group in mine])
        assert max(loads) <= 1.05 * max(sum(loads) / len(loads), max(costs))


def test_one_giant_leaves_little_else_to_its_replica() -> None:
    (*rest, giant), other = plan([100.0] + [1.0] * 31, 2, 4)
    assert giant == [0] and [len(g) for g in rest] == [1, 1, 1] and [len(g) for g in other] == [7, 7, 7, 7]


def test_what_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="num_bins=0"):
        pack_samples([1.0], 0)
    with pytest.raises(ValueError, match="cost of a sample is nan; expected a number >= 0"):
        pack_samples([1.0, float("nan")], 2)
    with pytest.raises(ValueError, match="1 samples for 2 replicas"):
        plan([1.0], 2, 1)


def test_work() -> None:
    assert work(3, 10) == 10 + 3 * ATOM_WEIGHT
    assert (work(3, None), work(None, 10), work(None, None)) == (3, 10, None)
