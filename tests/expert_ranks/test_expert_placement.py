"""Experts are placed so that ranks get about equal numbers of rows, and move only where it pays."""

from __future__ import annotations

import pytest

from lightning_januspipe.expert_ranks.expert_costs import DECLARED, ExpertCosts, RowCost
from lightning_januspipe.expert_ranks.expert_placement import (
    ExpertPlacement,
    balanced_order,
    best_guests,
    num_moved,
    rows_of_ranks,
)

MOVE, GUEST = DECLARED.move.each, DECLARED.guest.each


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_each_expert_has_a_place_and_the_largest_are_apart(num_ranks: int) -> None:
    load = [50, 40, 30, 5, 4, 3, 2]
    order = balanced_order(load, num_ranks, range(len(load)))
    assert sorted(order) == list(range(len(load)))
    assert max(rows_of_ranks(load, order, num_ranks)) < max(rows_of_ranks(load, range(len(load)), num_ranks))
    if num_ranks == 3:
        assert max(rows_of_ranks(load, order, 3)) < 60


def test_what_is_balanced_stays() -> None:
    load = [9, 1, 8, 2]
    order = balanced_order(load, 2, [0, 1, 2, 3])
    assert num_moved([0, 1, 2, 3], order, 2) == 0 and order == [0, 1, 2, 3]
    assert num_moved([0, 1, 2, 3], [0, 2, 1, 3], 2) == 2


def test_experts_move_once_the_lost_rows_cost_as_much() -> None:
    placement = ExpertPlacement(4, 2)
    load = [30, 30, 0, 0]  # a better order saves 30 rows in each step, and moves two experts
    steps = next(step for step in range(1, 100) if placement.see(load))
    assert steps == -(-2 * MOVE // 30) and placement.num_moves == 2
    assert rows_of_ranks(load, placement.order, 2) == [30, 30]
    assert not any(placement.see(load) for _ in range(50))


def test_experts_are_copied_where_that_costs_less_than_the_rows_that_wait() -> None:
    load, order = [10 * GUEST, 3 * GUEST, 0, GUEST], [0, 1, 2, 3]
    found = best_guests(load, order, 2, DECLARED.guest)
    (guest,) = found.guests
    assert (guest.expert, guest.rank) == (0, 1) and found.slowest == sum(load) // 2
    assert best_guests([GUEST, 0, 0, 0], order, 2, DECLARED.guest).guests == ()  # a copy would save half of its cost
    assert best_guests([0, 0, 0, 0], order, 2, DECLARED.guest).guests == ()
    one = best_guests(
        [8 * GUEST, 0, 0, 0], order, 4, DECLARED.guest
    )  # from one rank to all, but the fourth saves too little
    assert {r.rank for r in one.guests} == {1, 2, 3} and one.slowest == 2 * GUEST


def test_experts_do_not_move_where_a_copy_is_enough() -> None:
    placement = ExpertPlacement(4, 2)
    load = [1000, 1000, 0, 0]
    assert placement.see(load) and not ExpertPlacement(4, 2).see([300, 300, 0, 0], has_guests=True)


def test_what_a_change_costs_once_is_shared_by_its_experts() -> None:
    load, order = [900, 0, 0], [0, 1, 2]  # two guests save 600 rows, one saves 300
    assert len(best_guests(load, order, 3, RowCost(390, 100)).guests) == 2
    assert best_guests(load, order, 3, RowCost(410, 100)).guests == ()
    placement = ExpertPlacement(4, 2, ExpertCosts(RowCost(100, 10), RowCost(0, 0)))
    assert next(step for step in range(1, 100) if placement.see([30, 30, 0, 0])) == -(-(100 + 2 * 10) // 30)
