"""What ranks share within a memory limit: the fastest level that fits, chosen together with what stages keep."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import expert_workers
import graph_models
import pytest
import shard_workers as workers
import tiny
import torch
from parity_check import check_parity
from pools import slow
from torch import nn

from lightning_januspipe.capture import ActivationCosts
from lightning_januspipe.runtime import chosen_state
from lightning_januspipe.runtime.chosen_state import ChosenState, StageSharing, choose_state
from lightning_januspipe.runtime.optimizer_bytes import optimizer_state_bytes
from lightning_januspipe.runtime.planner import Planner
from lightning_januspipe.runtime.state_share import LEVELS
from lightning_januspipe.schedule import Link, MemoryCosts, PhaseCosts
from lightning_januspipe.testing import RankPool

STAGE = 100 * 4  # bytes of the parameters of a stage
COSTS, MEMORY = (PhaseCosts(1.0, 1.5, 2.0, 1.5),) * 2, (MemoryCosts(10.0, 10.0, 10.0),) * 2


@pytest.mark.parametrize("name", ["Adam", "SGD", "Adafactor", "Muon"])
def test_bytes_of_optimizer_state(name: str) -> None:
    made = workers.module(name)
    optimizer = made.configure_optimizers()
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    found = optimizer_state_bytes(optimizer)
    assert not optimizer.state
    for parameter in made.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    states = optimizer.state.items()
    assert found == {p: sum(t.nbytes for t in s.values() if isinstance(t, torch.Tensor)) for p, s in states}


def test_an_optimizer_that_cannot_step_on_one_parameter() -> None:
    with pytest.raises(ValueError, match=r"LBFGS cannot step on a single parameter \(TypeError.*memory_limit"):
        optimizer_state_bytes(torch.optim.LBFGS([nn.Parameter(torch.zeros(2))]))


def _choose(
    limit: float,
    link: Link,
    levels: Any = LEVELS,
    activations: dict[str, ActivationCosts] | None = None,
    sizes: tuple[int, int] = (100, 100),
    **more: Any,
) -> ChosenState:
    """Chooses for two stages with a parameter each, on two ranks and four replicas."""
    module = nn.Module()
    module.potential = nn.ParameterList([torch.zeros(size) for size in sizes])
    potential = SimpleNamespace(path="potential", parameter_stages=lambda: {"0": {0}, "1": {1}})
    found: Any = SimpleNamespace(potential=potential, activations=activations or {})
    sharing = StageSharing(levels, 4, link, [torch.optim.SGD(module.parameters(), momentum=0.9)], True, **more)
    return choose_state(Planner("wavek", 2, COSTS, MEMORY), found, module, sharing, limit, 4)


# Parameters, gradients and momentum, and the copy of the gradients that is sent.
NEEDS = {"none": 4 * STAGE, "optimizer": 3.25 * STAGE, "parameters": 2.5 * STAGE}


def test_the_simplest_level_is_taken_of_those_that_are_as_fast() -> None:
    chosen = _choose(1e6, Link())
    assert chosen.level == "none" and len(set(chosen.seconds.values())) == 1
    assert chosen.state == {"none": 3 * STAGE, "optimizer": 2.25 * STAGE, "parameters": 2.5 * STAGE}
    assert "shard='none' 1.2 kB, a step of " in chosen.describe(1e6) and "chosen: shard='none'" in chosen.describe(1e6)


def test_the_fastest_level_is_taken() -> None:
    """The last stage is needed last and ends first, so that its messages run beside phases of the first one."""
    chosen = _choose(1e6, Link(bandwidth=STAGE), sizes=(4, 100))
    assert chosen.level == "parameters"
    assert chosen.seconds["none"] > chosen.seconds["optimizer"] > chosen.seconds["parameters"]
    planner = chosen.on(Planner("wavek", 2, COSTS, MEMORY, memory_limit=1e6))
    assert planner.step_time(4) == pytest.approx(chosen.seconds["parameters"])
    assert planner.reserved == chosen.state["parameters"]


def test_gradients_of_accumulated_batches_count() -> None:
    """Without shards they are in ``.grad``, beside the sums of the present batch."""
    chosen = _choose(1e6, Link(), accumulates=True)
    assert chosen.state == {"none": 4 * STAGE, "optimizer": 2.25 * STAGE, "parameters": 2.5 * STAGE}


def test_experts_count_on_the_rank_that_has_most_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second parameter has five experts, three of them on two of four ranks, which share their momentum."""
    monkeypatch.setattr(chosen_state, "CapturedPotential", SimpleNamespace)
    monkeypatch.setattr(chosen_state, "spread_experts", lambda *_: SimpleNamespace(parameters=["1"]))
    own = 0.6 * 5 * 4
    alone, shared = 3 * own, 2.5 * own
    levels = {"none": alone, "optimizer": shared, "parameters": shared}
    assert _choose(1e6, Link(), sizes=(1, 5), expert_size=2).state == levels
    with pytest.raises(ValueError, match="alone take 48 B with shard='none', 42 B"):
        _choose(41.0, Link(), sizes=(1, 5), expert_size=2)
    twice = _choose(1e6, Link(), sizes=(1, 5), expert_size=2, accumulates=True)
    assert twice.state == {level: size + own for level, size in levels.items()}
    assert _choose(1e6, Link(), sizes=(1, 4), expert_size=4).state == dict.fromkeys(LEVELS, 3 * 4)


