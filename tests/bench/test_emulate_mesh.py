"""Emulated meshes: graph ranks meet where micro-batches are sharded, replicas at the end of every step."""

from __future__ import annotations

import statistics
from collections import Counter
from typing import Any

import pytest
from emulate_workers import with_an_unreduced_gradient, with_other_work, with_the_end_of_a_rank

from lightning_januspipe.bench import replicas as replicas_module
from lightning_januspipe.bench.command import main
from lightning_januspipe.bench.emulate import EmulatedMesh, MeshWork, MicrobatchWork, emulate_mesh
from lightning_januspipe.bench.emulate.emulated_mesh import device_pool
from lightning_januspipe.bench.emulate.schedules import suitable_unit
from lightning_januspipe.bench.replicas import WAYS, emulated, shared_by_graph_ranks
from lightning_januspipe.bench.work import Work
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.schedule import PhaseCosts, Schedule, build_schedule, simulate
from lightning_januspipe.schedule.actions import COMPUTED_PHASES
from lightning_januspipe.schedule.costs import action_times
from lightning_januspipe.testing import RankError, RankPool

COSTS = PhaseCosts(1.0, 1.5, 1.4, 0.9, 1.1, 0.6)
UNIT = 2e-3


def _check(mesh: EmulatedMesh, shape: MeshShape, schedule: Schedule, works: list[MeshWork], unit: float) -> None:
    """Every rank ran its schedule with the micro-batches of its replica, and met whom it had to meet."""
    asked = action_times(schedule, COSTS)
    assert len(mesh.steps) == len(works)
    for step, work in zip(mesh.steps, works, strict=True):
        assert step.makespan >= step.simulated, "sleeping takes as long as it takes"
        assert [len(of) for of in (step.actions, step.exchanges, step.reductions)] == [shape.size] * 3
        for rank in range(shape.size):
            pipeline, data, graph = shape.coordinates(rank)
            spans = step.actions[rank]
            assert tuple(span.action for span in spans) == schedule.actions[pipeline]
            for span in spans:
                load = work[data][span.action.microbatch].loads[graph]
                assert span.end - span.start >= unit * load * asked(span.action.phase, span.action.stage), span
            sharded = {m for m, one in enumerate(work[data]) if one.is_sharded}
            met = [span.action for span in step.exchanges[rank]]
            assert met == [a for a in schedule.actions[pipeline] if a.microbatch in sharded]
            others = [step.exchanges[shape.rank(pipeline, data, g)] for g in range(shape.graph)]
            for together in zip(*others, strict=True):
                assert max(s.start for s in together) <= min(s.end for s in together), "they did not meet"
            holders = [shape.rank(pipeline, d, g) for d in range(shape.data) for g in range(shape.graph)]
            last = max(step.actions[other][-1].end for other in holders)
            assert last <= step.reductions[rank][1], "gradients are there before all have computed them"


def test_graph_ranks_meet_in_divided_micro_batches_only(pool: RankPool) -> None:
    shape, schedule = MeshShape(2, 1, 2), build_schedule("wavek-zb", 2, 3, COSTS)
    whole, sharded = MicrobatchWork((1.0, 2.0)), MicrobatchWork((1.5, 1.5), is_sharded=True)
    works = [[[whole, sharded, whole]], [[sharded, whole, sharded]], [[whole] * 3]]
    mesh = emulate_mesh(shape, schedule, COSTS, works, seconds_per_unit=UNIT, pool=pool)
    _check(mesh, shape, schedule, works, UNIT)
    of_microbatch = len(schedule.phases) * schedule.num_stages // 2  # each rank has half of the stages
    assert [[len(of) for of in step.exchanges] for step in mesh.steps] == [[n * of_microbatch] * 4 for n in (1, 2, 0)]
    assert {s.action.phase for s in mesh.steps[0].exchanges[0]} == set(COMPUTED_PHASES)
    assert mesh.exchange > 0 and mesh.reduction > 0 and mesh.handover > 0 and mesh.cpu > 0


