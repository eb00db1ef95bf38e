"""What each rank takes in and hands on is what the others send and wait for."""

from __future__ import annotations

from collections import Counter
from itertools import chain

import pytest

from lightning_januspipe.engine.route import Route, evaluation_schedule
from lightning_januspipe.schedule import PhaseCosts, build_schedule
from lightning_januspipe.schedule.actions import Action, Phase

COSTS = PhaseCosts(1.0, 1.2, 1.1, 0.9)


@pytest.mark.parametrize("name", ["gpipe", "1f1b-fold", "1f1b-2nd", "hanayo-2nd", "wavek", "wavek-zb"])
@pytest.mark.parametrize("num_ranks", [1, 3])
def test_all_that_is_handed_on_is_taken_in_once(name: str, num_ranks: int) -> None:
    schedule = build_schedule(name, num_ranks, 4, COSTS)
    routes = [Route(schedule, rank) for rank in range(num_ranks)]
    given = Counter(chain.from_iterable(r.outputs(a) for r in routes for a in r.order))
    taken = Counter(chain.from_iterable(r.inputs(a) for r in routes for a in r.order))
    assert given == taken and max(given.values()) == 1
    for rank, route in enumerate(routes):
        for action in route.order:
            assert all(message.target == action for message in route.inputs(action))
            assert all(message.source == action for message in route.outputs(action))
        for sender, messages in route.incoming.items():
            sent = chain.from_iterable(routes[sender].outputs(a) for a in routes[sender].order)
            assert messages == [m for m in sent if schedule.rank_of(m.target) == rank]
            assert [route.index(m) for m in messages] == list(range(len(messages)))
            order = schedule.actions[sender]
            assert [route.position(m.source) for m in messages] == [order.index(m.source) for m in messages]


def test_evaluation_runs_one_micro_batch_after_the_other() -> None:
    schedule = evaluation_schedule((0, 1), (1, 0), 2, 2)
    texts = [[str(action) for action in order] for order in schedule.actions]
    assert texts == [["FE0.0", "FF1.0", "FE0.1", "FF1.1"], ["FE1.0", "FF0.0", "FE1.1", "FF0.1"]]
    assert Route(schedule, 1).inputs(Action(Phase.FF, 0, 1)) == schedule.received(Action(Phase.FF, 0, 1))
