"""Training with experts spread over ranks equals training in one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import checkpoint_workers
import compiled_workers
import expert_bytes
import expert_workers as workers
import graph_models
import pytest
import torch
from parity_check import check_parity
from pools import pool_of, slow

from lightning_januspipe.experts import ElementExperts
from lightning_januspipe.runtime.state_share import state_share
from lightning_januspipe.schedule.state_actions import ShardLevel
from lightning_januspipe.testing import (
    RankError,
    RankPool,
    RunRecord,
    compare_records,
    train_in_pipeline,
    train_reference,
)

pytestmark = pytest.mark.timeout(1200)  # several trainings, each with a limit of its own

SPREAD = {"expert_size": 2}
REPLICAS = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2}
GRAPH = {"pipeline_size": 1, "graph_size": 2, "num_microbatches": 2}
STAGES_AND_REPLICAS = {"pipeline_size": 2, "data_size": 2, "num_microbatches": 2}
STAGES_AND_GRAPH = {"pipeline_size": 2, "graph_size": 2, "num_microbatches": 2}
BOTH = {"pipeline_size": 1, "data_size": 2, "graph_size": 2, "num_microbatches": 2}


@pytest.mark.parametrize(
    ("devices", "mesh", "module"),
    [
        (2, REPLICAS, partial(workers.experts, 1)),
        (2, GRAPH, partial(workers.experts, 2)),
        (4, STAGES_AND_REPLICAS, partial(workers.experts, 4)),
        slow(2, REPLICAS, partial(workers.experts, 1, 0)),  # all rows to one expert
        slow(2, REPLICAS, partial(workers.experts, 4)),
        slow(2, GRAPH, partial(workers.experts, 1, 4)),
        slow(4, STAGES_AND_GRAPH, partial(workers.experts, 2)),
        slow(4, BOTH, partial(workers.experts, 2)),
        (2, {**REPLICAS, "shard": "parameters"}, partial(workers.experts, 1)),
        slow(2, {**REPLICAS, "shard": "optimizer"}, partial(workers.experts, 4)),
        slow(2, {**GRAPH, "shard": "parameters"}, partial(workers.experts, 2)),
        slow(2, {**GRAPH, "shard": "optimizer"}, partial(workers.experts, 1, 0)),
        slow(4, {**STAGES_AND_REPLICAS, "shard": "optimizer"}, partial(workers.experts, 2)),
        slow(4, {**STAGES_AND_GRAPH, "shard": "parameters"}, partial(workers.experts, 4)),
        slow(4, {**BOTH, "shard": "parameters"}, partial(workers.experts, 2)),
        slow(2, {**REPLICAS, "num_microbatches": 4}, partial(workers.experts, 1)),  # of one element, or without edges
        slow(2, REPLICAS, workers.frozen),
    ],
)
def test_parity(pool: RankPool, devices: int, mesh: dict[str, Any], module: Any) -> None:
    trainer = {"gradient_clip_val": 0.5}
    check_parity(pool, devices, graph_models.Data, module, trainer, **mesh, **SPREAD)


@pytest.mark.parametrize(
    ("devices", "more"),
    [
        slow(4, {**BOTH, "expert_size": 4}),
        slow(4, {**BOTH, "expert_size": 4, "shard": "parameters"}),
        slow(4, {"pipeline_size": 1, "data_size": 4, "num_microbatches": 1, **SPREAD}),
        slow(2, {**REPLICAS, "activation": "recompute", **SPREAD}),
    ],
)
def test_more_ranks(pool: RankPool, devices: int, more: dict[str, Any]) -> None:
    """Four owners of five experts; experts that two ranks hold each; stages that compute again what they need."""
    check_parity(pool, devices, graph_models.Data, workers.experts, **more)


@pytest.mark.parametrize(
    ("mesh", "module", "compiled"),
    [
        (REPLICAS, partial(workers.experts_and_more, 1), False),
        slow(GRAPH, partial(workers.experts_and_more, 1, 0), True),
        slow(GRAPH, partial(workers.experts_and_more, 1), False),
        slow(GRAPH, partial(workers.experts_and_more, 1, 0), False),
        slow(REPLICAS, partial(workers.experts_and_more, 2), True),
        slow(REPLICAS, partial(workers.experts_and_more, 1, 0), False),
    ],
)
def test_absent_elements_experts_without_rows_and_all_rows_to_one_expert(
    pool: RankPool, mesh: dict[str, Any], module: Any, compiled: bool
) -> None:
    """Their gradients are zeros where plain Lightning's are, and None where these are."""
    strategy = {**mesh, **SPREAD, "num_microbatches": 4 if mesh is REPLICAS else 2, "compile": compiled}
    replicas, data = mesh.get("data_size", 1), workers.FewElements
    (plain,) = pool.run(train_reference, module, data, {**strategy, **PLAIN}, 2, {}, replicas, world_size=1)
    train = compiled_workers.train_interpreted if compiled else train_in_pipeline
    compare_records(plain, pool.run(train, module, data, strategy, 2, {}, world_size=2), 1e-9)
    # Replicas see all structures in each step, one after the other; graph ranks half of them.
    _require_experts_without_rows(plain, module(), [[0, 1], [0] if mesh is GRAPH else [0, 1]])


