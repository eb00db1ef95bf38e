import ast
import sys
from pathlib import Path

import pytest

from lightning_januspipe import schedule as package
from lightning_januspipe.schedule import PhaseCosts, build_schedule
from lightning_januspipe.schedule.build import GENERATORS

COSTS = PhaseCosts(1.0, 1.3, 2.4, 1.25)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 1), (1, 5), (5, 1), (6, 3)])
def test_all_sizes_are_built_under_their_name(name, num_ranks, num_microbatches):
    schedule = build_schedule(name, num_ranks, num_microbatches, COSTS)
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == (name, num_ranks, num_microbatches)
    assert schedule.placement == tuple(range(num_ranks))


@pytest.mark.parametrize(("name", "close"), [("wavk", "wavek"), ("1f1b", "1f1b-fold"), ("GPipe", "gpipe")])
def test_unknown_name_gets_the_closest_match(name, close):
    with pytest.raises(ValueError, match=rf"gpipe, 1f1b-fold, wavek.* Did you mean '{close}'\?"):
        build_schedule(name, 2, 2, COSTS)


def test_unknown_name_without_a_match():
    with pytest.raises(ValueError, match="expected one of") as caught:
        build_schedule("zzz", 2, 2, COSTS)
    assert "mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_ranks": 0}, "num_ranks is 0, expected a whole number >= 1"),
        ({"num_ranks": 2.0}, "num_ranks is 2.0"),
        ({"num_microbatches": -1}, "num_microbatches is -1"),
        ({"num_microbatches": True}, "num_microbatches is True"),
        ({"wave_size": 0}, "wave_size is 0, expected a whole number >= 1 or 'auto'"),
        ({"wave_size": "best"}, "wave_size is 'best'"),
        ({"wave_size": None}, "wave_size is None"),
        ({"max_live": 0}, "max_live is 0, expected a whole number >= 1 or None"),
        ({"costs": [COSTS]}, "a sequence of 2"),
        ({"costs": 1.0}, "expected one PhaseCosts"),
    ],
)
@pytest.mark.parametrize("name", GENERATORS)
def test_bad_arguments_are_refused(name, sizes, message):
    arguments = {"num_ranks": 2, "num_microbatches": 2, "costs": COSTS, **sizes}
    with pytest.raises(ValueError, match=message):
        build_schedule(name, **arguments)


def test_gpipe_cannot_keep_within_fewer_live_microbatches():
    build_schedule("gpipe", 2, 4, COSTS, max_live=4)
    with pytest.raises(ValueError, match="keeps all 4 micro-batches live, more than max_live=3"):
        build_schedule("gpipe", 2, 4, COSTS, max_live=3)


def test_only_the_standard_library_is_imported():
    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = []
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                own = module.startswith("lightning_januspipe.schedule")
                assert own or module.split(".")[0] in sys.stdlib_module_names, f"{path.name} imports {module}"