def test_replicas_wait_for_the_one_with_the_largest_micro_batch(pool: RankPool) -> None:
    shape, schedule = MeshShape(2, 2, 1), build_schedule("wavek-zb", 2, 4, COSTS)
    one, all_, none = (MicrobatchWork((load,)) for load in (1.0, 7.93, 0.01))
    even, uneven = [[one] * 4] * 2, [[none] * 4, [none, all_, none, none]]
    works = [even, uneven, even]
    mesh = emulate_mesh(shape, schedule, COSTS, works, seconds_per_unit=4 * UNIT, pool=pool)
    _check(mesh, shape, schedule, works, 4 * UNIT)
    first, waiting, last = mesh.steps
    assert waiting.simulated > 3 * first.simulated, "both have the same work"
    assert waiting.makespan > min(first.makespan, last.makespan)
    busy = [span.end for rank in (0, 2) for span in waiting.actions[rank]]
    assert max(busy) < waiting.reductions[0][1] / 3, "the replica without work waits"


def test_graph_ranks_that_run_other_micro_batches_are_noticed(pool: RankPool) -> None:
    errors = pool.run(with_other_work, build_schedule("gpipe", 1, 2, COSTS), world_size=2)
    assert all("FE0.0 of graph rank 0 met" in e or "FE0.1 of graph rank 1 met" in e for e in errors), errors


def test_gradients_that_are_not_reduced_are_noticed(pool: RankPool) -> None:
    errors = pool.run(with_an_unreduced_gradient, build_schedule("gpipe", 1, 1, COSTS), world_size=2)
    assert all("after its reduction, expected" in e for e in errors), errors


@pytest.mark.slow
def test_the_end_of_a_rank_ends_the_others() -> None:
    """One of four processes ends in the middle: the others are told, long before they would give up waiting."""
    schedule = build_schedule("wavek-zb", 2, 2, COSTS)
    with device_pool(4) as pool:
        with pytest.raises(RankError, match="rank 3 died") as caught:
            pool.run(with_the_end_of_a_rank, schedule, 3, timeout=100)
        found = str(caught.value)
        assert "did not finish" not in found and all(f"rank {rank}: " in found for rank in range(4)), found
        assert "Timed out" not in found, found