PLAIN = {"graph_size": 1, "expert_size": 1, "compile": False}


def _require_experts_without_rows(plain: RunRecord, module: Any, elements_of_steps: list[list[int]]) -> None:
    """Raises an error unless the training has met what the test is for."""
    for step, elements in enumerate(elements_of_steps):
        gradients = plain.gradients[step]
        absent = {n for n, g in gradients.items() if g is None}
        assert absent > {"potential.unread.weight", "potential.unread.bias"}
        for name, part in module.named_modules():
            if isinstance(part, ElementExperts):
                chosen = set(part.routes()[1][elements].flatten().tolist())
                rows = [bool(g.any()) for g in gradients[f"{name}.core.weight"]]
                assert rows == [e in chosen for e in range(workers.NUM_EXPERTS)] and len(chosen) < workers.NUM_EXPERTS
                assert not gradients[f"{name}.logits"][2].any()


@pytest.mark.parametrize(
    ("schedule", "more"),
    [
        ("1f1b-2nd", {}),
        slow("gpipe", {}),
        slow("1f1b-fold", {}),
        slow("wavek", {}),
        slow("wavek-zb", {}),
        slow("hanayo-2nd", {}),
        slow("1f1b-2nd", {"shard": "parameters"}),
        slow("hanayo-2nd", {"shard": "optimizer", "expert_placement": "load", "train": workers.train_moving}),
        slow("1f1b-2nd", {"expert_placement": "replicate", "train": workers.train_with_guests}),
    ],
)
def test_every_schedule(pool: RankPool, schedule: str, more: dict[str, Any]) -> None:
    given = {**STAGES_AND_REPLICAS, **SPREAD, "num_microbatches": 4, "schedule": schedule, **more}
    check_parity(pool, 4, graph_models.Data, partial(workers.experts, 2), {"gradient_clip_val": 0.5}, **given)


@pytest.mark.parametrize(
    "more",
    [
        {},
        slow({"save_distributed_checkpoint": True}),
        slow({"shard": "parameters"}),
        slow({"shard": "optimizer", "save_distributed_checkpoint": True}),
    ],
)
def test_hooks_may_save_before_the_optimizer_steps(pool: RankPool, more: dict[str, Any]) -> None:
    trainer = {"gradient_clip_val": 0.5}
    check_parity(pool, 2, graph_models.Data, workers.saving, trainer, **REPLICAS, **SPREAD, **more)


@pytest.mark.parametrize("mesh", [slow(REPLICAS), slow({**REPLICAS, "shard": "parameters"})])
def test_accumulated_batches(pool: RankPool, mesh: dict[str, Any]) -> None:
    check_parity(pool, 2, graph_models.Data, workers.experts, {"accumulate_grad_batches": 2}, steps=2, **mesh, **SPREAD)


