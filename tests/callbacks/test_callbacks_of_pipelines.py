"""PipelineMonitor and StageSummary, in one process and on the ranks of pipelines."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import callback_workers as workers
import pytest
import tiny

from lightning_januspipe.callbacks import PipelineMonitor
from lightning_januspipe.callbacks.summary import describe
from lightning_januspipe.testing import RankPool, quiet_trainer

PHASES = ("FE", "FF", "BF", "BE")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("monitor")


@pytest.fixture(scope="module")
def monitored(pool: RankPool, folder: Path) -> list[dict]:
    """Three epochs of three batches with every third recorded, of each rank."""
    return pool.run(workers.monitored, {"num_microbatches": 4, "schedule": "1f1b-fold"}, str(folder), world_size=2)


class TestMonitor:
    def test_all_ranks_have_the_same_numbers(self, monitored: list[dict]) -> None:
        first, second = monitored
        assert first["history"] == second["history"] and first["metrics"] == second["metrics"]
        assert [(h["batch"], h["global_step"]) for h in first["history"]] == [(2, 2), (5, 4), (8, 6)]
        assert first["metrics"] == pytest.approx({k: v for k, v in first["history"][-1].items() if "/" in k})

    def test_numbers_of_a_step(self, monitored: list[dict]) -> None:
        first, second = monitored
        for found in first["history"]:
            get = lambda name, found=found: found[f"januspipe/{name}"]  # noqa: E731
            assert get("bubble_fraction") == min(get("bubble_fraction/rank0"), get("bubble_fraction/rank1"))
            assert 0 <= get("bubble_fraction") < 1
            for stage in (0, 1):
                busy = 4 * sum(get(f"{phase}_ms/stage{stage}") for phase in PHASES)
                assert 1 - busy / get("step_ms") == pytest.approx(get(f"bubble_fraction/rank{stage}"), abs=1e-6)
            assert get("message_bytes") == first["sent"][found["batch"]] + second["sent"][found["batch"]] > 0
            assert 1 <= get("microbatch_imbalance") < 4
        # The batches of an epoch hold 20 structures; in the first epoch the first batch is left out.
        for found in first["history"][1:]:
            atoms = found["januspipe/atoms_per_s"] / found["januspipe/structures_per_s"] * 20
            assert atoms == pytest.approx(round(atoms)) and 80 <= atoms <= 320

    def test_memory_is_as_planned(self, monitored: list[dict]) -> None:
        found, planned = monitored[0]["history"][-1], monitored[0]["held"]
        for rank in (0, 1):
            held = found[f"januspipe/peak_memory_bytes/rank{rank}"]
            assert 0.3 < held / planned[rank] < 3, (held, planned)

    def test_loggers_get_the_numbers(self, monitored: list[dict], folder: Path) -> None:
        rows = list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))
        logged = [(int(r["step"]), r) for r in rows if r.get("januspipe/step_ms")]
        assert [step for step, _ in logged] == [1, 3, 5], "numbers of optimizer steps, as of all that is logged"
        for (_, row), found in zip(logged, monitored[0]["history"], strict=True):
            for name, value in found.items():
                assert "/" not in name or float(row[name]) == pytest.approx(value)

    def test_picture_and_numbers(self, monitored: list[dict], folder: Path) -> None:
        facts = json.loads((folder / "pipeline-monitor.json").read_text())
        assert facts["steps"] == monitored[0]["history"]
        assert (facts["mesh"], facts["schedule"]) == ({"pipeline": 2, "data": 1}, "1f1b-fold")
        picture = (folder / "pipeline-monitor.svg").read_text()
        for name in ("panel0-FE", "panel1-BE", "curve-atoms/s", "curve-bubble fraction", "curve-step (ms)"):
            assert f'id="{name}"' in picture, name
        assert "1f1b-fold" in picture or "panel1-bubbles" in picture

    @pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
    def test_early_stopping_reads_the_numbers(self, pool: RankPool, namespace: str) -> None:
        assert pool.run(workers.stopped_by_a_metric, namespace, world_size=2) == [(3, 3), (3, 3)]

    def test_replicas(self, pool: RankPool, tmp_path: Path) -> None:
        """Two pipelines of two ranks, the second one slower."""
        strategy = {"pipeline_size": 2, "data_size": 2, **workers.FOLDED}
        results = pool.run(workers.slow_replica, strategy, str(tmp_path), world_size=4)
        (found,), _ = results[0]
        assert all(history == [found] for history, _ in results)
        assert 1.2 < found["januspipe/replica_imbalance"] < 2
        atoms = results[0][1][1] + results[1][1][1]  # of the second batches of both replicas
        assert found["januspipe/atoms_per_s"] / found["januspipe/structures_per_s"] == pytest.approx(atoms / 8)
        assert 'id="panel2-FE"' in (tmp_path / "pipeline-monitor.svg").read_text(), "prediction and two replicas"

    def test_a_rank_that_fails(self, pool: RankPool, tmp_path: Path) -> None:
        first, second = pool.run(workers.failing, str(tmp_path), world_size=2, timeout=60.0)
        assert second == "OSError: disk full" and first and "disk full" not in first
        facts = json.loads((tmp_path / "pipeline-monitor.json").read_text())
        assert [h["batch"] for h in facts["steps"]] == [0, 1, 2]
        assert 'id="curve-step (ms)"' in (tmp_path / "pipeline-monitor.svg").read_text()

    def test_a_run_that_is_too_short(self, tmp_path: Path) -> None:
        monitor = PipelineMonitor(every_n_steps=50, dirpath=str(tmp_path))
        trainer = quiet_trainer(None, callbacks=[monitor], max_steps=2, limit_val_batches=0)
        with pytest.warns(UserWarning, match="PipelineMonitor: training ended after 2 batches"):
            trainer.fit(tiny.module(num_layers=1), tiny.data())
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("strategy", [{"num_microbatches": 2}, None])
    def test_without_a_pipeline(self, tmp_path: Path, strategy: dict | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WORLD_SIZE", "1")
        monitor = PipelineMonitor(every_n_steps=2, dirpath=str(tmp_path))
        trainer = quiet_trainer(strategy, callbacks=[monitor], max_steps=4, limit_val_batches=0)
        trainer.fit(tiny.module(num_layers=1), tiny.data())
        names = {name.removeprefix("januspipe/") for name in monitor.history[-1]} - {"batch", "global_step"}
        throughput = {"atoms_per_s", "structures_per_s"}
        assert names == (throughput | {"step_ms", "microbatch_imbalance"} if strategy else throughput)
        assert (tmp_path / "pipeline-monitor.svg").exists()

    def test_arguments(self) -> None:
        with pytest.raises(ValueError, match="every_n_steps=0"):
            PipelineMonitor(every_n_steps=0)
        with pytest.raises(ValueError, match="suffix='pdf'"):
            PipelineMonitor(suffix="pdf")


class TestStageSummary:
    def test_stages_of_all_parts(self, pool: RankPool) -> None:
        (text, held), (nothing, _) = pool.run(workers.stage_summary, {"schedule": "1f1b-fold"}, world_size=2)
        assert not nothing.strip(), "one rank prints"
        cells = [[c.strip() for c in line.split("│")[1:-1]] for line in text.splitlines() if line.startswith("│")]
        stage_of = {row[1]: row[-1] for row in cells}
        assert stage_of["potential"] == "0-1" and stage_of["potential.energy_model.embedding"] == "0"
        layers = {n: s for n, s in stage_of.items() if n.startswith("potential.energy_model.layers.")}
        assert len(layers) == 4
        for name, stages in layers.items():
            ranks = sorted({r for n, of in held.items() if n.startswith(name + ".") for r in of})
            assert stages == describe(ranks), "stages are on the ranks of their numbers"
        assert {"0", "1"} <= set(layers.values()) | {stage_of["potential.energy_model.readout"]}
        assert "Parameters: 10,192" in text and "rank 0: 0, rank 1: 1" in text
        assert text.count("10.2 K") == 2, "the whole model, once"

    def test_without_a_pipeline(self, pool: RankPool) -> None:
        ((text, _),) = pool.run(workers.stage_summary, None, world_size=1)
        assert "Parameters: 10,192" in text and "Stage" not in text

    def test_ranges(self) -> None:
        assert [describe(s) for s in ([], [3], [0, 1, 2], [5, 0, 2, 1])] == ["–", "3", "0-2", "0-2, 5"]
