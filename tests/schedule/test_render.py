from schedule_models import MEASURED, schedule_of

from lightning_januspipe.schedule import PhaseCosts, build_schedule, simulate
from lightning_januspipe.schedule.render import render

ONES = PhaseCosts(1.0, 1.0, 1.0, 1.0)


def test_grid_of_places():
    assert render(build_schedule("gpipe", 2, 1, ONES), marked=(1, 2)) == "\n".join(
        [
            "             0       1       2       3",
            "rank 0   FE0.0   FF0.0   BF0.0   BE0.0",
            "rank 1   FE1.0   FF1.0 >BF1.0<   BE1.0",
        ]
    )


def test_grid_of_time_slots_shows_bubbles_and_lengths():
    schedule = build_schedule("gpipe", 2, 1, ONES)
    report = simulate(schedule, PhaseCosts(1.0, 1.0, 2.0, 1.0))
    assert render(schedule, report) == "\n".join(
        [
            "           0     1     2     3     4     5     6     7     8     9",
            "rank 0 FE0.0     .     . FF0.0 BF0.0     -     .     .     . BE0.0",
            "rank 1     . FE1.0 FF1.0     .     .     . BF1.0     - BE1.0     .",
        ]
    )


def test_window_keeps_the_marked_action():
    grid = render(build_schedule("gpipe", 2, 20, ONES), marked=(0, 79), max_columns=4)
    assert grid.splitlines()[1] == "rank 0   BE0.16   BE0.17   BE0.18 >BE0.19<"
    assert grid.splitlines()[0].split() == ["76", "77", "78", "79"]


def test_rows_of_unequal_length_are_drawn():
    schedule = build_schedule("wavek", 3, 4, PhaseCosts(1.0, 1.3, 2.4, 1.25))
    report = simulate(schedule, PhaseCosts(1.0, 1.3, 2.4, 1.25))
    for grid in (render(schedule, report), render(schedule, report, marked=(2, 3), max_columns=10)):
        assert [line.split()[1] for line in grid.splitlines()[1:]] == ["0", "1", "2"]
    assert all(str(action) in render(schedule, report) for order in schedule.actions for action in order)


def test_split_stages_and_chunks_are_drawn_on_their_ranks():
    split = schedule_of("FE0.0 BE0.0", "FF0.0 BF0.0", placement=(0,), force_placement=(1,))
    assert render(split).splitlines()[1:] == ["rank 0 FE0.0 BE0.0", "rank 1 FF0.0 BF0.0"]
    schedule = build_schedule("wavek-zb", 2, 2, MEASURED, chunks=2)
    report = simulate(schedule, MEASURED)
    rows = render(schedule, report).splitlines()[1:]
    for row, order in zip(rows, schedule.actions, strict=True):
        assert [cell for cell in row.split()[2:] if cell not in ".-"] == [str(action) for action in order]
