"""Modules that are made on the meta device get the same values on every mesh, from a seed or from a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import meta_workers as workers
import pytest
import torch
from pools import slow
from torch import nn

from lightning_januspipe.models import EquivariantPotential, MatRISMoE
from lightning_januspipe.runtime.initial_values import (
    draw_missing,
    loading_into_meta,
    parameters_on_meta,
    without_values,
)
from lightning_januspipe.testing import RankPool
from lightning_januspipe.testing.parity import compare_records

MESHES: dict[str, tuple[dict[str, Any], int]] = {
    "one rank": ({"pipeline_size": 1}, 1),
    "2 stages": ({}, 2),
    "2x2 in shards": ({"pipeline_size": 2, "data_size": 2, "shard": "parameters"}, 4),
    "2 graph ranks": ({"pipeline_size": 1, "graph_size": 2, "shard": "parameters"}, 2),
    "2 stages of 2 graph ranks in shards": (
        {"pipeline_size": 2, "graph_size": 2, "shard": "parameters"},
        4,
    ),
    "2 replicas": ({"pipeline_size": 1, "data_size": 2}, 2),
    "2 replicas in shards": ({"pipeline_size": 1, "data_size": 2, "shard": "parameters"}, 2),
}
STEPS = {"num_steps": 3}


def same(expected: dict[str, Any], found: dict[str, Any]) -> None:
    torch.testing.assert_close({n: expected[n] for n in found}, found, rtol=1e-9, atol=1e-11)


def run(
    pool: RankPool,
    mesh: str,
    folder: Path,
    *args: Any,
    more: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> list[Any]:
    strategy, size = MESHES[mesh]
    ranks = pool.run(
        workers.train, strategy | (options or {}), str(folder), STEPS | (more or {}), *args, world_size=size
    )
    assert [r["ended"] for r in ranks] == [""] * size
    return ranks


@pytest.fixture(scope="module")
def drawn(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run on one rank, from values that the seed gives."""
    (found,) = run(pool, "one rank", tmp_path_factory.mktemp("drawn"))
    assert not found["absent"]
    return found


