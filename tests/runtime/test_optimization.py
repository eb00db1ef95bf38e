"""Optimizers, schedules, clipping and frozen parameters of users: the same in a pipeline as in plain Lightning."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import optimization_workers as workers
import pytest
import tiny
from nested import close
from pools import slow

from lightning_januspipe.testing import RankPool, assert_matches_single_process

# One way to cut the potential is enough where optimizers do not depend on it; others are cut as by default.
PIPELINE: dict[str, Any] = {"num_microbatches": 1, "schedule": "wavek"}
DEFAULT: dict[str, Any] = {"num_microbatches": 1}


def check(pool: RankPool, worker: Any, *arguments: Any, world_size: int = 2, **strategy: Any) -> list[dict[str, Any]]:
    """Compare what a worker returns on every rank with plain Lightning; whole optimizers' states are on rank 0."""
    (plain,) = pool.run(worker, None, *arguments, world_size=1)
    ranks = pool.run(worker, {**PIPELINE, **strategy}, *arguments, world_size=world_size)
    for rank, found in enumerate(ranks):
        alike(plain, found, rank)
    return [plain, *ranks]


def alike(plain: dict[str, Any], found: dict[str, Any], rank: int) -> None:
    skipped = {"held", "csv", *(() if rank == 0 else ("state",))}
    close(f"rank {rank}", *({k: v for k, v in f.items() if k not in skipped} for f in (plain, found)))


def test_groups_with_schedules_of_their_own(pool: RankPool, tmp_path: Path) -> None:
    plain, *ranks = check(pool, workers.fit_with_monitor, str(tmp_path))
    assert sorted(map(bool, (r["held"][2] for r in ranks))) == [False, True], "one rank alone has the last part"
    assert len({tuple(rates) for rates in plain["rates"]}) == plain["steps"] == 6
    logged = {n: [float(row[n] or -1) for row in plain["csv"]] for n in plain["csv"][0]}
    assert {"lr-AdamW/outside", "lr-AdamW/last-weight_decay"} < set(logged)
    close("csv", logged, {n: [float(row[n] or -1) for row in ranks[0]["csv"]] for n in logged})


@pytest.mark.parametrize(("name", "num_rates"), [("plateau", 2), ("one cycle", 9)])
def test_schedules(pool: RankPool, name: str, num_rates: int) -> None:
    """A metric of the validation lowers the rate; momenta and rates of a cycle change in each step."""
    plain, *_ = check(pool, workers.fit, name, {"max_epochs": 3, "limit_val_batches": None})
    assert len({tuple(rates) for rates in plain["rates"]}) == num_rates


def test_optimizers(pool: RankPool) -> None:
    names = ("accumulators", "factored", "matrices")
    (plain,) = pool.run(workers.fit_each, None, names, world_size=1)
    for rank, found in enumerate(pool.run(workers.fit_each, DEFAULT, names, world_size=2)):
        for name in names:
            assert plain[name]["changed"] and sum(found[name]["held"])
            alike(plain[name], found[name], rank)


def test_clipping_by_a_hook_and_accumulation_by_epoch(pool: RankPool) -> None:
    """Counts once what the loss reads beside the potential; clips in some steps."""
    plain, *_ = check(pool, workers.fit_accumulating)
    assert plain["steps"] == 3 + 2 + 1


NORM = {"gradient_clip_val": 0.05}
VALUE = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}


@pytest.mark.parametrize(
    ("name", "clipping"),
    [("some frozen", NORM), ("last trained", VALUE), slow("first trained", NORM)],
)
def test_frozen_parameters(pool: RankPool, name: str, clipping: dict[str, Any], tmp_path: Path) -> None:
    """They stay as they are, without a state; a rank may have no parameter to train; training is resumed."""
    arguments = (name, str(tmp_path), clipping)
    (plain,) = pool.run(workers.fit_and_resume, None, *arguments, world_size=1)
    ranks = pool.run(workers.fit_and_resume, DEFAULT, *arguments, world_size=2)
    for rank, found in enumerate(ranks):
        for expected, mine in zip(plain, found, strict=True):
            alike(expected, mine, rank)
        assert sum(rank[1]["held"][0] == 0 for rank in ranks) == (name != "some frozen"), "a rank trains nothing"
    resumed = ranks[0][1]
    assert resumed["steps"] == 6 and len(resumed["rates"]) == 3
    assert 0 < len(resumed["changed"]) == len(resumed["state"]["state"]) < len(resumed["parameters"])


