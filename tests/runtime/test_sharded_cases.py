"""What users do beside plain training gives the same with sharded state as in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import average_workers
import checkpoint_workers
import optimization_workers
import pytest
import sharded_cases as workers
import tiny
import torch
from nested import close
from parity_check import check_parity
from pools import slow

from lightning_januspipe.testing import RankPool

LEVELS = [{"shard": "optimizer"}, {"shard": "parameters"}]
OPTIMIZER, PARAMETERS = LEVELS
GRAPH = {"pipeline_size": 1, "graph_size": 2, "num_microbatches": 1}
REPLICAS = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 1}
STAGES_AND_REPLICAS = {"pipeline_size": 2, "data_size": 2, "num_microbatches": 1}
FOLDER = {"save_distributed_checkpoint": True}
NORM = {"gradient_clip_val": 0.05}

CASES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "groups with rates of their own": (optimization_workers.fit_with_monitor, ("folder",)),
    "rates that a metric lowers": (optimization_workers.fit, ("plateau", {"max_epochs": 3, "limit_val_batches": None})),
    "rates and momenta of a cycle": (optimization_workers.fit, ("one cycle", {"max_epochs": 3})),
    "accumulation by epoch": (optimization_workers.fit_accumulating, ()),
    "saved after training": (optimization_workers.fit_and_resume, ("some frozen", "folder", NORM)),
    "one parameter": (optimization_workers.fit_and_resume, ("last trained", "folder", NORM)),
    "frozen in the first fit": (optimization_workers.fit_twice, ()),
    "stochastic weight averaging": (optimization_workers.average_of_weights, ("folder",)),
    "learning rate finder": (optimization_workers.found_learning_rate, ()),
}


@pytest.mark.parametrize(
    ("name", "level"),
    [
        ("groups with rates of their own", PARAMETERS),
        ("saved after training", OPTIMIZER),
        slow("saved after training", {**OPTIMIZER, **FOLDER}),
        slow("saved after training", {**PARAMETERS, **FOLDER}),
        *(slow(name, level) for name in CASES for level in LEVELS),
        *(slow(name, {**PARAMETERS, "pipeline_size": 2}) for name in CASES),
    ],
)
def test_users_optimization(pool: RankPool, tmp_path: Path, name: str, level: dict[str, Any]) -> None:
    worker, arguments = CASES[name]
    plain, shards = ([str(tmp_path / of) if a == "folder" else a for a in arguments] for of in ("plain", "shards"))
    (expected,) = pool.run(worker, None, *plain, world_size=1)
    size = 2 * level.get("pipeline_size", 1)
    for rank, found in enumerate(pool.run(worker, {**GRAPH, **level}, *shards, world_size=size)):
        # The first rank has the whole state of the optimizer, unless each writes its own.
        other = {"held", "csv", "left", *(("state",) if rank or "save_distributed_checkpoint" in level else ())}
        for of_plain, mine in zip(*(v if isinstance(v, list) else [v] for v in (expected, found)), strict=True):
            close(f"rank {rank}", *({k: v for k, v in f.items() if k not in other} for f in (of_plain, mine)))


@pytest.mark.parametrize(
    ("level", "callbacks"),
    [
        (PARAMETERS, ("every step", "average")),
        slow(OPTIMIZER, ("every step", "average")),
        slow(PARAMETERS, ("every step",)),
        slow(OPTIMIZER, ("every step", "noise")),
    ],
)
def test_a_scaler_leaves_a_step_out(
    pool: RankPool, tmp_path: Path, level: dict[str, Any], callbacks: tuple[str, ...]
) -> None:
    """One gradient of one rank overflows; no rank makes that step, and averages go on."""
    more = {"callbacks": callbacks}
    (expected,) = pool.run(workers.train_scaled, None, str(tmp_path / "plain"), more, world_size=1)
    assert expected["ended"] == "" and expected["scale"] < 2.0**14, "no step was left out"
    for found in pool.run(workers.train_scaled, {**REPLICAS, **level}, str(tmp_path), more, world_size=2):
        assert found["ended"] == "" and found["scale"] == expected["scale"]
        close("state", expected["state"], found["state"])
    plain, ours = (torch.load(f / "last.ckpt", weights_only=False) for f in (tmp_path / "plain", tmp_path))
    close("optimizer", plain["optimizer_states"], ours["optimizer_states"])


@pytest.mark.parametrize(
    ("how", "mesh", "devices", "level"),
    [
        ("in the module and by name", GRAPH, 2, PARAMETERS),
        *(
            slow(how, mesh, devices, level)
            for how in ("in the module and by name", "lists", "lightning")
            # All replicas have the same samples here.
            for mesh, devices in ((GRAPH, 2), (REPLICAS, 2), ({**GRAPH, "pipeline_size": 2}, 4))
            for level in LEVELS
        ),
    ],
)
def test_users_averages(
    pool: RankPool, tmp_path: Path, how: str, mesh: dict[str, Any], devices: int, level: dict[str, Any]
) -> None:
    """Averages in other modules, in buffers, lists and dicts, and validation with them."""
    (expected,) = pool.run(average_workers.checkpoint, None, how, str(tmp_path / "one"), world_size=1)
    arguments = {**mesh, **level}, how, str(tmp_path / "shards")
    for found in pool.run(average_workers.checkpoint, *arguments, world_size=devices):
        close(how, expected, found)


VALUE = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}


@pytest.mark.parametrize(
    ("name", "mesh", "devices"),
    [
        ("fused", REPLICAS, 2),
        slow("groups", REPLICAS, 2),  # its optimizer has foreach=True
        slow("one cycle", REPLICAS, 2),
        *(slow(name, STAGES_AND_REPLICAS, 4) for name in ("fused", "groups", "one cycle", "last trained")),
        slow("fused", {**GRAPH, "pipeline_size": 2}, 4),
    ],
)
def test_rates_and_decay_of_groups_and_clipping_by_value(
    pool: RankPool, name: str, mesh: dict[str, Any], devices: int
) -> None:
    module = partial(optimization_workers.named, name)
    check_parity(pool, devices, tiny.data, module, VALUE, steps=5, **mesh, **PARAMETERS)


@pytest.mark.parametrize("level", [OPTIMIZER, slow(PARAMETERS)])
def test_parameters_of_two_dtypes(pool: RankPool, level: dict[str, Any]) -> None:
    check_parity(pool, 2, tiny.data, workers.two_dtypes, **REPLICAS, **level)


@pytest.mark.parametrize("level", [slow(OPTIMIZER), PARAMETERS])
def test_files_of_the_best_steps(pool: RankPool, tmp_path: Path, level: dict[str, Any]) -> None:
    """Those of plain Lightning, and a file of weights alone, which a run on another mesh validates with."""
    more = {"callbacks": ("two best", "weights")}
    (expected,) = pool.run(checkpoint_workers.train, None, str(tmp_path / "plain"), more, world_size=1)
    ranks = pool.run(checkpoint_workers.train, {**REPLICAS, **level}, str(tmp_path / "shards"), more, world_size=2)
    assert all(found["ended"] == "" for found in ranks)
    plain, ours = ({path.name: path for path in (tmp_path / f).iterdir()} for f in ("plain", "shards"))
    assert plain.keys() == ours.keys() and len(plain) == 4
    for name, path in plain.items():
        one, other = (torch.load(p, weights_only=False) for p in (path, ours[name]))
        close(name, *({k: c.get(k) for k in ("state_dict", "optimizer_states", "global_step")} for c in (one, other)))
    (validated,) = pool.run(workers.weights_of, None, str(plain["step=8.ckpt"]), world_size=1)
    close("weights", expected["state"], validated["state"])
    for found in pool.run(workers.weights_of, {**REPLICAS, **level}, str(ours["step=8.ckpt"]), world_size=2):
        close("validated", validated, found)


@pytest.mark.parametrize("level", [slow(PARAMETERS), {**PARAMETERS, **FOLDER}])
def test_hooks_of_checkpoints_read_parameters(pool: RankPool, tmp_path: Path, level: dict[str, Any]) -> None:
    (expected,) = pool.run(workers.train_with_hook, None, str(tmp_path / "plain"), world_size=1)
    assert len(expected["sums"]) >= 3
    for found in pool.run(workers.train_with_hook, {**REPLICAS, **level}, str(tmp_path / "shards"), world_size=2):
        assert found["ended"] == ""
        close("sums", expected["sums"], found["sums"])
        close("state", expected["state"], found["state"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategy", [{**GRAPH, **OPTIMIZER}, {**GRAPH, **PARAMETERS}, {**GRAPH, **PARAMETERS, **FOLDER}]
)
def test_frozen_for_a_run_between(pool: RankPool, tmp_path: Path, strategy: dict[str, Any]) -> None:
    """The optimizer keeps the state of parameters that are frozen, and goes on with it when they are trained again."""
    (expected,) = pool.run(workers.freeze_and_unfreeze, None, str(tmp_path / "plain"), world_size=1)
    for found in pool.run(workers.freeze_and_unfreeze, strategy, str(tmp_path), world_size=2):
        assert found["ended"] == "" and found["step"] == 12
        close("state", expected["state"], found["state"])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("SGD", "was saved by another optimizer"),
        slow("two groups", "parameter groups"),
        slow("fewer", "doesn't match the size"),
    ],
)
def test_other_optimizers_do_not_resume(pool: RankPool, tmp_path: Path, how: str, message: str) -> None:
    """Each rank says so by itself, before any waits for another."""
    pool.run(checkpoint_workers.train, None, str(tmp_path), {"num_steps": 1}, world_size=1)
    for level in LEVELS:
        arguments = {**REPLICAS, **level}, str(tmp_path / "resumed"), str(tmp_path / "last.ckpt"), how
        for ended in pool.run(workers.resume_with, *arguments, world_size=2):
            assert message in ended, ended


@pytest.mark.slow
@pytest.mark.parametrize("level", LEVELS)
def test_tied_parameters_of_several_stages(pool: RankPool, tmp_path: Path, level: dict[str, Any]) -> None:
    more = {"num_steps": 3, "num_features": 8, "tied": True}
    (expected,) = pool.run(checkpoint_workers.train, None, str(tmp_path / "plain"), more, world_size=1)
    for found in pool.run(
        checkpoint_workers.train, {**STAGES_AND_REPLICAS, **level}, str(tmp_path), more, world_size=4
    ):
        assert found["ended"] == ""
        close("state", expected["state"], found["state"])
