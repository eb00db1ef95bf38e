"""Training with optimizer state in shards equals training in one process, for all kinds of optimizers and meshes."""

from __future__ import annotations

import random
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import checkpoint_workers
import pytest
import shard_workers as workers
import torch
from parity_check import check_parity
from pools import pool_of, slow
from torch import nn

from lightning_januspipe.runtime.state_units import Segment, segments
from lightning_januspipe.testing import RankError, RankPool

SHARDED = {"shard": "optimizer"}
FULLY = {"shard": "parameters"}
REPLICAS = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2}
GRAPH = {"pipeline_size": 1, "graph_size": 2, "num_microbatches": 2}
BOTH = {"pipeline_size": 1, "data_size": 2, "graph_size": 2, "num_microbatches": 2}
STAGES_AND_REPLICAS = {"pipeline_size": 2, "data_size": 2, "num_microbatches": 2}
STAGES_AND_GRAPH = {"pipeline_size": 2, "graph_size": 2, "num_microbatches": 2}
ALL_AXES = {"pipeline_size": 2, "data_size": 2, "graph_size": 2, "num_microbatches": 2}


def _lengths(shards: list[list[Segment]]) -> list[int]:
    return [sum(s.end - s.start for s in shard) for shard in shards]


@pytest.mark.parametrize("num_shards", [1, 2, 3, 7])
@pytest.mark.parametrize("may_cut", [True, False])
def test_segments_cover_every_entry_once(num_shards: int, may_cut: bool) -> None:
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in ((3, 5), (), (4,), (0,), (2, 2, 2), (1,))]
    shards = segments(parameters, num_shards, may_cut)
    assert len(shards) == num_shards
    covered = [(id(s.parameter), i) for shard in shards for s in shard for i in range(s.start, s.end)]
    assert sorted(covered) == sorted((id(p), i) for p in parameters for i in range(p.numel()))
    if may_cut:
        assert max(_lengths(shards)) == -(-len(covered) // num_shards)
    else:
        assert all(s.is_whole for shard in shards for s in shard)


def test_parameters_whose_memory_is_not_contiguous_stay_whole() -> None:
    turned = nn.Parameter(torch.zeros(4, 6).t())
    first, second = segments([turned, nn.Parameter(torch.zeros(10))], 2, may_cut=True)
    assert [s.parameter is turned for s in first] == [True] and first[0].is_whole
    assert _lengths([first, second]) == [24, 10]


@pytest.mark.parametrize(
    ("devices", "mesh", "optimizer", "level"),
    [
        (2, REPLICAS, "Adam", SHARDED),
        (2, GRAPH, "Muon", FULLY),
        (2, GRAPH, "Adafactor", SHARDED),
        (4, STAGES_AND_REPLICAS, "Adam", FULLY),
        (4, STAGES_AND_GRAPH, "Adam", SHARDED),
        *(
            slow(devices, mesh, optimizer, level)
            for devices, mesh in (
                *((2, REPLICAS), (2, GRAPH), (4, BOTH), (4, STAGES_AND_REPLICAS), (4, STAGES_AND_GRAPH)),
                (8, ALL_AXES),
            )
            for optimizer in ("Adam", "SGD", "Adafactor", "Muon")
            for level in (SHARDED, FULLY)
        ),
    ],
)
def test_parity(pool: RankPool, devices: int, mesh: dict[str, Any], optimizer: str, level: dict[str, Any]) -> None:
    module = partial(workers.module, optimizer)
    trainer = {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2}
    with nullcontext(pool) if devices <= pool.size else pool_of(devices) as ranks:
        check_parity(ranks, devices, workers.data, module, trainer, 5, **mesh, **level)


@pytest.mark.parametrize("level", [slow(SHARDED), FULLY])
def test_more_ranks_than_parameters(pool: RankPool, level: dict[str, Any]) -> None:
    """Some ranks have nothing to update."""
    check_parity(pool, 4, workers.data, workers.few_parameters, pipeline_size=1, data_size=4, **level)


@pytest.mark.parametrize("size", [2, slow(4)])
def test_each_rank_has_its_part_of_the_state(pool: RankPool, size: int) -> None:
    """The table of docs/sharded-state.md, between the phases of a step and its optimizer."""
    (alone,) = pool.run(workers.state_bytes, {"pipeline_size": 1}, world_size=1)
    assert alone["state"] > 2 * alone["parameters"] - 100
    # Segments end at whole entries, and the three entries that no loss depends on have no state.
    rest = (size + 3) * 8
    frozen = 5 * 8  # which the optimizer's groups name, and every rank has
    for level in (SHARDED, FULLY):
        found = pool.run(workers.state_bytes, {"pipeline_size": 1, "data_size": size, **level}, world_size=size)
        assert sum(f["moments"] for f in found) == alone["moments"]
        assert max(f["moments"] for f in found) - min(f["moments"] for f in found) <= 2 * rest
        assert all(f["gradients"] <= alone["parameters"] / size + rest for f in found)
        part = alone["parameters"] / size + rest if level is FULLY else alone["parameters"] + 3 * 8
        assert all(alone["parameters"] / size - rest <= f["held"] <= part + frozen for f in found)


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (2, REPLICAS),
        slow(2, {**GRAPH, "activation": "recompute"}),
        slow(2, {**REPLICAS, "compile": True}),
        (4, STAGES_AND_REPLICAS),
    ],
)
def test_parameters_are_released_after_their_last_phase(pool: RankPool, devices: int, strategy: dict[str, Any]) -> None:
    """All of a stage's parameters are in memory in its phases only: when its reduction starts, the shard is left."""
    for found in pool.run(workers.released_in_step, {**strategy, **FULLY}, world_size=devices):
        assert found
        for parameters, in_reduction, in_phases in found:
            assert in_reduction == 0 and parameters <= in_phases <= parameters + 8 * devices