@pytest.mark.parametrize(
    ("work", "said"),
    [
        ([[MicrobatchWork((1.0,))]], r"the replicas have \[1\] micro-batches; expected 1 of each of 2"),
        ([[MicrobatchWork((1.0,))] * 2] * 2, r"the replicas have \[2, 2\] micro-batches"),
        ([[MicrobatchWork((1.0, 1.0))]] * 2, r"loads of a micro-batch are \(1.0, 1.0\); expected 1 positive numbers"),
        ([[MicrobatchWork((0.0,))]] * 2, r"loads of a micro-batch are \(0.0,\); expected 1 positive numbers"),
        ([[MicrobatchWork((1.0,), is_sharded=True)]] * 2, "is sharded, but there is one graph rank"),
    ],
)
def test_work_that_does_not_fit_is_refused(work: MeshWork, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        emulate_mesh(MeshShape(1, 2), build_schedule("gpipe", 1, 1, COSTS), COSTS, [work], seconds_per_unit=1)


@pytest.mark.parametrize(
    ("shape", "changed", "said"),
    [
        (MeshShape(2, 1), {}, "has 1 ranks; expected 2, as the mesh"),
        (MeshShape(1, 4), {"pool": RankPool(2)}, "the mesh has 4 ranks, but the pool has 2 processes"),
        (MeshShape(1, 1), {"steps": []}, "no steps"),
        (MeshShape(1, 1), {"seconds_per_unit": 0}, "seconds_per_unit=0; expected a positive number"),
    ],
)
def test_a_mesh_that_cannot_run_is_refused(shape: MeshShape, changed: dict[str, Any], said: str) -> None:
    given = {"steps": [[[MicrobatchWork((1.0,))]]], "seconds_per_unit": 1.0, **changed}
    with pytest.raises(ValueError, match=said):
        emulate_mesh(shape, build_schedule("gpipe", 1, 1, COSTS), COSTS, **given)


class TestBenchmark:
    def test_graph_ranks_share_what_is_even_whole(self) -> None:
        assert shared_by_graph_ranks([3.0, 1.0, 2.0, 2.0], 2) == MicrobatchWork((4.0, 4.0))
        assert shared_by_graph_ranks([3.0, 1.0], 2) == MicrobatchWork((2.0, 2.0), is_sharded=True)
        assert shared_by_graph_ranks([8.0], 4) == MicrobatchWork((2.0,) * 4, is_sharded=True)
        assert shared_by_graph_ranks([8.0, 1.0], 1) == MicrobatchWork((9.0,))

    def test_work_of_graph_ranks_is_that_of_the_partition(self) -> None:
        """Structures without edges that differ in atoms alone."""
        import torch

        from lightning_januspipe.graph.partition import partition_atoms

        none = torch.zeros(0, dtype=torch.int64)
        for sizes in ([5, 4, 3, 4], [40, 2, 3], [7, 6, 5, 5, 4, 3], [20, 20, 21]):
            structure = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
            owner = partition_atoms(none, none, sum(sizes), 2, structure=structure)
            is_whole = all(len(owner[structure == s].unique()) == 1 for s in range(len(sizes)))
            found = shared_by_graph_ranks([float(n) for n in sizes], 2)
            assert found.is_sharded != is_whole, sizes
            if is_whole:
                assert sorted(Counter(owner.tolist()).values()) == sorted(map(int, found.loads))

    def test_table(self, pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(replicas_module, "MESHES", ((2, 1, 2), (1, 2, 1)))
        monkeypatch.setattr(replicas_module, "suitable_unit", lambda *_: 1e-3)
        said: list[str] = []
        text = emulated(Work(batch_size=2, steps=1), 2, said.append, pool)
        assert said == [f"P, D, G = {m}: 6 steps in {n} processes" for m, n in (("2, 1, 2", 4), ("1, 2, 1", 2))]
        rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in text.splitlines()[:8]]
        assert [row[:2] for row in rows[2:]] == [[mesh, way] for mesh in ("2, 1, 2", "1, 2, 1") for way in WAYS]
        for rank_rows, sizes in ((rows[2:5], (2, 1, 2)), (rows[5:], (1, 2, 1))):
            simulated = _simulated_gains(sizes, 1)
            assert [row[7] for row in rank_rows] == [f"{gain:.2f}" for gain in simulated]
            assert rank_rows[0][8:] == ["1.00", "1.00 to 1.00"]
            for row in rank_rows:
                assert float(row[4]) > float(row[3]) > 0 and float(row[5][:-2]) > 0
                assert (row[2] == "0%") == (sizes[2] == 1)
        assert text.count("exchanges of graph ranks") == 2 and len(rows[2]) == len(rows[0])

    def test_unit_of_pipelines_side_by_side(self) -> None:
        schedules = [build_schedule("wavek-zb", 8, 2, COSTS, chunks=2)]
        assert suitable_unit(schedules, COSTS, MeshShape(8, 2, 2)) == pytest.approx(32e-3 / 0.3)
        assert suitable_unit(schedules, COSTS, MeshShape(8, 1, 4)) == pytest.approx(64e-3 / 0.3)
        assert suitable_unit(schedules, COSTS, MeshShape(8, 1, 1)) == pytest.approx(8e-3 / 0.3)

    def test_command(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        monkeypatch.setattr(replicas_module, "emulated", lambda work, runs: f"{work.steps} steps, {runs} runs")
        main(["balance", "--emulate", "--steps=4"])
        assert "Emulated:\n\n4 steps, 1 runs" in capsys.readouterr().out
        with pytest.raises(SystemExit) as exit_info:
            main(["single", "--emulate"])
        assert exit_info.value.code == 2 and "unknown option --emulate" in capsys.readouterr().err


def _simulated_gains(sizes: tuple[int, int, int], num_steps: int) -> list[float]:
    """Gains of all ways by the simulation alone, of steps with two structures for each micro-batch."""
    from lightning_januspipe.data import StructureDataset
    from lightning_januspipe.loader.sample_sizes import sample_costs

    num_ranks, num_replicas, num_graph = sizes
    schedule = build_schedule("wavek-zb", num_ranks, 2 * num_ranks, replicas_module.COSTS)
    structures = replicas_module.mixture(num_steps * num_replicas * 2 * num_ranks * 2)
    costs = sample_costs(StructureDataset(structures, cutoff=4.0))
    assert costs is not None
    times = []
    for step in costs.reshape(num_steps, -1).tolist():
        of_ways = []
        for way in WAYS:
            replicas = replicas_module.microbatches_of_replicas(step, num_replicas, 2 * num_ranks, way)
            weights = [
                [max(shared_by_graph_ranks([step[i] for i in g], num_graph).loads) for g in mine] for mine in replicas
            ]
            of_ways.append(max(simulate(schedule, replicas_module.COSTS, weights=w).makespan for w in weights))
        times.append(of_ways)
    return [statistics.median(of[0] / of[w] for of in times) for w in range(len(WAYS))]
