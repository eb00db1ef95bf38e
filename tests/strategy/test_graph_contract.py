"""Lightning's contract with graph ranks: faults end all of them, and all else is as in one process."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import callback_workers
import checkpoint_workers as checkpoints
import graph_contract_workers as workers
import graph_models
import logging_workers
import precision_workers as precisions
import pytest
import strategy_workers
import tiny
import torch
from pools import slow

from lightning_januspipe.testing import RankPool, assert_matches_single_process

GRAPH: dict[str, Any] = {"pipeline_size": 1, "graph_size": 2, "num_microbatches": 2}
BOTH: dict[str, Any] = {**GRAPH, "pipeline_size": 2, "schedule": "wavek"}


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [slow("before"), slow("sharding"), "loss", slow("not finite"), slow("evaluation")])
def test_a_fault_of_one_graph_rank_ends_all(pool: RankPool, how: str) -> None:
    """At once, although its process lives on."""
    (others, seconds), (own, _) = pool.run(workers.ended, how, GRAPH, world_size=2, timeout=120)
    assert own.startswith("FloatingPointError: the loss" if how == "not finite" else "OSError: no such table")
    assert others.startswith("RankLostError: global rank 0 waited") and "for global rank 1," in others
    assert seconds < workers.TIMEOUT / 2, "the rank waited for a message"


def test_a_fault_of_one_graph_rank_ends_its_pipeline(pool: RankPool) -> None:
    found = pool.run(workers.ended, "loss", BOTH, world_size=4, timeout=120)
    assert [error.split(":")[0] for error, _ in found] == ["RankLostError", "OSError", "RankLostError", "RankLostError"]
    assert all(seconds < workers.TIMEOUT / 2 for _, seconds in found)


def test_another_batch_on_one_graph_rank_is_refused(pool: RankPool) -> None:
    for error, _ in pool.run(workers.ended, "other batch", GRAPH, world_size=2, timeout=120):
        assert "global ranks 0 and 1 of one pipeline got different batches (micro-batch 0: " in error


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_owners_are_chosen_by_the_loaders_workers(pool: RankPool) -> None:
    """Else by the ranks in turns; and by both of them alike, even if they would not agree."""
    (own, alone), (other, _) = pool.run(workers.sharded_steps, 0, world_size=2)
    assert len(own) == len(other) == 2 * 2, "two steps, and every other micro-batch of four"
    for num_ranks in (2, 4):
        for chosen, parameters in pool.run(workers.sharded_steps, 2, world_size=num_ranks):
            assert chosen == [], "the loader's workers had chosen"
            assert parameters == pytest.approx(alone, rel=1e-9, abs=1e-12)
    for _, parameters in pool.run(workers.sharded_steps, 0, True, world_size=2):
        assert parameters == pytest.approx(alone, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("module", [workers.narrow, workers.table, workers.pairs, workers.grid])
def test_numbers_in_other_forms(pool: RankPool, module: Any) -> None:
    """Of 32 bits, in a table, of a class that has as many rows as another, and in a flattened grid."""
    assert_matches_single_process(module, graph_models.Data, devices=2, strategy=GRAPH, steps=2, pool=pool)


def test_no_rows_of_a_class(pool: RankPool) -> None:
    """Micro-batches of one atom: no edges, no angles, and fewer atoms than ranks."""
    strategy = {**GRAPH, "num_microbatches": 4}
    assert_matches_single_process(workers.angles, graph_models.Data, devices=2, strategy=strategy, steps=2, pool=pool)


def test_clipping_accumulation_and_parameters_outside(pool: RankPool) -> None:
    """In a pipeline of graph ranks, with parts of the model frozen, and with the number of micro-batches chosen."""
    arguments = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}
    for strategy in ({**BOTH, "num_microbatches": "auto"}, {**GRAPH, "data_size": 2, "num_microbatches": "auto"}):
        assert_matches_single_process(
            workers.partly_frozen, tiny.data, devices=4, strategy=strategy, steps=2, trainer=arguments, pool=pool
        )


@cache
def _plain(pool: RankPool, precision: str, *arguments: Any) -> Any:
    return pool.run(precisions.train, precision, None, *arguments, world_size=1)[0]


def _flat(record: Any, step: int = 0) -> torch.Tensor:
    return torch.cat([record["gradients"][step][n].reshape(-1) for n in sorted(record["gradients"][step])])


def test_half_precision(pool: RankPool) -> None:
    """Exchanges of halves leave gradients as near to exact ones as they are without."""
    exact, plain = (_flat(_plain(pool, p, 3)) for p in ("64-true", "bf16-mixed"))
    ranks = pool.run(precisions.train, "bf16-mixed", {"pipeline_size": 1, "graph_size": 2}, 3, world_size=2)
    error = float((plain - exact).norm() / exact.norm())
    assert 2e-3 < error < 1e-1
    for record in ranks:
        assert float((_flat(record) - exact).norm() / exact.norm()) < 1.2 * error
        assert torch.equal(_flat(record), _flat(ranks[0])), "graph ranks have the same gradients, bit by bit"


def test_rounded_messages_between_stages(pool: RankPool) -> None:
    """Each graph rank sends its own rows in half precision; gradients are as near as that allows."""
    exact = _flat(_plain(pool, "64-true", 3))
    ranks = pool.run(
        precisions.train, "64-true", {**BOTH, "schedule": "wavek-zb", "message_dtype": "bf16"}, 3, world_size=4
    )
    for first, second in (ranks[:2], ranks[2:]):
        assert torch.equal(_flat(first), _flat(second)), "graph ranks have the same gradients, bit by bit"
    merged = {"gradients": [{**ranks[0]["gradients"][0], **ranks[2]["gradients"][0]}]}
    assert 1e-6 < float((_flat(merged) - exact).norm() / exact.norm()) < 3e-2


@pytest.mark.slow
def test_an_overflow_on_one_graph_rank_skips_the_step_on_all(pool: RankPool) -> None:
    arguments = (1, 3, "lightning", 2.0**10, "potential.energy_model.embedding.weight")
    for record in pool.run(
        precisions.train, "16-mixed", {"pipeline_size": 1, "graph_size": 2}, *arguments, world_size=2
    ):
        assert record["scales"] == [1024.0, 512.0, 512.0]
        first, second, third = record["parameters"]
        assert all(torch.equal(second[n], first[n]) for n in first)
        assert any(not torch.equal(third[n], second[n]) for n in second)


# -- evaluation, checkpoints, callbacks --------------------------------------------------------------------------------


def test_evaluation(pool: RankPool) -> None:
    (expected,) = pool.run(strategy_workers.evaluate, None, {}, world_size=1)
    for found in pool.run(strategy_workers.evaluate, BOTH, {}, world_size=4):
        for name in ("validate", "test"):
            assert found[name][0] == pytest.approx(expected[name][0], rel=1e-9)
        for mine, other in zip(found["predict"], expected["predict"], strict=True):
            for key, values in other.items():
                torch.testing.assert_close(torch.tensor(mine[key]), torch.tensor(values), rtol=1e-9, atol=1e-11)


def test_no_rank_holds_a_whole_structure_in_the_sanity_check(pool: RankPool) -> None:
    ((num, expected),) = pool.run(workers.sane, {"num_microbatches": 1}, world_size=1)
    assert num == 1
    for num, found in pool.run(workers.sane, GRAPH, world_size=2):
        assert num == 0 and found == pytest.approx(expected, rel=1e-9)


def test_resumed_with_another_number_of_graph_ranks(pool: RankPool, tmp_path: Path) -> None:
    """Adam's state too: in a file with graph ranks alone, and in a folder of a pipeline with graph ranks."""
    (expected,) = pool.run(checkpoints.train, None, str(tmp_path / "plain"), {"num_steps": 4}, world_size=1)
    for kind, pipeline_size, sizes in (("file", 1, (1, 2)), ("folder", 2, (2, 1))):
        folder = str(tmp_path / f"{kind} {sizes}")
        strategy = {"pipeline_size": pipeline_size, "save_distributed_checkpoint": kind == "folder"}
        for size, more in zip(
            sizes, ({"num_steps": 2}, {"num_steps": 4, "resume": f"{folder}/step=2.ckpt"}), strict=True
        ):
            given = {**strategy, "graph_size": size}
            ranks = pool.run(checkpoints.train, given, folder, more, world_size=pipeline_size * size)
        for found in ranks:
            assert found["ended"] == "" and found["step"] == 4
            for name, value in expected["state"].items():
                torch.testing.assert_close(found["state"][name], value, rtol=1e-9, atol=1e-11)


