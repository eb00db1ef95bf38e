"""What stages keep within a memory limit: the predicted step is as short as it can be."""

from __future__ import annotations

import itertools

import pytest

from lightning_januspipe.capture import ActivationCosts
from lightning_januspipe.runtime.chosen_activations import ChosenActivations, choose_activations
from lightning_januspipe.runtime.graph_rank_activations import most_of
from lightning_januspipe.runtime.planner import Planner
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts

MANY, FEW = MemoryCosts(80.0, 60.0, 40.0), MemoryCosts(1.0, 1.0, 1.0)


def measured(
    num_stages: int = 2, slower: float = 1.5, many: tuple[MemoryCosts, ...] = ()
) -> dict[str, ActivationCosts]:
    """Returns an activation that is fast and keeps much, and one that keeps little."""
    fast, slow = (PhaseCosts(s * 1.0, s * 1.5, s * 2.0, s * 1.5) for s in (1.0, slower))
    return {
        "pointwise": ActivationCosts((fast,) * num_stages, many or (MANY,) * num_stages),
        "recompute": ActivationCosts((slow,) * num_stages, (FEW,) * num_stages),
    }


@pytest.mark.parametrize(("num_microbatches", "spare"), [(5, 8.5), (6, 0.0)])
def test_stages_have_room_for_what_the_limit_leaves(num_microbatches: int, spare: float) -> None:
    """All micro-batches in flight together, and what is reserved, keep within the limit; else what was planned."""
    planner = Planner("wavek", 2, memory=(MANY, FEW), memory_limit=1100.0, reserved=100.0)
    room = planner.room(num_microbatches)
    assert room == (MANY.total + spare, FEW.total + spare)
    assert spare == 0.0 or num_microbatches * sum(room) + 100.0 == 1100.0


def test_the_graph_rank_that_takes_most_counts() -> None:
    """Ranks that went by what they hold themselves would not fit, or would choose differently."""
    one, other = PhaseCosts(1.0, 2.0, 3.0, 4.0, 5.0), PhaseCosts(2.0, 1.0, 3.0, 4.0, 0.0, 6.0)
    of_ranks = [
        ActivationCosts((one, one), (MANY, FEW), (0, 7)),
        ActivationCosts((other, one), (MemoryCosts(90.0, 0.0, 0.0), FEW), (3, 1)),
    ]
    assert most_of(of_ranks) == ActivationCosts(
        (PhaseCosts(2.0, 2.0, 3.0, 4.0, 5.0, 6.0), one), (MemoryCosts(90.0, 60.0, 40.0), FEW), (3, 7)
    )


@pytest.mark.parametrize(
    ("limit", "names"),
    [
        (1e6, ("pointwise", "pointwise")),  # everything fits
        (100.0, ("recompute", "recompute")),  # not one micro-batch fits otherwise
        (1.0, ("recompute", "recompute")),  # nothing fits, and building the schedule will say so
    ],
)
def test_limits(limit: float, names: tuple[str, ...]) -> None:
    planner = Planner("wavek", 2, memory_limit=limit)
    assert choose_activations(planner, measured(), 8).names == names


def test_only_the_rank_that_has_to_keeps_less() -> None:
    large = MemoryCosts(800.0, 600.0, 400.0)
    planner = Planner("wavek", 2, memory_limit=1000.0)
    assert choose_activations(planner, measured(many=(large, MANY)), 8).names == ("recompute", "pointwise")


@pytest.mark.parametrize("schedule", ["wavek", "1f1b-fold", "gpipe"])
@pytest.mark.parametrize("slower", [1.05, 1.5])
@pytest.mark.parametrize("limit", [200.0, 400.0, 800.0])
def test_the_step_is_the_shortest_of_all_choices(schedule: str, slower: float, limit: float) -> None:
    planner, costs = Planner(schedule, 3, memory_limit=limit), measured(3, slower)

    def step_time(names: tuple[str, ...]) -> float:
        try:
            return ChosenActivations(names, None, costs).on(planner).step_time(8)
        except ValueError:
            return float("inf")

    best = min(step_time(names) for names in itertools.product(costs, repeat=3))
    assert step_time(choose_activations(planner, costs, 8).names) == pytest.approx(best)


def test_stages_of_a_rank_are_alike_and_are_described() -> None:
    planner = Planner("wavek-zb", 2, memory_limit=100.0)
    chosen = choose_activations(planner, measured(4), 8)
    assert chosen.describe(100.0).startswith(
        "kept of a micro-batch, within 100 B on a rank: stage 0 recompute 3 B (pointwise 180 B), stage 1 recompute 3 B"
    )
    assert chosen.on(planner).memory == (FEW,) * 4
