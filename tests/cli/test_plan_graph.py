"""``januspipe plan`` for graph ranks: what is predicted to be sent is sent, shares are of whole micro-batches."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import graph_models
import pytest
import tiny
import torch
import yaml
from explicit_models import SelfDividing
from plan_workers import sent_in_a_step

from lightning_januspipe.cli.main import main
from lightning_januspipe.graph import GraphAxis, GraphGroup
from lightning_januspipe.loader.examples import example_batches
from lightning_januspipe.loader.split import split_batches
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.plan import Measured, TooManyRanks, measure_stages
from lightning_januspipe.plan.compare import PlanOptions
from lightning_januspipe.plan.graph_share import CountingGroup, GraphLink, GraphShare, Sharing, costs_of_share
from lightning_januspipe.plan.meshes import Meshes, compare_meshes, shapes
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts
from lightning_januspipe.testing import RankPool

NUM_MICROBATCHES = 4
SMALL = partial(tiny.module, num_layers=2)
COSTS, MEMORY = PhaseCosts(0.01, 0.01, 0.01, 0.01), MemoryCosts(1e6, 1e6, 0)


@pytest.fixture(scope="module")
def found() -> Iterator[SimpleNamespace]:
    """A tiny potential in one and in two stages, and micro-batches of its data."""
    before = torch.get_default_dtype()
    one, two = (captured(SMALL, tiny.data, num) for num in (1, 2))
    yield SimpleNamespace(whole=one, **vars(two))
    torch.set_default_dtype(before)


def captured(module: Any, data: Any, num_stages: int) -> SimpleNamespace:
    made, loader = module(), data()
    loader.setup("fit")
    loader = loader.train_dataloader()

    def step(batch: Any) -> Any:
        return made.training_step(batch, 0)

    examples = example_batches(loader, NUM_MICROBATCHES)
    measured = measure_stages(made, step, *examples, range(num_stages), repeats=1)
    batches = list(next(iter(split_batches(loader, NUM_MICROBATCHES, False))))
    return SimpleNamespace(measured=measured, sharing=Sharing(made, step, measured.potential, batches))


def test_bytes_are_those_of_training(found: SimpleNamespace, pool: RankPool) -> None:
    """What a step of two graph ranks really sends, byte by byte."""
    one_stage = found.whole.sharing
    predicted = []
    for rank in range(2):
        group = CountingGroup(rank, 2)
        axis = GraphAxis(one_stage._staged, one_stage._potential, GraphGroup(2, rank, group))
        walks = [one_stage.walk_of(one_stage._staged, t, axis, group)()[1] for t in one_stage._tensors]
        sent = [pair for walk in walks for pair in walk.values()]
        predicted.append((sum(size for size, _ in sent), sum(number for _, number in sent)))
    real = pool.run(sent_in_a_step, SMALL, tiny.data, NUM_MICROBATCHES, world_size=2)
    assert predicted == real and real[0][1] > 4 * NUM_MICROBATCHES
    share = one_stage.share(2)
    most = max(size for size, _ in real) / NUM_MICROBATCHES
    assert most <= share.bytes_sent <= sum(size for size, _ in real) / NUM_MICROBATCHES
    assert share.num_exchanges == pytest.approx(real[0][1] / NUM_MICROBATCHES)


def test_shares(found: SimpleNamespace) -> None:
    one, two, four = (found.sharing.share(size) for size in (1, 2, 4))
    assert one.bytes_sent == 0 and one.time == one.memory == 1 and one.num_whole == one.num_microbatches == 4
    for share in (two, four):
        assert not share.refused and share.halo is not None
        assert 1 <= share.atoms < 1.5 and 1 <= share.edges < 1.5 and share.num_whole < 4
        assert share.halo["edge"] == 0 and 0 < share.halo["atom"] <= share.num_ranks - 1
        assert 1 / share.num_ranks < share.memory < 1.5 / share.num_ranks
    assert four.bytes_sent > two.bytes_sent > 0 and four.time > 0
    # With other stages of the same potential only exchanges are counted anew.
    again = found.sharing.share(2, replace(two, time=0.123, memory=0.456))
    assert (again.time, again.memory) == (0.123, 0.456) and again.together == two.together
    # Deferred weight gradients leave exchanges of BE that only parameters wait for to WE.
    assert {phase for phase, _ in two.deferred or {}} == {"fe", "ff", "bf", "be", "we"}


def test_costs_of_a_share(found: SimpleNamespace) -> None:
    measured: Measured = found.measured
    link = GraphLink(latency=0.5, bandwidth=100.0)
    share = GraphShare(2, atoms=1.2, time=0.6, memory=0.7, together={("ff", 1): (300.0, 4.0)}, deferred={})
    stages, whole = costs_of_share(measured, 2, share, link), measured.stages(2)
    assert isinstance(stages.costs, tuple) and isinstance(stages.memory, tuple)
    for stage in range(2):
        for name in ("fe", "ff", "bf", "be"):
            more = 4 * 0.5 + 300 / 100 if (name, stage) == ("ff", 1) else 0.0
            assert getattr(stages.costs[stage], name) == pytest.approx(
                0.6 * getattr(measured.costs[stage], name) + more
            )
        assert stages.memory[stage].energy == pytest.approx(0.7 * measured.memory[stage].energy)
    assert stages.typical_message == pytest.approx(whole.typical_message * 1.2 / 2)


@pytest.mark.parametrize(
    ("potential", "why"), [(graph_models.MeanField, "combines all atoms"), (SelfDividing, "can be traced")]
)
def test_refused(potential: Any, why: str) -> None:
    share = captured(lambda: graph_models.Module(potential()), graph_models.Data, 1).sharing.share(2)
    assert why in share.refused and share.to_dict() == {"graph_size": 2, "refused": share.refused}


class TestMeshes:
    SHARES: ClassVar = {
        1: GraphShare(1, halo={}, num_whole=4, num_microbatches=4),
        2: GraphShare(2, atoms=1.0, time=0.9, memory=0.5, together={("fe", 0): (1e6, 1.0)}, deferred={}),
        4: GraphShare(4, refused="no exchange for it"),
    }

    def compare(
        self,
        found: SimpleNamespace,
        limit: float | None = None,
        shares: dict[int, GraphShare] = SHARES,
        accumulates: bool = False,
    ) -> Meshes:
        def measure(num_stages: int) -> Measured:
            if num_stages > 2:
                raise TooManyRanks(num_stages, 2)
            costs = COSTS if num_stages == 2 else PhaseCosts(0.02, 0.02, 0.02, 0.02)
            memory = MEMORY if num_stages == 2 else MemoryCosts(2.5e6, 2.5e6, 0)
            part = {"costs": (costs,) * num_stages, "deferred": (costs,) * num_stages}
            of_stages: Measured = found.measured if num_stages == 2 else found.whole.measured
            return replace(of_stages, **part, memory=(memory,) * num_stages, deferred_memory=(memory,) * num_stages)

        return compare_meshes(
            4,
            shares,
            measure,
            lambda _, share: share,
            SMALL().potential,
            PlanOptions(1, 4, memory_limit=limit, latency=20e-6, bandwidth=1e9, accumulates=accumulates),
            ["gpipe", "wavek"],
            GraphLink(20e-6, 1e9),
            structures=2,
            atoms=None,
        )

    def test_replicas_where_all_fits(self, found: SimpleNamespace) -> None:
        meshes = self.compare(found)
        assert {(r.shape.pipeline, r.shape.data, r.shape.graph) for r in meshes.rows} == {
            *((1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2))
        }
        assert meshes.left_out == ("pipeline_size=4: " + str(TooManyRanks(4, 2)),)
        best = meshes.choice
        assert best is not None and best is meshes.rows[0] and best.shape == MeshShape(1, 4, 1)
        # Four micro-batches of two structures on each of four replicas, none of which waits.
        assert best.after is not None and best.structures == 32
        assert best.step_time == pytest.approx(4 * 0.08 + best.after)
        assert best.structures_per_second == pytest.approx(32 / (0.32 + best.after))
        weights = sum(p.nbytes for p in SMALL().potential.parameters())
        assert best.after == pytest.approx(2 * 3 * (20e-6 + weights / 4 / 1e9))
        chosen = next(row for row in meshes.rows if row.shape == MeshShape(1, 2, 2))
        exchanged = 20e-6 + 1e6 / 1e9
        assert chosen.plan.choice is not None
        assert chosen.plan.choice.report.makespan == pytest.approx(4 * (0.9 * 0.08 + exchanged))
        assert best.arguments().startswith("JanusPipeStrategy(pipeline_size=1, data_size=4, graph_size=1, ")

    def test_replicas_where_graph_ranks_are_hardly_faster(self, found: SimpleNamespace) -> None:
        for time, expected in ((0.49, MeshShape(1, 4, 1)), (0.45, MeshShape(1, 2, 2))):
            halved = replace(self.SHARES[2], time=time, together={})
            meshes = self.compare(found, shares={**self.SHARES, 2: halved})
            assert meshes.rows[0].shape == MeshShape(1, 2, 2)
            assert meshes.choice is not None and meshes.choice.shape == expected

    def test_as_many_stages_and_graph_ranks_as_memory_needs(self, found: SimpleNamespace) -> None:
        # One rank has to hold 5 MB, two graph ranks hold 2.5 MB each, two stages 2 MB, both together 1 MB, and less
        # than 100 kB of state.
        for limit, fitting in ((5.1e6, 4), (2.6e6, 3), (2.1e6, 2), (1.1e6, 1), (0.9e6, 0)):
            meshes = self.compare(found, limit)
            assert sum(row.fits for row in meshes.rows) == fitting and len(meshes.rows) == 4
            assert [row.fits for row in meshes.rows] == [True] * fitting + [False] * (4 - fitting)
            assert all(row.memory is not None and (row.memory <= limit) == row.fits for row in meshes.rows)
        best = self.compare(found, 4.1e6).choice
        assert best is not None and best.shape == MeshShape(2, 2, 1)
        best = self.compare(found, 1.1e6).choice
        assert best is not None and best.shape == MeshShape(2, 1, 2) and "memory_limit=1.1e+06" in best.arguments()
        assert self.compare(found, 0.9e6).choice is None

    def test_state_within_a_limit(self, found: SimpleNamespace) -> None:
        """A limit between the levels takes the one that shares enough, and the answer has it."""
        weights = sum(p.nbytes for p in SMALL().potential.parameters())
        for of_weights, level in ((4.1, "none"), (2.6, "optimizer")):
            meshes = self.compare(found, 5e6 + of_weights * weights)
            row = next(row for row in meshes.rows if row.shape == MeshShape(1, 4, 1))
            assert row.plan.options.level == level and row.memory == pytest.approx(
                5e6 + row.plan.options.share.in_phases
            )
            assert [p.options.level for p in row.levels] == ["none", "optimizer", "parameters"]
            assert ('shard="optimizer"' in row.arguments()) == (level == "optimizer")
            assert [p.options.share.in_phases / weights for p in row.levels] == pytest.approx([4, 2.5, 2.75])
            assert row.plan.options.share.sent == pytest.approx(2 * 3 / 4 * weights)

    def test_accumulated_gradients_within_a_limit(self, found: SimpleNamespace) -> None:
        """Without shards the gradients of accumulated batches are there beside the sums of the present batch."""
        weights = sum(p.nbytes for p in SMALL().potential.parameters())
        for of_weights, level in ((4.1, "optimizer"), (5.1, "none")):
            meshes = self.compare(found, 5e6 + of_weights * weights, accumulates=True)
            row = next(row for row in meshes.rows if row.shape == MeshShape(1, 4, 1))
            assert row.plan.options.level == level
            assert [p.options.share.in_phases / weights for p in row.levels] == pytest.approx([5, 2.5, 2.75])

    def test_shapes(self) -> None:
        assert MeshShape(3, 2, 1) in shapes(6, (1, 4)) and {s.graph for s in shapes(6, (1, 4))} == {1}
        assert all(s.size == 8 for s in shapes(8, (1, 2, 4))) and len(shapes(8, (1, 2, 4))) == 4 + 3 + 2


class TestCommand:
    def write_recipe(self, **arguments: Any) -> str:
        strategy = {"class_path": "lightning_januspipe.JanusPipeStrategy", "init_args": arguments}
        potential = {
            "class_path": "lightning_januspipe.models.EquivariantPotential",
            "init_args": {"num_layers": 2, "num_features": 4, "l_max": 1},
        }
        content = {
            "trainer": {"accelerator": "cpu", "devices": 4, "strategy": strategy},
            "model": {
                "class_path": "lightning_januspipe.models.PotentialModule",
                "init_args": {"potential": potential},
            },
            "data": {
                "class_path": "lightning_januspipe.data.EMTDataModule",
                "init_args": {"num_train": 8, "num_val": 2, "num_test": 2, "sizes": [4, 8], "cutoff": 4.0},
            },
        }
        Path("recipe.yaml").write_text(yaml.safe_dump(content))
        return "recipe.yaml"

    @pytest.fixture(autouse=True)
    def in_tmp_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)

    def test_recipe_with_graph_ranks(self, capsys: pytest.CaptureFixture[str]) -> None:
        recipe = self.write_recipe(pipeline_size=2, graph_size=2, num_microbatches=2)
        more = ["--repeats", "1", "--schedules", "wavek", "--output", "out"]
        main(["plan", "--config", recipe, *more, "--latency", "1"])
        text = capsys.readouterr().out
        content = json.loads(Path("out/plan.json").read_text())
        assert content["graph_size"] == 2 and [share["graph_size"] for share in content["graph"]] == [1, 2]
        assert "sharded over 2 graph ranks: 2 ranks of the pipeline are 4" in text
        (row,) = content["schedules"]
        # Each exchange takes a second, and nothing else takes long.
        assert row["step_time"] > 2 * content["graph"][1]["num_exchanges"] / 2

    def test_meshes(self, capsys: pytest.CaptureFixture[str]) -> None:
        recipe = self.write_recipe(pipeline_size=2, data_size=2)
        more = ["--repeats", "1", "--schedules", "gpipe,wavek", "--num_microbatches", "2", "--output", "out"]
        main(["plan", "--config", recipe, "--meshes", "--graph_sizes", "1,2", *more])
        text = capsys.readouterr().out
        content = json.loads(Path("out/plan.json").read_text())
        sizes = [(m["pipeline_size"], m["data_size"], m["graph_size"]) for m in content["meshes"]]
        assert {(1, 4, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2)} <= set(sizes)
        rates = [m["structures_per_second"] for m in content["meshes"]]
        assert rates == sorted(rates, reverse=True)
        (line,) = re.findall(r"→ (JanusPipeStrategy\(.*\))", text)
        made: Any = eval(line, {"JanusPipeStrategy": dict})
        assert (made["pipeline_size"], made["data_size"], made["graph_size"]) in sizes
        assert made["schedule"] == content["choice"] and made["num_microbatches"] == 2
        assert "State of the largest rank, with Adam" in text
        assert [len(m["levels"]) for m in content["meshes"]] == [3] * len(sizes)

    def test_costs_have_no_micro_batches(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["plan", "--costs", "1,1,1,1", "--ranks", "2", "--meshes"])
        assert "--meshes is for a recipe" in capsys.readouterr().err
