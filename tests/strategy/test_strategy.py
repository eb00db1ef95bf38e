"""The strategy under a Trainer: evaluation, checkpoints, logging, launching, both Lightnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import strategy_workers as workers
import torch
from pools import slow

import lightning_januspipe
from lightning_januspipe.testing import RankPool

TWO = {"num_microbatches": 1}


def close(a: Any, b: Any, rtol: float = 1e-9) -> None:
    """Nested numbers agree."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key], rtol)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            close(x, y, rtol)
    elif isinstance(a, torch.Tensor):
        assert torch.allclose(a, b, rtol=rtol, atol=1e-13)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=rtol, abs=1e-13)
    else:
        assert a == b


def test_validate_test_and_predict(pool: RankPool) -> None:
    (expected,) = pool.run(workers.evaluate, None, {}, world_size=1)
    assert expected["predict"] and expected["test"]
    for found in pool.run(workers.evaluate, TWO, {}, world_size=2):
        close(expected, found)


def test_evaluation_in_one_process_leaves_inference_mode(pool: RankPool) -> None:
    (expected,) = pool.run(workers.evaluate, None, {"inference_mode": False}, world_size=1)
    (found,) = pool.run(workers.evaluate, {}, {"inference_mode": True}, world_size=1)
    close(expected, found)


def test_validation_and_logging_in_training(pool: RankPool) -> None:
    """Callback metrics of every rank are those of plain Lightning, at the end of training and of a test."""
    arguments = {"max_epochs": 2, "num_sanity_val_steps": 2}
    (expected,) = pool.run(workers.fit_then_evaluate, None, arguments, world_size=1)
    for found in pool.run(workers.fit_then_evaluate, TWO, arguments, world_size=2):
        close(expected, found)


def test_logged_values_are_means_over_microbatches(pool: RankPool) -> None:
    """A mean over structures, weighted with the sizes of the micro-batches, is the mean over the whole batch."""
    (expected,) = pool.run(workers.fit_namespace, "lightning", None, 0.0, world_size=1)
    for found in pool.run(workers.fit_namespace, "lightning", {"num_microbatches": 3}, 0.0, world_size=2):
        assert set(expected["metrics"]) == set(found["metrics"])
        for name in ("energy_step", "energy_epoch"):
            assert found["metrics"][name] == pytest.approx(expected["metrics"][name], rel=1e-9)


@pytest.mark.parametrize(
    ("namespace", "strategy"),
    [
        ("lightning", "januspipe_gpipe"),
        ("pytorch_lightning", TWO),
        slow("lightning", TWO),
        slow("pytorch_lightning", "januspipe"),
        slow("lightning", "januspipe"),
        slow("pytorch_lightning", "januspipe_gpipe"),
    ],
    ids=str,
)
def test_both_lightnings(pool: RankPool, namespace: str, strategy: Any) -> None:
    pytest.importorskip(namespace)
    ranks = pool.run(workers.fit_namespace, namespace, strategy, world_size=2)
    for found in ranks:
        assert found["schedule"] == ("gpipe" if strategy == "januspipe_gpipe" else "wavek-zb")
        close(ranks[0]["state"], found["state"])
    if strategy is TWO:  # one micro-batch, so the reference is the whole batch
        (expected,) = pool.run(workers.fit_namespace, namespace, None, world_size=1)
        for found in ranks:
            close(expected["losses"], found["losses"])
            close(expected["state"], found["state"])
            close(expected["metrics"], found["metrics"])


@pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
def test_registered_names(namespace: str) -> None:
    pytest.importorskip(namespace)
    registry = workers.library(namespace).strategies.StrategyRegistry
    expected = {
        "januspipe": "wavek-zb",
        "januspipe_gpipe": "gpipe",
        "januspipe_1f1b_2nd": "1f1b-2nd",
        "januspipe_hanayo_2nd": "hanayo-2nd",
    }
    assert {name: registry.get(name).schedule for name in expected} == expected