@pytest.mark.parametrize(
    ("name", "message", "level"),
    [
        ("updates not gathered", "differs by", SHARDED),
        ("gathering skipped", "differs by", FULLY),
        ("reduction without its factor", "the gradient of .* differs by", FULLY),
        ("shards exchanged", "the gradient of .* differs by", SHARDED),
    ],
)
def test_faults_are_found(pool: RankPool, name: str, message: str, level: dict[str, Any]) -> None:
    module = partial(workers.broken, name)
    with pytest.raises(AssertionError, match=message) as error:
        check_parity(pool, 2, workers.data, module, reference=partial(workers.module, "Adam"), **REPLICAS, **level)
    assert not isinstance(error.value, RankError)


@pytest.mark.parametrize("level", [slow(SHARDED), FULLY])
def test_a_shard_that_is_loaded_in_the_wrong_place_is_found(
    pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path, level: dict[str, Any]
) -> None:
    (stopped,) = pool.run(checkpoint_workers.train, None, str(tmp_path), {"num_steps": 4}, world_size=1)
    assert stopped["step"] == 4
    strategy = {**REPLICAS, **level, "num_microbatches": 1}
    for found in pool.run(workers.resume_misplaced, strategy, str(tmp_path / "last.ckpt"), world_size=2):
        assert found["ended"] == "" and found["step"] == 8
        with pytest.raises(AssertionError, match="not close"):
            _same(uninterrupted["state"], found["state"])


@pytest.mark.parametrize(
    ("hook", "code", "message"),
    [
        ("on_after_backward", "[q.grad for q in every]", r"gradient of potential.energy_model\..* is in parts after"),
        (
            "on_before_optimizer_step",
            "[setattr(q, 'grad', None) for q in every]",
            "gradient_norm.grad_norm gives the norms",
        ),
        ("on_train_batch_start", "p.requires_grad_(False)", "requires_grad of potential.energy_model.embedding.weight"),
        (
            "on_train_batch_end",
            "made.optimizers().add_param_group({'params': [torch.nn.Parameter(torch.ones(1))]})",
            "has 2 parameter groups, but had 1 when training started",
        ),
    ],
)
def test_changes_that_would_be_lost_are_errors(pool: RankPool, hook: str, code: str, message: str) -> None:
    for level in (SHARDED, FULLY):
        errors = pool.run(workers.error_of_hook, hook, code, {**REPLICAS, **level}, world_size=2)
        assert any(re.search(message, error) for error in errors), errors
        assert all(errors)


