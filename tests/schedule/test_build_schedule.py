import ast
import sys
from pathlib import Path

import pytest

from lightning_januspipe import schedule as package
from lightning_januspipe.schedule import MemoryCosts, Phase, PhaseCosts, build_schedule
from lightning_januspipe.schedule.build_schedule import DEFERRED, GENERATORS, SEVERAL_STAGES, UNFOLDED

COSTS = PhaseCosts(1.0, 1.3, 2.4, 1.25)


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize(("num_ranks", "num_microbatches"), [(1, 1), (1, 5), (5, 1), (6, 3)])
def test_all_sizes_are_built_under_their_name(name, num_ranks, num_microbatches):
    schedule = build_schedule(name, num_ranks, num_microbatches, COSTS)
    assert (schedule.name, schedule.num_ranks, schedule.num_microbatches) == (name, num_ranks, num_microbatches)
    if name not in SEVERAL_STAGES:
        assert schedule.placement == tuple(range(num_ranks))
    assert (name in UNFOLDED and num_ranks > 1) == (not schedule.is_folded)
    assert (name in DEFERRED) == (Phase.WF in schedule.phases)


def test_wavek_zb_places_its_chunks_down_and_up():
    schedule = build_schedule("wavek-zb", 3, 4, COSTS, chunks=2)
    assert schedule.placement == (0, 1, 2, 2, 1, 0)
    assert build_schedule("wavek-zb", 3, 4, COSTS, chunks=1).placement == (0, 1, 2)


@pytest.mark.parametrize("name", GENERATORS)
def test_only_schedules_with_several_stages_read_chunks(name):
    schedule = build_schedule(name, 2, 4, COSTS, chunks=3)
    assert schedule.num_stages == (6 if name in SEVERAL_STAGES else 2)


@pytest.mark.parametrize("name", GENERATORS)
def test_costs_per_stage_set_the_number_of_stages(name):
    if name in SEVERAL_STAGES:
        assert build_schedule(name, 2, 4, [COSTS] * 5).num_stages == 5
    else:
        with pytest.raises(ValueError, match="a sequence of 2, one per rank"):
            build_schedule(name, 2, 4, [COSTS] * 5)
    with pytest.raises(ValueError, match="a sequence of 4, one per rank"):
        build_schedule(name, 4, 4, [COSTS] * 3)


@pytest.mark.parametrize(
    ("name", "close"), [("wavk", "wavek"), ("1f1b-fld", "1f1b-fold"), ("hanayo", "hanayo-2nd"), ("GPipe", "gpipe")]
)
def test_unknown_name_gets_the_closest_match(name, close):
    with pytest.raises(
        ValueError, match=rf"gpipe, 1f1b-fold, 1f1b-2nd, hanayo-2nd, wavek, wavek-zb.* Did you mean '{close}'\?"
    ):
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
        ({"chunks": 0}, "chunks is 0, expected a whole number >= 1 or 'auto'"),
        ({"latency": -1.0}, "latency is -1.0, expected a finite time >= 0"),
        ({"memory": MemoryCosts(1.0, 1.0)}, "memory and memory_limit belong together"),
        ({"memory_limit": 1.0}, "memory and memory_limit belong together"),
        ({"memory": MemoryCosts(1.0, 1.0), "memory_limit": float("nan")}, "memory_limit is nan"),
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


def _imports(node):
    """Names of the modules that are imported when a file is, and of those that its functions import."""
    at_once, later = [], []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            at_once += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            at_once.append(child.module or "")
        else:
            inner_at_once, inner_later = _imports(child)
            is_for_types = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
            is_delayed = is_for_types or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            (later if is_delayed else at_once).extend(inner_at_once)
            later += inner_later
    return at_once, later


def test_only_the_standard_library_is_imported():
    """But for matplotlib, where something is drawn."""
    for path in Path(package.__file__).parent.glob("*.py"):
        at_once, later = _imports(ast.parse(path.read_text()))
        allowed = {*sys.stdlib_module_names}
        for modules in (at_once, later):
            for module in modules:
                own = module.startswith("lightning_januspipe.schedule")
                assert own or module.split(".")[0] in allowed, f"{path.name} imports {module}"
            allowed.add("matplotlib")


def test_imports_are_told_apart():
    lines = ["import a", "if TYPE_CHECKING:", "    import b", "class C:", "    import c", "    def f(self):"]
    lines += ["        from d.e import f"]
    assert _imports(ast.parse("\n".join(lines))) == (["a", "c"], ["b", "d.e"])


@pytest.mark.parametrize(
    ("name", "placement"), [("wavek-zb", 5), ("wavek-zb", (0, 1, 1)), ("wavek-zb", (0, 1, 2, 3)), ("wavek", (0, 1, 2))]
)
def test_placement_that_does_not_fit_is_refused(name: str, placement: object) -> None:
    with pytest.raises(ValueError, match="placement is .* with every rank from 0 to 2"):
        build_schedule(name, 3, 4, PhaseCosts(1, 1, 1, 1), placement=placement)  # type: ignore[arg-type]


def test_a_given_placement_is_kept() -> None:
    placement = (0, 1, 2, 0, 1, 2)
    assert build_schedule("wavek-zb", 3, 4, PhaseCosts(1, 1, 1, 1, 1, 1), placement=placement).placement == placement