def test_wave_size_without_waves_is_said_to_have_no_effect() -> None:
    with pytest.warns(UserWarning, match="wave_size=4 has no effect: schedule='gpipe'"):
        lightning_januspipe.JanusPipeStrategy(schedule="gpipe", wave_size=4)


def test_an_instance_of_the_other_lightning_is_refused_by_lightning_itself() -> None:
    pytest.importorskip("pytorch_lightning")
    pytest.importorskip("lightning")
    ours = lightning_januspipe.strategy_class("lightning")
    assert ours is lightning_januspipe.JanusPipeStrategy
    assert not issubclass(lightning_januspipe.strategy_class("pytorch_lightning"), ours)


@pytest.fixture(scope="module")
def uninterrupted(pool: RankPool) -> dict[str, Any]:
    """Two epochs of plain Lightning."""
    return pool.run(workers.fit, None, {"max_epochs": 2}, world_size=1)[0]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def one_epoch(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[float]]:
    """The checkpoint and the losses of one epoch on two ranks."""
    file = str(tmp_path_factory.mktemp("one") / "two.ckpt")
    return file, pool.run(workers.fit, TWO, {"max_epochs": 1}, file, world_size=2)[0]["losses"]


@pytest.mark.parametrize("strategy", [None, {}, {"num_microbatches": 1}], ids=["plain", "one process", "pipeline"])
def test_checkpoint_of_a_pipeline_continues_anywhere(
    pool: RankPool, uninterrupted: dict[str, Any], one_epoch: tuple[str, list[float]], strategy: Any
) -> None:
    """One epoch on two ranks, then another elsewhere, are as two that never stopped."""
    expected, (file, losses) = uninterrupted, one_epoch
    close(expected["losses"][:3], losses)
    world = 2 if strategy == TWO else 1
    for found in pool.run(workers.fit, strategy, {"max_epochs": 2}, None, file, world_size=world):
        close(expected["losses"][3:], found["losses"])
        close(expected["state"], found["state"])


def test_checkpoint_of_plain_lightning_continues_in_a_pipeline(
    pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    expected = uninterrupted
    file = str(tmp_path / "plain.ckpt")
    pool.run(workers.fit, None, {"max_epochs": 1}, file, world_size=1)
    for found in pool.run(workers.fit, TWO, {"max_epochs": 2}, None, file, world_size=3):
        close(expected["losses"][3:], found["losses"])
        close(expected["state"], found["state"])


def test_checkpoint_has_the_keys_of_plain_lightning(pool: RankPool, tmp_path: Path) -> None:
    files = [str(tmp_path / "plain.ckpt"), str(tmp_path / "pipeline.ckpt")]
    pool.run(workers.fit, None, {"max_steps": 2}, files[0], world_size=1)
    pool.run(workers.fit, TWO, {"max_steps": 2}, files[1], world_size=2)
    plain, piped = (torch.load(f, weights_only=False) for f in files)
    close(plain["state_dict"], piped["state_dict"])
    close(plain["optimizer_states"], piped["optimizer_states"])
    assert piped.keys() == plain.keys() | {"januspipe"}  # random states, which plain Lightning does not keep


def test_mesh_samples_and_collectives(pool: RankPool) -> None:
    """Ranks of one pipeline see the same samples; replicas share the epoch; the world inside a step is the replicas."""
    ranks = pool.run(workers.inspect_mesh, {"pipeline_size": 2, "num_microbatches": 2}, world_size=4)
    for seen in ranks:
        assert seen["axes"] == ("pp", "dp", "gp") and seen["shape"] == (2, 2, 1)
        assert seen["world"] == 2 and seen["world_inside"] == 2 and seen["outside"] == 4
    energies = [sorted(set(seen["energies"])) for seen in ranks]  # global rank = stage · 2 + replica
    assert energies[0] == energies[2] and energies[1] == energies[3]
    assert len(set(energies[0]) | set(energies[1])) == 20, "the replicas do not cover the epoch"


def test_ranks_start_from_the_same_parameters(pool: RankPool) -> None:
    first, second = pool.run(workers.initial_parameters, {}, world_size=2)
    assert first == second
