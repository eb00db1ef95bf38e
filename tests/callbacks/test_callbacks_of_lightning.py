"""Lightning's own callbacks and profilers in a pipeline: as in plain Lightning, on every rank."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import callback_workers as workers
import pytest
from pools import slow

from lightning_januspipe.testing import RankPool

PIPELINE: dict[str, Any] = {"num_microbatches": 1, "schedule": "wavek"}


@pytest.fixture(scope="module")
def fits(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One training of each rank, after that of plain Lightning."""
    folder = str(tmp_path_factory.mktemp("fits"))
    (plain,) = pool.run(workers.fit_with_callbacks, None, folder, world_size=1)
    return [plain, *pool.run(workers.fit_with_callbacks, PIPELINE, folder, world_size=2)]


@pytest.fixture(scope="module")
def evaluations(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Prediction, validation and test of each rank, after those of plain Lightning."""
    folder = str(tmp_path_factory.mktemp("evaluations"))
    (plain,) = pool.run(workers.evaluate_with_callbacks, None, folder, world_size=1)
    return [plain, *pool.run(workers.evaluate_with_callbacks, PIPELINE, folder, world_size=2)]


def test_order_of_hooks_in_fit(fits: list[dict[str, Any]]) -> None:
    plain, *ranks = (f["hooks"] for f in fits)
    assert plain.count("on_train_batch_end") == 9 and plain.count("on_before_zero_grad") >= 5
    assert plain.count("on_validation_epoch_end") == 4, "three epochs and the sanity check"
    for rank in ranks:
        assert rank == plain


def test_order_of_hooks_in_evaluation(evaluations: list[dict[str, Any]]) -> None:
    plain, *ranks = (e["hooks"] for e in evaluations)
    assert {"on_predict_batch_end", "on_validation_epoch_end", "on_test_batch_start"} <= set(plain)
    for rank in ranks:
        assert rank == plain


def test_early_stopping(fits: list[dict[str, Any]]) -> None:
    plain, *ranks = fits
    assert plain["stopped"] == (2, 3, 6) and plain["wait"] == 2
    for rank in ranks:
        assert (rank["stopped"], rank["wait"]) == (plain["stopped"], plain["wait"])
        assert rank["best"] == pytest.approx(plain["best"], rel=1e-9)


def test_model_summary_counts_the_whole_model(fits: list[dict[str, Any]]) -> None:
    plain, *ranks = (f["summary"] for f in fits)
    assert plain["total"] == 10192
    assert ranks == [plain, plain]


def test_progress_bar_shows_the_same(fits: list[dict[str, Any]]) -> None:
    plain, *ranks = (f["progress"] for f in fits)
    assert "val_loss" in plain
    for rank in ranks:
        assert rank == pytest.approx(plain, rel=1e-9)


def test_logged_learning_rates_statistics_and_losses(fits: list[dict[str, Any]]) -> None:
    plain, first, second = (list(csv.DictReader(io.StringIO("\n".join(f["csv"])))) for f in fits)
    assert first and not second, "one rank logs"
    assert first[0].keys() == plain[0].keys()
    assert {"lr-Adam", "DeviceStatsMonitor.on_train_batch_end/cpu_percent"} <= plain[0].keys()
    rates = [row["lr-Adam"] for row in plain if row["lr-Adam"]]
    assert len(set(rates)) > 3
    for mine, theirs in zip(first, plain, strict=True):
        for name in mine:
            assert bool(mine[name]) == bool(theirs[name]), name
            if mine[name] and "DeviceStats" not in name:
                assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-9), name


def test_timer_stops_in_the_same_step(pool: RankPool) -> None:
    assert pool.run(workers.timed, None, world_size=1) == [5]
    assert pool.run(workers.timed, PIPELINE, world_size=2) == [5, 5]


def test_prediction_writers(evaluations: list[dict[str, Any]]) -> None:
    plain, *ranks = (e["files"] for e in evaluations)
    assert set(plain) == {"batch-0.json", "epoch.json"}
    indices = plain["batch-0.json"][1]
    assert indices == [0, 1, 2, 3] and plain["epoch.json"][1] == [[indices]]
    for rank in ranks:
        assert set(rank) == set(plain)
        for name in plain:
            assert rank[name][1] == plain[name][1]
        mine, theirs = rank["batch-0.json"][0], plain["batch-0.json"][0]
        for quantity in theirs:
            assert flat(mine[quantity]) == pytest.approx(flat(theirs[quantity]), rel=1e-9, abs=1e-11)
        assert rank["epoch.json"][0] == [mine]


def flat(values: Any) -> list[float]:
    return [x for v in values for x in flat(v)] if isinstance(values, list) else [values]


@pytest.mark.parametrize("name", [slow("simple"), slow("advanced"), "pytorch"])
def test_phases_have_names_in_profilers(pool: RankPool, tmp_path: Path, name: str) -> None:
    seen = pool.run(workers.profiled, name, str(tmp_path), world_size=2)
    text = "\n".join(t for files in seen for t in files.values())
    phases = {tuple(found) for found in re.findall(r"\[JanusPipe\](\w\w) stage (\d+)", text)}
    assert {phase for phase, _ in phases} == {"FE", "FF", "BF", "BE", "WF", "WE"}
    assert {"0", "1"} <= {stage for _, stage in phases}


def test_phases_have_names_in_torchs_profiler(pool: RankPool) -> None:
    found = pool.run(workers.under_torch_profiler, world_size=2)
    for counts in found:
        assert len(counts) >= 6
        assert {name.split()[0][-2:] for name in counts} == {"FE", "FF", "BF", "BE", "WF", "WE"}
        assert set(counts.values()) == {2}, "two micro-batches in one step"
