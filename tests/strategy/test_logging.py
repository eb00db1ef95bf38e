"""What modules log, metrics of torchmetrics, and loggers: the numbers of plain Lightning, on every rank, once."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import logging_workers as workers
import pytest
import torch
from logging_workers import DDP, check
from torch import nn

from lightning_januspipe.strategy.gradient_norm import grad_norm
from lightning_januspipe.testing import RankPool

PIPELINE: dict[str, Any] = {"num_microbatches": 1, "schedule": "wavek"}
INFERRED = ("unsized", "end", "from_callback", "reduced_mean")
"""Logged without a batch size: Lightning takes the first tensor's length, which is the number of atoms here."""


def history(result: dict[str, Any], without: tuple[str, ...] = ()) -> list[Any]:
    """What a rank has seen, but for names that begin with some words."""
    return [
        (when, {view: {k: v for k, v in names.items() if not k.startswith(without)} for view, names in seen.items()})
        for when, seen in result["history"]
    ]


def rows(result: dict[str, Any]) -> list[dict[str, float]]:
    """The file of a CSVLogger."""
    with (Path(result["folder"]) / "metrics.csv").open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def single(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Plain Lightning in one process, with two loggers."""
    arguments = (None, str(tmp_path_factory.mktemp("single")), "lightning", 4, 1e-3, 12, "several")
    (result,) = pool.run(workers.fit_and_log, *arguments, world_size=1)
    return result  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def piped(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The same in a pipeline."""
    arguments = (PIPELINE, str(tmp_path_factory.mktemp("piped")), "lightning", 4, 1e-3, 12, "several")
    return pool.run(workers.fit_and_log, *arguments, world_size=2)


@pytest.fixture(scope="module")
def ddp(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Plain Lightning's DDP in two processes."""
    return pool.run(workers.fit_and_log, DDP, str(tmp_path_factory.mktemp("ddp")), "lightning", 2, world_size=2)


def test_every_form_of_logging(single: dict[str, Any], piped: list[dict[str, Any]]) -> None:
    """After each batch, validation and epoch, every rank shows what plain Lightning shows."""
    last = single["history"][-1][1]["callback_metrics"]
    names = ("both_step", "both_epoch", "reduced_max", "val_step_epoch/dataloader_idx_1", "val_own_1", "end_epoch")
    assert set(names) <= set(last) and "grad_2.0_norm/potential.layers.0.mix.weight" in last
    assert {"hidden_step", "both_step"} <= set(single["history"][-1][1]["progress_bar_metrics"])
    assert "hidden_step" not in single["history"][-1][1]["logged_metrics"]
    for rank, found in enumerate(piped):
        # A rank other than zero shows what is logged there only, as in DDP.
        without = ("zero",) if rank else ()
        check(history(single, without), history(found, without), f"rank {rank}")
        check(single["state"], found["state"])


def test_metrics_of_torchmetrics_count_each_sample_once(single: dict[str, Any], piped: list[dict[str, Any]]) -> None:
    """Updated before the potential and after it, in training and in validation."""
    sizes = workers.SIZES
    for result in (single, *piped):
        last = result["history"][-1][1]["callback_metrics"]
        assert last["metric_atoms"] == sum(sizes[i] for i in range(12))
        assert last["metric_mean"] == pytest.approx(last["epoch_end"], rel=1e-12)
        assert {"train_mae", "train_mse", "val_mae", "val_mse"} <= set(last)


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2)], ids=["two replicas", "two pipelines"])
def test_replicas_log_as_in_ddp(
    pool: RankPool, ddp: list[dict[str, Any]], tmp_path: Path, mesh: tuple[int, int]
) -> None:
    strategy = {"pipeline_size": mesh[0], "data_size": mesh[1], "num_microbatches": 1}
    ranks = pool.run(workers.fit_and_log, strategy, str(tmp_path), "lightning", 2, world_size=math.prod(mesh))
    synced = [r["history"][-1][1]["callback_metrics"] for r in ddp]
    assert synced[0]["epoch"] == synced[1]["epoch"] and synced[0]["own"] != synced[1]["own"]
    for rank, found in enumerate(ranks):
        without = ("zero",) if rank else ()
        check(history(ddp[rank % 2], without), history(found, without), f"rank {rank}")
    check(rows(ddp[0]), rows(ranks[0]))


@pytest.mark.parametrize("mesh", [(1, 2), (2, 2), (2, 1)], ids=["two replicas", "two pipelines", "one pipeline"])
def test_warning_of_values_that_are_not_reduced(pool: RankPool, mesh: tuple[int, int]) -> None:
    """Lightning's warning comes where ranks have unequal values, in training and validation, and only there."""
    strategy = {"pipeline_size": mesh[0], "data_size": mesh[1], "num_microbatches": 1}
    ranks = pool.run(workers.fit_unreduced, strategy, world_size=math.prod(mesh))
    for name in ("train_own", "val_own"):
        assert len({metrics[name] for metrics, _ in ranks}) == mesh[1]
        assert any(f"self.log('{name}'" in text for text in ranks[0][1]) == (mesh[1] > 1)
        assert len({metrics[name.replace("own", "mean")] for metrics, _ in ranks}) == 1
    for _, texts in ranks:
        assert not any("_mean'" in text for text in texts)