def test_parameters_between_steps(pool: RankPool) -> None:
    """They have no values then, and an error says so; a block gives their values, and keeps what it changes."""
    ((none, expected),) = pool.run(workers.read_between_steps, {"pipeline_size": 1}, world_size=1)
    assert none == set()
    graph = {"pipeline_size": 1, "graph_size": 2, **FULLY}
    for errors, found in pool.run(workers.read_between_steps, graph, world_size=2):
        (error,) = errors
        assert error.startswith("potential.energy_model.embedding.weight has no values between two steps")
        assert found == pytest.approx(expected, rel=1e-9)


def test_averages_of_parameters(pool: RankPool, tmp_path: Path) -> None:
    """A callback of Lightning averages parameters between steps, which are whole then."""
    averaging = {"callbacks": ("average",)}
    (expected,) = pool.run(checkpoint_workers.train, None, str(tmp_path), averaging, world_size=1)
    strategy = {**REPLICAS, **FULLY, "num_microbatches": 1}
    for found in pool.run(checkpoint_workers.train, strategy, str(tmp_path), averaging, world_size=2):
        assert found["ended"] == ""
        _same(expected["state"], found["state"])


def test_norms_of_gradients(pool: RankPool) -> None:
    (expected,) = pool.run(workers.norms, {"pipeline_size": 1, "num_microbatches": 2}, world_size=1)
    for found in pool.run(workers.norms, {**GRAPH, **SHARDED}, world_size=2):
        assert found == pytest.approx(expected, rel=1e-9)


LEVELS: dict[str, tuple[dict[str, Any] | None, int]] = {
    "plain": (None, 1),
    "one process": ({"pipeline_size": 1}, 1),
    "replicas": ({**REPLICAS, **SHARDED, "num_microbatches": 1}, 2),
    "stages and replicas": ({**STAGES_AND_REPLICAS, "num_microbatches": 1}, 4),
    "stages and replicas, sharded": ({**STAGES_AND_REPLICAS, **SHARDED, "num_microbatches": 1}, 4),
    "stages and replicas, folder": (
        {**STAGES_AND_REPLICAS, **SHARDED, "num_microbatches": 1, "save_distributed_checkpoint": True},
        4,
    ),
    "replicas, fully": ({**REPLICAS, **FULLY, "num_microbatches": 1}, 2),
    "stages and replicas, fully": ({**STAGES_AND_REPLICAS, **FULLY, "num_microbatches": 1}, 4),
    "stages and replicas, fully, folder": (
        {**STAGES_AND_REPLICAS, **FULLY, "num_microbatches": 1, "save_distributed_checkpoint": True},
        4,
    ),
}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        slow("replicas", "one process"),
        ("stages and replicas, folder", "replicas"),
        ("plain", "stages and replicas, sharded"),
        slow("stages and replicas", "replicas"),
        slow("stages and replicas, sharded", "stages and replicas"),
        slow("replicas", "stages and replicas, folder"),
        ("stages and replicas, fully, folder", "replicas, fully"),
        slow("replicas, fully", "one process"),
        slow("plain", "stages and replicas, fully"),
        slow("stages and replicas", "replicas, fully"),
        slow("replicas", "stages and replicas, fully"),
        slow("stages and replicas, fully", "replicas"),
        slow("stages and replicas, fully", "stages and replicas"),
    ],
)
def test_goes_on_from_a_checkpoint(
    pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path, before: str, after: str
) -> None:
    """A checkpoint of one level is read by every other one."""
    saving = {"callbacks": ("every step",), "stop": ("exception", 4, None)}
    strategy, devices = LEVELS[before]
    for stopped in pool.run(checkpoint_workers.train, strategy, str(tmp_path), saving, world_size=devices):
        assert stopped["ended"] == "RuntimeError: a callback has failed"
    strategy, devices = LEVELS[after]
    for found in pool.run(checkpoint_workers.train, strategy, str(tmp_path), {"resume": "last"}, world_size=devices):
        assert found["ended"] == "" and found["step"] == 8 and found["resumed"].startswith(str(tmp_path))
        _same(uninterrupted["state"], found["state"])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("after", ["one process", "replicas", "stages and replicas, fully"])
