import pytest
from schedule_models import MEASURED

from lightning_januspipe.schedule import Action, Phase, build_schedule
from lightning_januspipe.schedule.dependency_table import dependency_table


@pytest.mark.parametrize("name", ["1f1b-2nd", "hanayo-2nd", "wavek-zb", "gpipe"])
def test_edges_are_the_dependencies_and_messages_of_every_action(name):
    schedule = build_schedule(name, 3, 2, MEASURED)
    steps, num_edges = dependency_table(schedule)
    by_action = {Action(phase, s, 1): step for phase in Phase for s, step in enumerate(steps[phase])}
    target_of = {edge: action for action, step in by_action.items() for edge in step.needs}
    source_of = {edge: action for action, step in by_action.items() for edge in step.hands_on}
    source_of |= {edge: action for action, step in by_action.items() for _, edge in step.sends}
    assert sorted(target_of) == list(range(num_edges))
    assert len(by_action) == len(Phase) * schedule.num_stages
    for order in schedule.actions:
        for action in order:
            step = by_action[action._replace(microbatch=1)]
            assert step.rank == schedule.rank_of(action)
            needed = {source_of[edge]._replace(microbatch=action.microbatch) for edge in step.needs}
            assert needed == set(schedule.dependencies(action))
            received = [(rank, source_of[edge]._replace(microbatch=action.microbatch)) for rank, edge in step.receives]
            assert received == [(schedule.rank_of(m.source), m.source) for m in schedule.received(action)]
            sent = [(rank, target_of[edge]._replace(microbatch=action.microbatch)) for rank, edge in step.sends]
            assert sent == [(schedule.rank_of(m.target), m.target) for m in schedule.sent(action)]