@pytest.mark.parametrize("world", [1, 2])
def test_micro_batches_weigh_their_samples(pool: RankPool, tmp_path: Path, world: int) -> None:
    """Batches of 6 and 5 samples in 4 micro-batches of 1 or 2, with a learning rate of 0: as the whole batches."""
    settings = ("lightning", 6, 0.0, 11)
    (expected,) = pool.run(workers.fit_and_log, None, str(tmp_path / "a"), *settings, world_size=1)
    strategy = {"num_microbatches": 4}
    for rank, found in enumerate(pool.run(workers.fit_and_log, strategy, str(tmp_path), *settings, world_size=world)):
        without = ("grad", *INFERRED, *(("zero",) if rank else ()))
        check(history(expected, without), history(found, without), f"rank {rank}")
        last = found["history"][-1][1]["callback_metrics"]
        assert last["end_epoch"] == pytest.approx((6 * 1 + 5 * 2) / 11, rel=1e-12), "not weighted by samples"
        assert last["from_callback_epoch"] == pytest.approx((6 * 3 + 5 * 4) / 11, rel=1e-12)
        assert last["unsized"] == pytest.approx(last["epoch"], rel=1e-12)


def test_norms_of_gradients_of_the_whole_model(single: dict[str, Any], piped: list[dict[str, Any]]) -> None:
    """Each rank has the gradients of its own stages; ``gradient_norm.grad_norm`` gives those of all, on every rank."""
    names = {f"grad_2.0_norm/potential.{n}" for n in single["state"] if not n.startswith("charge")}
    for result in (single, *piped):
        last = result["history"][-1][1]["callback_metrics"]
        assert {n for n in last if n.startswith("grad_2.0_norm/")} == names
        squares = sum(last[n] ** 2 for n in names)
        assert last["grad_2.0_norm_total"] == pytest.approx(squares**0.5, rel=1e-12)


@pytest.mark.parametrize("norm_type", [1, 2.0, "inf"])
def test_norms_of_gradients_are_those_of_lightning(norm_type: Any) -> None:
    from lightning.pytorch.utilities import grad_norm as of_lightning

    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(2, 2)).double()
    module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))  # type: ignore[assignment]
    assert grad_norm(module, norm_type) == of_lightning(module, norm_type) == {}
    module[:2](torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    expected = of_lightning(module, norm_type, "_")
    found = grad_norm(module, norm_type, "_")
    assert len(found) == 5 and found.keys() == expected.keys()
    for name in found:
        assert float(found[name]) == pytest.approx(float(expected[name]), rel=1e-6), (
            name
        )  # Lightning's total is float32
    with pytest.raises(ValueError, match="norm_type=0; expected a positive number"):
        grad_norm(module, 0)


# -- loggers ---------------------------------------------------------------------------------------------------------


def test_files_of_a_csv_logger(single: dict[str, Any], piped: list[dict[str, Any]]) -> None:
    """With what the step gives the logger by hand, which capture does not add to."""
    expected = rows(single)
    assert sum("by_hand" in row for row in expected) == 6
    check(expected, rows(piped[0]))
    assert {p.name for p in Path(piped[0]["folder"]).iterdir()} == {p.name for p in Path(single["folder"]).iterdir()}


def test_files_of_tensorboard(single: dict[str, Any], piped: list[dict[str, Any]]) -> None:
    """One rank writes one file of events, with the same values at the same steps, and hyperparameters."""
    pytest.importorskip("tensorboard")
    expected, found = board(single), board(piped[0])
    assert {"both_step", "both_epoch", "val_loss/dataloader_idx_0", "hp_metric"} <= set(expected)
    check(expected, found)
    files = [(Path(r["folder"]) / "board" / "hparams.yaml").read_text() for r in (single, piped[0])]
    assert files[0] == files[1] and "learning_rate: 0.001" in files[0]


def board(result: dict[str, Any]) -> dict[str, list[tuple[int, float]]]:
    """Steps and values in the files of events."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = Path(result["folder"]) / "board"
    assert len(list(folder.glob("events.*"))) == 1
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_run_of_wandb(pool: RankPool, tmp_path: Path) -> None:
    """Offline: one rank makes one run, with the values and hyperparameters of plain Lightning."""
    pytest.importorskip("wandb")
    (single,) = pool.run(workers.fit_for_wandb, None, str(tmp_path), world_size=1)
    first, _ = pool.run(workers.fit_for_wandb, PIPELINE, str(tmp_path), world_size=2)
    runs = [p for p in (Path(first["folder"]) / "wandb").iterdir() if p.name.startswith("offline-run")]
    assert len(runs) == 1, "another rank has made a run"
    (expected, config), (found, same) = workers.wandb_run(single["folder"]), workers.wandb_run(first["folder"])
    assert config["learning_rate"] == same["learning_rate"] == 1e-3
    assert {"both_step", "by_hand", "val_mae", "trainer/global_step", "epoch"} <= set(expected)
    timing = ("_runtime", "_timestamp")
    check(*({k: v for k, v in values.items() if not k.startswith(timing)} for values in (expected, found)))


def test_progress_bar_on_one_rank(pool: RankPool) -> None:
    first, second = pool.run(workers.shown_by_tqdm, PIPELINE, world_size=2)
    assert "both_step=" in first and "2/2" in first
    assert "both_step" not in second and "it/s" not in second


@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_the_other_lightning(pool: RankPool, tmp_path: Path, num_microbatches: int) -> None:
    pytest.importorskip("pytorch_lightning")
    settings = ("pytorch_lightning", 4, 1e-3, 8)
    (expected,) = pool.run(workers.fit_and_log, None, str(tmp_path / "a"), *settings, world_size=1)
    strategy = {"num_microbatches": num_microbatches}
    for rank, found in enumerate(pool.run(workers.fit_and_log, strategy, str(tmp_path), *settings, world_size=2)):
        # Micro-batches of one sample each, so that the gradient is that of the batch.
        without = (*(("zero",) if rank else ()), *(INFERRED if num_microbatches > 1 else ()))
        check(history(expected, without), history(found, without), f"rank {rank}")
        check(expected["state"], found["state"])