@pytest.mark.parametrize(("devices", "mesh"), [slow(2, REPLICAS), slow(2, GRAPH), slow(4, STAGES_AND_REPLICAS)])
def test_matris_moe(pool: RankPool, devices: int, mesh: dict[str, Any]) -> None:
    check_parity(pool, devices, module=workers.matris, **mesh, **SPREAD)


@pytest.mark.parametrize("level", [slow("none"), slow("parameters")])
def test_three_dimensions(level: str) -> None:
    with pool_of(8) as pool:
        mesh = {"pipeline_size": 2, "data_size": 2, "graph_size": 2, "num_microbatches": 2}
        check_parity(pool, 8, graph_models.Data, workers.experts, shard=level, **mesh, **SPREAD)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raw collective as derivative", "the gradient of .* differs by"),
        slow("two experts exchanged on one rank", "the loss of batch 0 is .* instead of"),
        slow("sum instead of mean over replicas", "the gradient of .* differs by"),
        ("gate without gradient", "the gradient of .*logits in step 0 is None"),
    ],
)
def test_faults_are_found(pool: RankPool, name: str, message: str) -> None:
    module = partial(workers.broken, name)
    with pytest.raises(AssertionError, match=message) as error:
        check_parity(pool, 2, graph_models.Data, module, reference=workers.experts, **REPLICAS, **SPREAD)
    assert not isinstance(error.value, RankError)


@pytest.mark.parametrize(
    ("devices", "mesh", "module"),
    [
        (2, {**REPLICAS, "shard": "parameters"}, partial(workers.experts, 1)),
        slow(2, GRAPH, partial(workers.experts, 2)),
        slow(2, REPLICAS, workers.saving),
        slow(4, {**STAGES_AND_REPLICAS, "shard": "optimizer"}, partial(workers.experts, 2)),
        slow(4, {"pipeline_size": 1, "data_size": 4, "num_microbatches": 1}, partial(workers.experts, 2)),
        slow(4, {**BOTH, "expert_size": 4}, partial(workers.experts, 2)),
        slow(2, {**REPLICAS, "activation": "recompute"}, partial(workers.experts, 4)),
    ],
)
def test_experts_move_to_where_their_rows_are_few(
    pool: RankPool, devices: int, mesh: dict[str, Any], module: Any
) -> None:
    """After every move training is that of one process, with Adam's state and clipped gradients."""
    more = {**SPREAD, "expert_placement": "load", **mesh}
    trainer = {"gradient_clip_val": 0.5}
    check_parity(pool, devices, graph_models.Data, module, trainer, 5, train=workers.train_moving, **more)


@pytest.mark.parametrize(
    ("devices", "mesh", "module", "moves"),
    [
        (2, {**REPLICAS, "shard": "parameters"}, partial(workers.experts, 2), False),
        slow(2, REPLICAS, partial(workers.experts, 1, 0), False),  # all rows to one expert
        slow(2, REPLICAS, workers.saving, True),
        slow(2, GRAPH, partial(workers.experts, 2), False),
        slow(2, GRAPH, partial(workers.experts, 1, 0), True),
        slow(4, {**STAGES_AND_REPLICAS, "shard": "optimizer"}, partial(workers.experts, 2), True),
        slow(4, {"pipeline_size": 1, "data_size": 4, "num_microbatches": 1}, partial(workers.experts, 2), True),
        slow(4, {**BOTH, "expert_size": 4}, partial(workers.experts, 2), True),
        slow(4, {**BOTH, "expert_size": 4}, partial(workers.experts, 1, 0), False),
        slow(2, {**REPLICAS, "activation": "recompute"}, partial(workers.experts, 4), False),
    ],
)
def test_experts_with_many_rows_are_on_several_ranks(
    pool: RankPool, devices: int, mesh: dict[str, Any], module: Any, moves: bool
) -> None:
    """In every step ranks have guests, and training is that of one process, with Adam's state and clipping."""
    more = {**SPREAD, "expert_placement": "replicate", **mesh}
    train = partial(workers.train_with_guests, moves=moves)
    check_parity(pool, devices, graph_models.Data, module, {"gradient_clip_val": 0.5}, 5, train=train, **more)