def test_module_made_in_configure_model(pool: RankPool, tmp_path: Path) -> None:
    """Each rank keeps its stage's parameters only; averages of weights are saved whole."""
    plain, given = {"num_steps": 2, "num_features": 8}, {"num_steps": 2, "num_features": 8}
    (expected,) = pool.run(checkpoints.train, None, str(tmp_path / "plain"), plain, world_size=1)
    ranks = pool.run(checkpoints.train, {"pipeline_size": 2, "graph_size": 2}, str(tmp_path), given, world_size=4)
    sizes = [found["bytes"][0] for found in ranks]
    assert sizes[0] == sizes[1] and sizes[2] == sizes[3] and max(sizes) < expected["bytes"][0]
    for found in ranks:
        assert found["ended"] == ""
        for name, value in expected["state"].items():
            torch.testing.assert_close(found["state"][name], value, rtol=1e-9, atol=1e-11)


def test_average_of_weights(pool: RankPool, tmp_path: Path) -> None:
    more = {"num_steps": 3, "callbacks": ("every step", "average")}
    pool.run(checkpoints.train, None, str(tmp_path / "plain"), more, world_size=1)
    strategy = {"pipeline_size": 2, "graph_size": 2}
    pool.run(checkpoints.train, strategy, str(tmp_path / "ranks"), more, world_size=4)
    files = [torch.load(tmp_path / where / "step=3.ckpt", weights_only=False) for where in ("plain", "ranks")]
    for name, value in files[0]["state_dict"].items():
        torch.testing.assert_close(files[1]["state_dict"][name], value, rtol=1e-9, atol=1e-11)