@pytest.mark.parametrize(
    ("limit", "level"), [(NEEDS["optimizer"], "optimizer"), (NEEDS["parameters"] + 60, "parameters")]
)
def test_only_what_fits_is_taken(limit: float, level: str) -> None:
    chosen = _choose(limit, Link())
    assert chosen.level == level and "none" not in chosen.seconds
    assert "'none' 1.2 kB, does not fit" in chosen.describe(limit)


def test_a_level_and_what_stages_keep_are_chosen_together() -> None:
    """Keeping all fits only where state is shared, and is faster than computing again with all state on each rank."""
    slow = PhaseCosts(2.0, 3.0, 4.0, 3.0)
    many, few = (MemoryCosts(400.0, 200.0, 100.0),) * 2, (MemoryCosts(1.0, 1.0, 1.0),) * 2
    measured = {"keep": ActivationCosts(COSTS, many), "recompute": ActivationCosts((slow,) * 2, few)}
    chosen = _choose(4.1 * STAGE, Link(), activations=measured)
    assert chosen.level == "optimizer" and chosen.activations is not None
    assert chosen.activations.names == ("keep", "keep") and set(chosen.seconds) == set(LEVELS)
    (alone,) = {_choose(4.1 * STAGE, Link(), ("none",), measured).seconds["none"]}
    assert alone > chosen.seconds["optimizer"]


def test_nothing_fits() -> None:
    with pytest.raises(
        ValueError, match=r"alone take 1.6 kB with shard='none', 1.3 kB .*, 1 kB with shard='parameters'"
    ):
        _choose(2.4 * STAGE, Link())
    with pytest.raises(
        ValueError, match="and the state of the stages takes 1000 of them, .* already holds .* saved tensors"
    ):
        _choose(2.5 * STAGE + 1, Link())


def test_a_model_that_does_not_fit_on_one_rank_trains_on_four(pool: RankPool) -> None:
    """The limit is less than Adam's state, gradients and parameters together."""
    size = sum(p.nbytes for p in workers.module("Adam").parameters())
    limit = 3.8 * size
    ((error, _),) = pool.run(workers.fit_within, limit, 1, world_size=1)
    assert f"memory_limit={limit:.4g} bytes per rank" in error and "shard='none'" in error
    found = pool.run(workers.fit_within, limit, 4, world_size=4)
    levels, moments = zip(*found, strict=True)
    assert set(levels) <= {"optimizer", "parameters"} and len(set(levels)) == 1
    assert max(moments) < 0.6 * size
    check_parity(
        pool, 4, workers.data, partial(workers.module, "Adam"), pipeline_size=1, data_size=4, memory_limit=limit
    )


EXPERTS = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "expert_size": 2}
GRAPH_EXPERTS = {"pipeline_size": 1, "graph_size": 2, "num_microbatches": 2, "expert_size": 2}


@pytest.mark.parametrize(
    ("mesh", "data", "module", "limit", "level"),
    [
        (EXPERTS, graph_models.Data, partial(expert_workers.experts, 2), 66e3, "optimizer"),
        slow(
            {**EXPERTS, "expert_placement": "replicate"}, graph_models.Data, expert_workers.experts, 66e3, "optimizer"
        ),
        slow(EXPERTS, tiny.data, expert_workers.matris, 269e3, "parameters"),
        slow(GRAPH_EXPERTS, tiny.data, expert_workers.matris, 269e3, "parameters"),
        slow(GRAPH_EXPERTS, tiny.data, expert_workers.matris, 300e3, "optimizer"),
    ],
)
def test_experts_within_a_limit(
    pool: RankPool, mesh: dict[str, Any], data: Any, module: Any, limit: float, level: str
) -> None:
    """Only one level fits, where phases compute again; with a little less nothing fits, which every rank says."""
    train = expert_workers.train_within_limit
    first, _ = check_parity(pool, 2, data, module, train=train, memory_limit=limit, **mesh)
    assert first.level == level and first.activations == {"recompute"}
    arguments = module, data, {**mesh, "memory_limit": 0.8 * limit}, 1, {}
    one, other = pool.run(expert_workers.error_within_limit, *arguments, world_size=2)
    assert one == other and "parameters, gradients and optimizer state alone take" in one