@pytest.mark.slow
def test_experts_on_several_ranks_in_three_dimensions() -> None:
    with pool_of(8) as pool:
        mesh = {"pipeline_size": 2, "data_size": 2, "graph_size": 2, "num_microbatches": 2, "expert_size": 4}
        more = {**mesh, "expert_placement": "replicate", "shard": "parameters"}
        train = partial(workers.train_with_guests, moves=True)
        check_parity(pool, 8, graph_models.Data, partial(workers.experts, 2), train=train, **more)


@pytest.mark.parametrize(
    ("fault", "message"),
    [slow("gradients", "gradient of .* in step 0 differs by"), slow("values", "gradient of .* in step 1 differs by")],
)
def test_faults_of_guests_are_found(pool: RankPool, fault: str, message: str) -> None:
    """Gradients of guests that are lost, and guests with parameters of the first step."""
    more = {**REPLICAS, **SPREAD, "expert_placement": "replicate"}
    train = partial(workers.train_with_guests, fault=fault)
    with pytest.raises(AssertionError, match=message) as error:
        check_parity(pool, 2, graph_models.Data, workers.experts, steps=3, train=train, **more)
    assert not isinstance(error.value, RankError)


@pytest.mark.slow
def test_an_optimizer_state_that_does_not_move_is_found(pool: RankPool) -> None:
    train = partial(workers.train_moving, has_state=False)
    more = {**REPLICAS, **SPREAD, "expert_placement": "load"}
    with pytest.raises(AssertionError, match="differs by"):
        check_parity(pool, 2, graph_models.Data, workers.experts, steps=5, train=train, **more)


@pytest.mark.parametrize(
    ("placement", "train"),
    [slow("load", workers.train_moving), slow("replicate", partial(workers.train_with_guests, moves=True))],
)
def test_accumulated_batches_of_experts_that_move(pool: RankPool, placement: str, train: Any) -> None:
    """Experts keep their owners while gradients wait for those of the next batch."""
    more = {**REPLICAS, **SPREAD, "expert_placement": placement}
    trainer = {"accumulate_grad_batches": 2}
    check_parity(pool, 2, graph_models.Data, workers.experts, trainer, 4, train=train, **more)


COPIES = {"pipeline_size": 1, "data_size": 4, "num_microbatches": 1, **SPREAD}


@pytest.mark.parametrize(
    ("mesh", "module", "train"),
    [
        ({**COPIES, "shard": "optimizer"}, partial(workers.experts, 2), None),
        slow({**COPIES, "shard": "parameters"}, workers.saving, None),
        slow({**BOTH, **SPREAD, "shard": "optimizer"}, partial(workers.experts, 1), None),
        slow(
            {**COPIES, "shard": "optimizer", "expert_placement": "load"},
            partial(workers.experts, 2),
            workers.train_moving,
        ),
        slow(
            {**COPIES, "shard": "parameters", "expert_placement": "replicate"},
            partial(workers.experts, 2),
            partial(workers.train_with_guests, moves=True),
        ),
    ],
)
def test_ranks_with_the_same_experts_share_their_state(
    pool: RankPool, mesh: dict[str, Any], module: Any, train: Any
) -> None:
    """Each of two owners of an expert updates a part of it, in every step of Adam with clipped gradients."""
    more = {} if train is None else {"train": train}
    check_parity(pool, 4, graph_models.Data, module, {"gradient_clip_val": 0.5}, 5, **more, **mesh)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "train"),
    [
        ({}, workers.train_without_others_updates),
        ({"expert_placement": "load"}, partial(workers.train_moving, has_state=False)),
    ],
)
def test_parts_of_owners_that_are_lost_are_found(pool: RankPool, more: dict[str, Any], train: Any) -> None:
    """Updates of the other owners, and a state that does not move with its experts."""
    with pytest.raises(AssertionError, match="differs by") as error:
        check_parity(
            pool, 4, graph_models.Data, workers.experts, steps=5, train=train, **COPIES, shard="optimizer", **more
        )
    assert not isinstance(error.value, RankError)


