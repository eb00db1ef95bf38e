import pytest
from schedule_models import MEASURED

from lightning_januspipe.schedule import Action, Phase, build_schedule
from lightning_januspipe.schedule.dependency_table import dependency_table


@pytest.mark.parametrize("name", ["1f1b-2nd", "hanayo-2nd", "wavek-zb", "gpipe"])
def test_entries_are_the_dependencies_and_messages_of_every_action(name):
    schedule = build_schedule(name, 3, 2, MEASURED)
    table, num_dependencies = dependency_table(schedule)
    by_action = {Action(phase, s, 1): entry for phase in Phase for s, entry in enumerate(table[phase])}
    target_of = {index: action for action, entry in by_action.items() for index in entry.needs}
    source_of = {index: action for action, entry in by_action.items() for index in entry.local_outputs}
    source_of |= {index: action for action, entry in by_action.items() for _, index in entry.sends}
    assert sorted(target_of) == list(range(num_dependencies))
    assert len(by_action) == len(Phase) * schedule.num_stages
    for order in schedule.actions:
        for action in order:
            entry = by_action[action._replace(microbatch=1)]
            assert entry.rank == schedule.rank_of(action)
            needed = {source_of[index]._replace(microbatch=action.microbatch) for index in entry.needs}
            assert needed == set(schedule.dependencies(action))
            received = [
                (rank, source_of[index]._replace(microbatch=action.microbatch)) for rank, index in entry.receives
            ]
            assert received == [(schedule.rank_of(m.source), m.source) for m in schedule.received(action)]
            sent = [(rank, target_of[index]._replace(microbatch=action.microbatch)) for rank, index in entry.sends]
            assert sent == [(schedule.rank_of(m.target), m.target) for m in schedule.sent(action)]
