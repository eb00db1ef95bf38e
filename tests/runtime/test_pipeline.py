"""What a pipeline plans: places, schedules that are agreed on, costs measured anew, memory limits, timelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pipeline_workers
import pytest
import tiny
from documents import ROOT, named_functions
from pools import slow

from lightning_januspipe.runtime.planner import Planner
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts, Schedule, validate_schedule
from lightning_januspipe.schedule.figures import SUFFIXES
from lightning_januspipe.testing import RankPool, compare_records, train_reference


@pytest.mark.parametrize("schedule", [slow("wavek"), "wavek-zb"])
def test_a_new_schedule_in_mid_training_changes_no_number(pool: RankPool, schedule: str) -> None:
    strategy = {"schedule": schedule, "num_microbatches": 4}
    results = pool.run(pipeline_workers.train_and_replan, strategy, 6, world_size=2)
    (reference,) = pool.run(train_reference, tiny.module, tiny.data, strategy, 6, {}, 2, world_size=1)
    compare_records(reference, [record for record, _ in results], 1e-9)
    assert [built for _, built in results] == [1, 0], "the first rank plans for all, once"


@pytest.mark.parametrize("placement", [(0, 1, 1, 0), (0, 1, 0, 1)], ids=["snake", "loop"])
def test_two_stages_on_each_rank(pool: RankPool, placement: tuple[int, ...]) -> None:
    strategy = {"schedule": "wavek-zb", "num_microbatches": 4}
    results = pool.run(pipeline_workers.train_with_placement, placement, strategy, 3, world_size=2)
    assert [stages for _, stages in results] == [[s for s, r in enumerate(placement) if r == rank] for rank in (0, 1)]
    (reference,) = pool.run(train_reference, tiny.module, tiny.data, strategy, 3, {}, 2, world_size=1)
    compare_records(reference, [record for record, _ in results], 1e-9)


@pytest.mark.parametrize(
    ("schedule", "size"),
    [
        slow("wavek-zb", 2),
        ("wavek-zb", 4),
        slow("wavek", 2),
        ("1f1b-2nd", 2),
        slow("hanayo-2nd", 2),
    ],
)
def test_all_ranks_have_one_valid_schedule(pool: RankPool, schedule: str, size: int) -> None:
    results = pool.run(pipeline_workers.fit, {"schedule": schedule, "num_microbatches": 4}, world_size=size)
    assert len({r["schedule"] for r in results}) == 1
    plan = Schedule.parse(results[0]["schedule"])
    validate_schedule(plan)
    assert plan.num_ranks == size and plan.num_microbatches == 4 and plan.name == schedule
    assert [plan.stages_of(rank) for rank in range(size)] == [tuple(r["stages"]) for r in results]
    assert len({r["latency"] for r in results}) == 1 and results[0]["latency"] > 0
    assert all(m.energy > 0 and m.force > 0 for m in results[0]["memory"])


def test_unfolded_ranks_hold_second_copies(pool: RankPool) -> None:
    """Layers of split stages are trained by two ranks; in a folded pipeline each layer has one."""
    unfolded = pool.run(pipeline_workers.fit, {"schedule": "1f1b-2nd"}, world_size=4)
    folded = pool.run(pipeline_workers.fit, {"schedule": "wavek"}, world_size=4)
    assert unfolded[0]["placement"] != unfolded[0]["force_placement"]
    assert folded[0]["placement"] == folded[0]["force_placement"]

    def copies(results: list[dict[str, list[str]]]) -> int:
        return sum(len(r["holds"]) for r in results)

    assert copies(unfolded) > copies(folded)


def test_memory_limit(pool: RankPool) -> None:
    """A limit lowers the live micro-batches; one that nothing fits in is an error on every rank."""
    kept = {"schedule": "wavek-zb", "num_microbatches": 8, "activation": "keep"}
    from lightning_januspipe.schedule.step_report import peak_live

    free = pool.run(pipeline_workers.fit_with_equal_costs, {**kept, "memory_limit": 1e12}, world_size=2)
    plan = Schedule.parse(free[0]["schedule"])
    of_ranks = [sum(free[0]["memory"][s].energy + free[0]["memory"][s].force for s in r["stages"]) for r in free]
    limit = free[0]["state"] + 2.5 * max(of_ranks)
    tight = pool.run(pipeline_workers.fit_with_equal_costs, {**kept, "memory_limit": limit}, world_size=2)
    assert max(peak_live(Schedule.parse(tight[0]["schedule"]))) < max(peak_live(plan))

    errors = pool.run(pipeline_workers.fit_with_error, {"memory_limit": 100.0}, world_size=2)
    assert all("memory_limit=100 bytes per rank" in e and "raise the limit" in e for e in errors), errors
    slightly_more = {**kept, "memory_limit": free[0]["state"] + 100}
    train = pipeline_workers.fit_with_equal_costs
    errors = pool.run(pipeline_workers.fit_with_error, slightly_more, train, world_size=2)
    assert all("and the state of the stages takes" in e and "of saved tensors" in e for e in errors), errors


def test_timeline_of_a_real_step(pool: RankPool, tmp_path: Path) -> None:
    results = pool.run(
        pipeline_workers.record_timeline, str(tmp_path), {"num_microbatches": 4, "schedule": "wavek"}, world_size=2
    )
    times, makespan, predicted = results[0]
    assert results[1][0] == times, "every rank knows the whole step"
    assert len(times) == 2 * 4 * 4
    assert all(0 <= start < end <= makespan for _, start, end in times)
    assert predicted > 0
    assert pipeline_workers.exists(str(tmp_path)) == ["pipeline-step-4.json", "pipeline-step-4.png"]
    assert (tmp_path / "pipeline-step-4.png").read_bytes().startswith(b"\x89PNG")


def test_timeline_of_a_step_that_does_not_come(pool: RankPool, tmp_path: Path) -> None:
    first, second = pool.run(pipeline_workers.timeline_too_late, str(tmp_path), world_size=2)
    assert ["ended after 2 batches, so step 5 was not" in w for w in first] == [True] and second == []
    assert pipeline_workers.exists(str(tmp_path)) == []


def test_timeline_in_the_default_folder(pool: RankPool, tmp_path: Path) -> None:
    """Ranks go on together after it, and what the warm-up took does not count."""
    counts = pool.run(pipeline_workers.timeline_in_the_default_folder, str(tmp_path), world_size=2)
    assert counts == [0, 0]
    assert pipeline_workers.exists(str(tmp_path)) == ["pipeline-step-0.json", "pipeline-step-0.png"]


@pytest.mark.parametrize("schedule", ["1f1b-2nd", slow("hanayo-2nd"), slow("wavek-zb")])
def test_stages_stay_where_they_are(pool: RankPool, schedule: str) -> None:
    """A smaller batch after costs were measured anew gets a schedule for the places that the stages have."""
    strategy = {"schedule": schedule, "num_microbatches": 4}
    for before, after in pool.run(pipeline_workers.places_after_measuring, strategy, world_size=2):
        assert before == after


def test_replicas_plan_alike(pool: RankPool) -> None:
    """Ranks of other replicas hold the same stages and run the same order, whatever each has measured."""
    strategy = {"pipeline_size": 2, "data_size": 2, "num_microbatches": 2}
    results = pool.run(pipeline_workers.costs_of_replicas, strategy, world_size=4)
    # The costs are those that were gathered by the ranks of the first replica, 0 and 2.
    assert [r[0] for r in results] == [1e-6] * 4
    assert results[0] == results[1] and results[2] == results[3]


def test_memory_limit_is_for_training(pool: RankPool) -> None:
    limited, free = (
        pool.run(pipeline_workers.validate_only, given, world_size=2) for given in ({"memory_limit": 1000.0}, {})
    )
    assert limited == pytest.approx(free, rel=1e-12)  # the stages are cut by measured costs


def test_a_schedule_stays_where_no_other_keeps_within_memory() -> None:
    costs, memory = (PhaseCosts(1, 1, 1, 1),) * 2, (MemoryCosts(10, 10),) * 2
    planner = Planner("wavek", 2, costs, memory, memory_limit=20.0)
    present = planner.schedule(4)
    assert replace(planner, memory_limit=19.0).improved(present, costs) is None


def test_timeline_needs_a_pipeline(pool: RankPool) -> None:
    (error,) = pool.run(pipeline_workers.timeline_without_a_pipeline, world_size=1)
    assert "this run has none" in error


def test_arguments_of_the_timeline() -> None:
    from lightning_januspipe.callbacks import PipelineTimeline

    with pytest.raises(ValueError, match="step=-1"):
        PipelineTimeline(step=-1)
    with pytest.raises(ValueError, match="suffix='pdf'; expected one of " + ", ".join(s[1:] for s in SUFFIXES)):
        PipelineTimeline(suffix="pdf")


def test_a_micro_batch_goes_the_way_that_the_docs_describe(pool: RankPool) -> None:
    """The last stage calls the functions in the order of the tables, but for those of graph ranks and of the set-up."""
    _, called = pool.run(pipeline_workers.functions_of_a_step, world_size=2)
    way = []
    for file, (function, *_), text in named_functions(ROOT / "docs" / "how-it-works.md"):
        if not text.startswith(("On graph ranks", "Has left")):
            name = "__call__" if function == "MicroBatchCollate" else function.rpartition(".")[2]
            assert (file, name) in called, f"{file}: {function} is not called"
            way.append((called.index((file, name)), f"{file}: {function}"))
    assert len(way) > 20 and [name for _, name in sorted(way)] == [name for _, name in way]