@pytest.mark.slow
@pytest.mark.parametrize(("level", "size"), expert_bytes.CASES)
def test_bytes_of_each_rank(pool: RankPool, level: ShardLevel, size: int) -> None:
    """They are as predicted: parameters, gradients and moments of own experts, and a part of what ranks share."""
    (alone,) = pool.run(workers.bytes_of_experts, {"pipeline_size": 1}, world_size=1)
    experts, others = alone["experts"] / 4, alone["others"] / 4  # parameters, gradients and two moments
    found = pool.run(workers.bytes_of_experts, expert_bytes.strategy_of(level, size), world_size=4)
    # Beside gradients stand counts of the ranks that have one, and a part may be shorter than others.
    tolerance = 0 if level == "none" else 8 * 2 * alone["num"]
    for rank, of_rank in enumerate(found):
        if size == 1:  # experts are as other parameters, and a part may have entries of both
            expected = {"all": state_share(level, 4, experts + others, 2 * (experts + others)).between}
        else:
            expected = expert_bytes.predicted_bytes(level, size, rank, experts, others)
        assert {key: of_rank[key] for key in expected} == pytest.approx(expected, rel=1e-12, abs=tolerance)


@pytest.mark.parametrize(
    "more",
    [
        {"exchange_dtype": "fp16"},
        slow({}),
        slow({"shard": "optimizer"}),
    ],
)
def test_mixed_precision(pool: RankPool, more: dict[str, Any]) -> None:
    """Gradients are near those of one process, and a step in which an expert overflows is skipped on all ranks."""
    given = {"pipeline_size": 1, "num_microbatches": 1}
    (alone,) = pool.run(workers.scaled_steps, {**given, "activation": "recompute"}, world_size=1)
    first, second = pool.run(workers.scaled_steps, {**given, "data_size": 2, **SPREAD, **more}, 1, world_size=2)
    error = sum(float((first["gradients"][n] - g).square().sum()) for n, g in alone["gradients"].items())
    assert error < 1e-5 * sum(float(g.square().sum()) for g in alone["gradients"].values())
    assert first["scales"] == second["scales"] == [256.0, 128.0, 128.0]
    for name, value in first["parameters"].items():
        assert value.isfinite().all() and torch.equal(value, second["parameters"][name])


PLACES: dict[str, tuple[dict[str, Any] | None, int]] = {
    "plain": (None, 1),
    "one process": ({"pipeline_size": 1}, 1),
    "replicas": ({**REPLICAS, **SPREAD, "num_microbatches": 1}, 2),
    "parameters in shards": ({**REPLICAS, **SPREAD, "num_microbatches": 1, "shard": "parameters"}, 2),
    "parameters in shards, folder": (
        {**REPLICAS, **SPREAD, "num_microbatches": 1, "shard": "parameters", "save_distributed_checkpoint": True},
        2,
    ),
    "placed by load": ({**REPLICAS, **SPREAD, "num_microbatches": 1, "expert_placement": "load"}, 2),
    "on several ranks": ({**REPLICAS, **SPREAD, "num_microbatches": 1, "expert_placement": "replicate"}, 2),
    "owners share state": ({**COPIES, "shard": "optimizer"}, 4),
    "owners share state and move": ({**COPIES, "shard": "optimizer", "expert_placement": "load"}, 4),
    "four owners, folder": (
        {"pipeline_size": 1, "data_size": 4, "expert_size": 4, "save_distributed_checkpoint": True},
        4,
    ),
    "stages and replicas": ({**STAGES_AND_REPLICAS, **SPREAD, "num_microbatches": 1}, 4),
    "stages and replicas, folder": (
        {**STAGES_AND_REPLICAS, **SPREAD, "num_microbatches": 1, "save_distributed_checkpoint": True},
        4,
    ),
}