def test_samples_are_logged_once(pool: RankPool, tmp_path: Path) -> None:
    """With replicas that each have graph ranks, all ranks see what replicas alone log."""
    strategy = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 1}
    arguments = ("lightning", 2, 1e-3)
    replicas = pool.run(logging_workers.fit_and_log, strategy, str(tmp_path / "a"), *arguments, world_size=2)
    given = {**strategy, "graph_size": 2}
    ranks = pool.run(logging_workers.fit_and_log, given, str(tmp_path / "b"), *arguments, world_size=4)
    for rank, found in enumerate(ranks):
        logging_workers.check(replicas[rank // 2]["history"], found["history"])


@pytest.mark.slow
def test_monitor(pool: RankPool, tmp_path: Path) -> None:
    """Messages and memory of all graph ranks, atoms of each structure once."""
    strategy = {**BOTH, "num_microbatches": 4}
    ranks = pool.run(callback_workers.monitored, strategy, str(tmp_path), world_size=4)
    assert all(r["history"] == ranks[0]["history"] and r["history"] for r in ranks)
    for row in ranks[0]["history"]:
        sent = sum(r["sent"][int(row["batch"])] for r in ranks)
        assert row["januspipe/message_bytes"] == sent > 0
    last = ranks[0]["history"][-1]
    assert 4 <= last["januspipe/atoms_per_s"] / last["januspipe/structures_per_s"] <= 16
    assert {f"januspipe/peak_memory_bytes/rank{i}" for i in range(2)} <= set(last)