@pytest.mark.parametrize("mesh", ["2 stages", "2x2 in shards"])
def test_values_of_a_seed(pool: RankPool, drawn: dict[str, Any], tmp_path: Path, mesh: str) -> None:
    """Only global rank 0 ever has more than its own stages, and after training only it has all parameters."""
    evaluates = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "val_check_interval": 3}
    first, *others = run(pool, mesh, tmp_path, more={"arguments": evaluates})
    assert first["state"].keys() == drawn["state"].keys()
    for found in (first, *others):
        same(drawn["state"], found["state"])
    assert not first["absent"]
    for found in (others[0], others[-1]):
        assert found["absent"] and 0 < found["most"] < 0.75 * drawn["most"]
    file = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert file["state_dict"].keys() == drawn["state"].keys()
    same(drawn["state"], file["state_dict"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["one rank", "2 stages"])
def test_values_of_a_seed_in_compiled_phases(pool: RankPool, drawn: dict[str, Any], tmp_path: Path, mesh: str) -> None:
    strategy, size = MESHES[mesh]
    arguments = {**strategy, "compile": True}, str(tmp_path), STEPS
    for found in pool.run(workers.train_interpreted, *arguments, world_size=size):
        assert found["ended"] == ""
        same(drawn["state"], found["state"])


@pytest.mark.parametrize("fault", ["other seed", "not filled"])
def test_other_values_are_noticed(pool: RankPool, drawn: dict[str, Any], tmp_path: Path, fault: str) -> None:
    first, _ = run(pool, "2 stages", tmp_path, True, fault)
    with pytest.raises(AssertionError):
        same(drawn["state"], first["state"])


@pytest.fixture(scope="module")
def continued(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A file of plain Lightning after four steps, and the state that plain Lightning has after six without a break."""
    folder = tmp_path_factory.mktemp("plain")
    (start,) = pool.run(workers.train, None, str(folder), {"num_steps": 4}, False, world_size=1)
    (found,) = pool.run(workers.train, None, str(folder / "on"), {"num_steps": 6}, False, world_size=1)
    assert start["ended"] == found["ended"] == ""
    return folder / "last.ckpt", found["state"]


def test_values_of_checkpoints(pool: RankPool, continued: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """From a file of plain Lightning, and then from a folder of shards."""
    file, expected = continued
    folder = {"save_distributed_checkpoint": True}
    run(pool, "2x2 in shards", tmp_path, more={"num_steps": 5, "resume": str(file)}, options=folder)
    assert (tmp_path / "last.ckpt").is_dir()
    first, last = run(pool, "2 stages", tmp_path / "on", more={"num_steps": 6, "resume": str(tmp_path / "last.ckpt")})
    assert first["state"].keys() == expected.keys() and last["absent"]
    same(expected, first["state"])
    same(expected, last["state"])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
def test_values_of_a_file(pool: RankPool, continued: tuple[Path, dict[str, Any]], tmp_path: Path, mesh: str) -> None:
    file, expected = continued
    for found in run(pool, mesh, tmp_path, more={"num_steps": 6, "resume": str(file)}):
        same(expected, found["state"])


def in_turn(
    pool: RankPool, mesh: str, runs: tuple[str, ...], num_evaluated: int = 4, share: float | None = None
) -> list[dict[str, Any]]:
    """Returns what ranks found, when it is what plain Lightning finds."""
    (expected,) = pool.run(workers.in_turn, None, runs, num_evaluated, world_size=1)
    strategy, size = MESHES[mesh]
    ranks = pool.run(workers.in_turn, strategy, runs, num_evaluated, share, world_size=size)
    assert expected["ended"] == [""] * len(expected["ended"])
    for found in ranks:
        assert found["ended"] == expected["ended"]
        torch.testing.assert_close(found["metrics"], expected["metrics"], rtol=1e-9, atol=1e-11)
        same(expected["state"], found["state"])
    assert ranks[0]["state"].keys() == expected["state"].keys()
    return list(ranks)


@pytest.mark.parametrize(
    ("mesh", "runs"),
    [
        ("2 stages", ("validate",)),
        slow("2 stages of 2 graph ranks in shards", ("test", "fit", "validate")),
        slow("2 replicas in shards", ("fit", "test", "validate")),
    ],
)
def test_evaluation_with_a_batch_of_a_new_kind(pool: RankPool, mesh: str, runs: tuple[str, ...]) -> None:
    """The last batch has one structure only; the comparison with the module needs all parameters."""
    num_checks = 0 if mesh == "2 replicas in shards" else len(runs) - ("fit" in runs)  # without stages there are none
    assert all(found["num_checks"] == num_checks for found in in_turn(pool, mesh, runs, 5))


@pytest.mark.slow
@pytest.mark.parametrize("runs", [("validate", "fit"), ("fit", "fit", "test")])
def test_runs_in_turn(pool: RankPool, runs: tuple[str, ...]) -> None:
    in_turn(pool, "2 stages", runs)


@pytest.mark.parametrize("runs", [("validate", "fit"), pytest.param(("fit", "fit", "test"), marks=pytest.mark.slow)])
def test_runs_in_turn_of_a_module_larger_than_global_rank_0(pool: RankPool, runs: tuple[str, ...]) -> None:
    first, other = in_turn(pool, "2 stages", runs, share=1.5)
    assert first["has_file"] and not other["has_file"]


OWN_STAGES = {"pipeline_size": 2, "graph_size": 2, "num_microbatches": 2}


@pytest.mark.parametrize("level", ["none", slow("parameters")])
def test_stages_of_its_own_on_graph_ranks(pool: RankPool, level: str) -> None:
    """Every rank computes all stages once, in the verification of the graph ranks before training."""
    (reference,) = pool.run(workers.train_explicit, None, world_size=1)
    ranks = pool.run(workers.train_explicit, {**OWN_STAGES, "shard": level}, world_size=4)
    for record in ranks[1:]:
        assert 0 < len(record.parameters) < len(reference.parameters)
        record.parameters = reference.parameters | record.parameters
    compare_records(reference, ranks, 1e-9)


@pytest.mark.slow
def test_stages_of_its_own_that_are_larger_than_a_rank_are_refused(pool: RankPool) -> None:
    for message in pool.run(workers.refused_explicit, OWN_STAGES, 2000.0, world_size=4):
        assert message.startswith("CaptureError: graph_size > 1 verifies the potential's own stages"), message


@pytest.mark.slow
def test_errors(pool: RankPool, tmp_path: Path) -> None:
    for of_rank in pool.run(workers.errors, str(tmp_path), world_size=2):
        expected = ("Adagrad makes its state", "averages of", "values are lost", "memory_limit=")
        for message, words in zip(of_rank, expected, strict=True):
            assert message.startswith("ValueError") and words in message, message


def _potential() -> EquivariantPotential:
    return EquivariantPotential(
        ["H", "O"], 4.0, num_layers=2, num_features=4, trainable_bessel=True, trainable_scale_shift=True
    )


@pytest.mark.parametrize("make", [_potential, lambda: MatRISMoE(["H", "O"])])
def test_reference_models_draw_all_their_parameters(make: Any) -> None:
    plain = make()
    with parameters_on_meta():
        first, second, other = make(), make(), make()
    assert all(p.is_meta for p in first.parameters()) and not any(b.is_meta for b in first.buffers())
    state = torch.get_rng_state()
    for module, seed in ((first, 1), (second, 1), (other, 2)):
        draw_missing(module, seed)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in plain.named_parameters():
        drawn = first.get_parameter(name)
        assert torch.equal(drawn, second.get_parameter(name)) and drawn.requires_grad
        is_constant = torch.equal(drawn, other.get_parameter(name))
        assert is_constant == torch.equal(drawn, parameter)
        if not is_constant and parameter.numel() > 50:
            assert drawn.std().item() == pytest.approx(parameter.std().item(), rel=0.5), name


def test_parts_draw_before_the_modules_around_them_and_values_stay() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.tied = nn.Linear(2, 2), nn.Linear(2, 2)
            self.tied.weight = self.inside.weight

        def reset_parameters(self) -> None:
            self.inside.bias.data.zero_()  # a write that autograd does not see

    with torch.device("meta"):
        module = Last()
    given = torch.tensor([3.0, 4.0])
    with loading_into_meta(module):
        module.load_state_dict({"tied.bias": given}, strict=False)
    assert without_values(module) == ["inside.weight", "inside.bias"]
    draw_missing(module, 0)
    assert torch.equal(module.inside.bias, torch.zeros(2)) and torch.equal(module.tied.bias, given)
    assert module.tied.weight is module.inside.weight and module.inside.weight.isfinite().all()


def test_what_nothing_fills_is_named() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.register_buffer("table", torch.arange(3))

    with torch.device("meta"):
        module = nn.Sequential(Scaled())
    with pytest.raises(
        ValueError, match=r"0\.table of Sequential has no values.*Give Scaled, or a .*reset_parameters.*init_"
    ):
        draw_missing(module, 0)
    assert len(without_values(module)) == 3


def test_tensors_that_nothing_can_fill_are_named() -> None:
    """Attributes that are plain tensors, and parameters without a shape."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            self.centers = torch.arange(3)

    with torch.device("meta"):
        module, lazy = nn.Sequential(Scaled()), nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(ValueError, match=r"0\.centers of Sequential: a tensor on the meta device .*register_buffer"):
        draw_missing(module, 0)
    with pytest.raises(ValueError, match=r"0\.weight has no shape before the first forward pass"):
        draw_missing(lazy, 0)
    with parameters_on_meta(), pytest.raises(ValueError, match="weight of LazyLinear has no shape"):
        nn.LazyLinear(2)


@pytest.mark.slow
def test_a_module_larger_than_global_rank_0(pool: RankPool, tmp_path: Path) -> None:
    """A file has its values for its capture; a second run goes on from a checkpoint, with the trace from the cache."""
    (plain,) = pool.run(workers.train_drawn, str(tmp_path / "plain"), STEPS, 2, world_size=1)
    assert plain["ended"] == ""
    memory = 1.5  # times all parameters; they and two copies of their gradients are three times as much
    runs = [
        ({}, {"num_steps": 2}, True),
        ({"save_distributed_checkpoint": True}, {"num_steps": 3, "resume": str(tmp_path / "0" / "last.ckpt")}, False),
    ]
    for number, (options, more, is_new) in enumerate(runs):
        arguments = options, str(tmp_path / str(number)), more, memory, str(tmp_path / "traces")
        ranks = pool.run(workers.train_large, *arguments, world_size=2)
        assert [r["ended"] for r in ranks] == ["", ""]
        assert [r["traces"] for r in ranks] == [int(is_new), 0]
        for found in ranks:
            assert 0 < found["parameters"] < 0.9 * found["whole"]
        assert 0 < ranks[0]["gradients"] <= memory / 6 * ranks[0]["whole"]
    first, other = ranks
    assert first["state"].keys() == plain["state"].keys() and first["absent"] and other["absent"]
    same(plain["state"], first["state"])
    same(plain["state"], other["state"])
    assert (tmp_path / "1" / "last.ckpt").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "more", "gradients"),
    [("2x2 in shards", {}, 0.25), ("2 graph ranks", {}, 0.25), ("2 stages", {"compile": True}, 0.6)],
)
def test_a_module_larger_than_global_rank_0_on_meshes(
    pool: RankPool, tmp_path: Path, mesh: str, more: dict[str, Any], gradients: float
) -> None:
    """With parameters in shards between steps, on graph ranks, where each has all parameters in steps, and compiled.

    The capture compares a sixth of 1.5 times the gradients at once; compiled phases compute those of one stage.
    """
    (plain,) = pool.run(workers.train_drawn, str(tmp_path / "plain"), STEPS, 2, world_size=1)
    strategy, size = MESHES[mesh]
    arguments = strategy | more, str(tmp_path), STEPS, 1.5, str(tmp_path / "traces")
    first, *others = pool.run(workers.train_large, *arguments, world_size=size)
    assert [r["ended"] for r in (plain, first, *others)] == [""] * (size + 1)
    assert first["pages"] > 100 and 0 < first["gradients"] <= gradients * first["whole"]
    if strategy.get("pipeline_size") != 1:
        assert all(0 < found["parameters"] < 0.9 * found["whole"] for found in (first, *others))
    assert first["state"].keys() == plain["state"].keys()
    for found in (first, *others):
        same(plain["state"], found["state"])