def _train(place: str) -> Any:
    forced = {
        "placed by load": workers.checkpoints_moving,
        "owners share state and move": workers.checkpoints_moving,
        "on several ranks": workers.checkpoints_with_guests,
    }
    return forced.get(place, checkpoint_workers.train)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        slow("replicas", "one process"),
        slow("plain", "replicas"),
        slow("stages and replicas", "replicas"),
        slow("stages and replicas, folder", "replicas"),
        slow("replicas", "stages and replicas, folder"),
        slow("replicas", "parameters in shards"),
        slow("owners share state", "replicas"),
        slow("plain", "owners share state and move"),
        slow("parameters in shards", "one process"),
        slow("placed by load", "stages and replicas"),
        slow("plain", "placed by load"),
        slow("on several ranks", "stages and replicas"),
        slow("parameters in shards, folder", "stages and replicas"),
        slow("four owners, folder", "owners share state"),
    ],
)
def test_goes_on_from_a_checkpoint(
    pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path, before: str, after: str
) -> None:
    saving = {"callbacks": ("every step",), "stop": ("exception", 4, None), "module": workers.matris}
    strategy, devices = PLACES[before]
    pool.run(_train(before), strategy, str(tmp_path), saving, world_size=devices)
    strategy, devices = PLACES[after]
    going_on = {"resume": "last", "module": workers.matris}
    for found in pool.run(_train(after), strategy, str(tmp_path), going_on, world_size=devices):
        assert found["ended"] == "" and found["step"] == 8 and found["resumed"].startswith(str(tmp_path))
        for name, expected in uninterrupted["state"].items():
            torch.testing.assert_close(found["state"][name], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("before", [slow("replicas"), slow("stages and replicas")])
def test_goes_on_in_plain_lightning(pool: RankPool, tmp_path: Path, before: str) -> None:
    """Plain Lightning goes on as from a file of its own; in mid-epoch it begins the epoch's batches anew."""
    found = []
    for name in ("plain", before):
        folder, (strategy, devices) = tmp_path / name, PLACES[name]
        saving = {"callbacks": ("every step",), "stop": ("exception", 4, None), "module": workers.matris}
        pool.run(checkpoint_workers.train, strategy, str(folder), saving, world_size=devices)
        going_on = {"resume": "last", "module": workers.matris}
        (after,) = pool.run(checkpoint_workers.train, None, str(folder), going_on, world_size=1)
        assert after["ended"] == "" and after["step"] == 8 and after["resumed"].startswith(str(folder))
        found.append(after["state"])
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "place",
    [
        *(slow("replicas"), "parameters in shards", slow("placed by load"), slow("on several ranks")),
        slow("owners share state"),
    ],
)
def test_files_are_those_of_plain_lightning(
    pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path, place: str
) -> None:
    """Every expert is in the file, under the model's own keys, with its optimizer state."""
    strategy, devices = PLACES[place]
    training = {"module": workers.matris}
    for run in pool.run(_train(place), strategy, str(tmp_path), training, world_size=devices):
        assert run["ended"] == ""
    expected, found = (torch.load(f / "last.ckpt", weights_only=True) for f in (uninterrupted["folder"], tmp_path))
    assert list(found["state_dict"]) == list(expected["state_dict"])
    for name, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][name], value, rtol=1e-9, atol=1e-11)
    (plain,), (spread,) = expected["optimizer_states"], found["optimizer_states"]
    assert spread["param_groups"] == plain["param_groups"] and spread["state"].keys() == plain["state"].keys()
    for index, state in plain["state"].items():
        for key, value in state.items():
            torch.testing.assert_close(spread["state"][index][key], value, rtol=1e-9, atol=1e-12)


@pytest.fixture(scope="module")
def uninterrupted(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight steps of plain Lightning in one process."""
    folder = tmp_path_factory.mktemp("reference")
    (found,) = pool.run(checkpoint_workers.train, None, str(folder), {"module": workers.matris}, world_size=1)
    return {**found, "folder": folder}