def test_replicas_of_a_rank_that_trains_nothing(pool: RankPool) -> None:
    strategy = {"pipeline_size": 2, "num_microbatches": 2}
    assert_matches_single_process(
        partial(workers.named, "last trained"),
        tiny.data,
        devices=4,
        strategy=strategy,
        steps=2,
        trainer=VALUE,
        pool=pool,
    )


def test_frozen_in_one_fit_and_trained_in_the_next(pool: RankPool) -> None:
    """What the error for unfreezing in the middle of training advises."""
    check(pool, workers.fit_twice)


def test_unfreezing_callbacks_in_one_process(pool: RankPool) -> None:
    plain, found = check(pool, workers.fit_unfreezing, world_size=1)
    assert len(found["rates"][0]) == 1 and len(found["rates"][-1]) == 2 and "layers" in str(plain["changed"])


def test_stochastic_weight_averaging(pool: RankPool, tmp_path: Path) -> None:
    """The average, the schedule that Lightning swaps in, and checkpoints; from one of these it goes on."""
    folders = [str(tmp_path / name) for name in ("plain", "pipeline")]
    (plain,) = pool.run(workers.average_of_weights, None, folders[0], world_size=1)
    ranks = pool.run(workers.average_of_weights, PIPELINE, folders[1], world_size=2)
    (resumed_plain,) = pool.run(workers.average_of_weights, None, folders[1], True, world_size=1)
    resumed = pool.run(workers.average_of_weights, PIPELINE, folders[1], True, world_size=2)
    for rank in (0, 1):
        alike(plain, ranks[rank], rank)
        alike(resumed_plain, resumed[rank], rank)
    assert "StochasticWeightAveraging" in plain["saved"]["callbacks"]
    close("resumed", plain["parameters"], resumed_plain["parameters"])


def test_learning_rate_finder(pool: RankPool) -> None:
    """The same suggestion, and training with it as if there had been no search."""
    plain, *_ = check(pool, workers.found_learning_rate)
    assert plain["restored"] and len(plain["results"]["loss"]) > 10
    assert plain["suggestion"] == plain["attribute"] == plain["rates"][0][0] != 1e-3


OWN_CLIPPING = ["ValueError", "sees the gradients of this rank only", "self.clip_gradients(optimizer"]
REFUSED = {
    "unfreezing": ["ValueError", "Unfreezing unfreezes", "before another Trainer.fit", "pipeline_size=1"],
    "backbone": ["ValueError", "BackboneFinetuning unfreezes", "pipeline_size=1"],
    "average with batch normalization": ["ValueError", "StochasticWeightAveraging", "Use WeightAveraging"],
    "callback clips": [*OWN_CLIPPING, "ClipsItself.on_before_optimizer_step calls clip_grad_norm_"],
    "module clips": [*OWN_CLIPPING, "Module.configure_gradient_clipping calls clip_grad_norm_"],
    "watched": ["ValueError", "logger.watch", "gradient_norm.grad_norm", "pipeline_size=1"],
    "hook of a parameter": [
        "ValueError",
        "parameter potential.energy_model.embedding.weight of",
        "without expert_size",
    ],
    "hook of a sum": ["ValueError", "parameter potential.energy_model.embedding.weight of", "on_before_optimizer_step"],
    "hook of a submodule": ["ValueError", "submodule potential.energy_model.embedding of", "on_before_optimizer_step"],
    "batch size": ["Batch size finder is not supported with distributed strategies"],  # Lightning's own words
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_training(pool: RankPool, name: str) -> None:
    if name == "watched":
        pytest.importorskip("wandb")
    for message, num_steps in pool.run(workers.refused, name, world_size=2):
        assert num_steps == 0 and all(word in message for word in REFUSED[name]), message


def test_search_for_a_batch_size(pool: RankPool) -> None:
    for message in pool.run(workers.scaled_batch_size, world_size=2):
        assert "batch size is currently not supported with distributed strategies" in message  # Lightning's own words