def test_killed_at_a_random_step(
    pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path, seed: int, after: str
) -> None:
    """All ranks of parameters in shards are killed, and training goes on elsewhere."""
    chosen = random.Random(seed)
    strategy, devices = LEVELS[chosen.choice(["stages and replicas, fully", "stages and replicas, fully, folder"])]
    stop = {"stop": ("sigkill", chosen.randrange(2, 8), None)}
    with pool_of(devices) as mortal, pytest.raises(RankError):
        mortal.run(checkpoint_workers.train, strategy, str(tmp_path), stop, world_size=devices)
    strategy, devices = LEVELS[after]
    for found in pool.run(checkpoint_workers.train, strategy, str(tmp_path), {"resume": "last"}, world_size=devices):
        assert found["ended"] == "" and found["step"] == 8 and found["resumed"].startswith(str(tmp_path))
        _same(uninterrupted["state"], found["state"])


def test_nothing_is_gathered_for_a_folder(pool: RankPool, tmp_path: Path) -> None:
    """Each rank writes its part of parameters and optimizer state."""
    strategy, devices = LEVELS["stages and replicas, fully, folder"]
    gathered = pool.run(workers.train_without_gathering, strategy, str(tmp_path), world_size=devices)
    assert gathered == [0] * devices
    names = {path.name for path in (tmp_path / "last.ckpt").iterdir()}
    assert {f"__{rank}_0.distcp" for rank in range(devices)} <= names


def test_files_are_those_of_plain_lightning(pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    strategy, devices = LEVELS["stages and replicas, sharded"]
    pool.run(checkpoint_workers.train, strategy, str(tmp_path), world_size=devices)
    expected, found = (torch.load(f / "last.ckpt", weights_only=True) for f in (uninterrupted["folder"], tmp_path))
    (plain,), (sharded,) = expected["optimizer_states"], found["optimizer_states"]
    assert sharded["param_groups"] == plain["param_groups"] and sharded["state"].keys() == plain["state"].keys()
    for index, state in plain["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(sharded["state"][index][key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("level", [slow(SHARDED), FULLY])
def test_module_made_in_configure_model(pool: RankPool, tmp_path: Path, level: dict[str, Any]) -> None:
    """No rank has the parameters of other stages, and with parameters in shards none has all of its own stage."""
    more = {"num_steps": 3, "num_features": 8}
    (expected,) = pool.run(checkpoint_workers.train, None, str(tmp_path / "plain"), more, world_size=1)
    strategy = {**STAGES_AND_REPLICAS, **level, "num_microbatches": 1}
    ranks = pool.run(checkpoint_workers.train, strategy, str(tmp_path), more, world_size=4)
    parameters, state = expected["bytes"]
    held, kept = zip(*(found["bytes"] for found in ranks), strict=True)
    assert max(kept) < 0.4 * state and sum(kept) < 1.05 * state
    if level is FULLY:
        assert max(held) < 0.5 * parameters and sum(held) < 1.3 * parameters
    else:
        assert max(held) < 0.8 * parameters
    for found in ranks:
        assert found["ended"] == ""
        _same(expected["state"], found["state"])
    plain, ours = (torch.load(f / "last.ckpt", weights_only=True) for f in (tmp_path / "plain", tmp_path))
    _same(plain["state_dict"], ours["state_dict"])


def _same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-9, atol=1e-11)


@pytest.fixture(scope="module")
def uninterrupted(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight steps of plain Lightning in one process, with the folder of its checkpoints."""
    folder = tmp_path_factory.mktemp("reference")
    (found,) = pool.run(checkpoint_workers.train, None, str(folder), world_size=1)
    return {**found, "folder": folder}
