"""Measured stages: costs of phases, and messages of the size that the executor expects."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_januspipe.engine.executor import Executor, StepInProgress
from lightning_januspipe.engine.route import Route
from lightning_januspipe.engine.specs import MicrobatchInput
from lightning_januspipe.plan import (
    Measured,
    TooManyRanks,
    measure_stages,
)
from lightning_januspipe.schedule import (
    MemoryCosts,
    PhaseCosts,
    build_schedule,
)


@pytest.fixture(scope="module")
def measured() -> Measured:
    import tiny
    import torch

    dtype = torch.get_default_dtype()
    module, data = tiny.module(num_layers=3), tiny.data()
    data.setup("fit")
    found = measure_stages(module, lambda batch: module.training_step(batch, 0), *_batches(data), range(3), repeats=3)
    torch.set_default_dtype(dtype)
    return found


def _batches(data: Any) -> tuple[Any, Any]:
    from lightning_januspipe.loader.examples import example_batches

    return example_batches(data.train_dataloader(), 4)


def test_costs(measured: Measured) -> None:
    assert measured.num_stages == 3 and measured.repeats == 3 and measured.spread >= 0
    assert all(costs.wf == costs.we == 0 for costs in measured.costs)
    assert all(costs.wf > 0 and costs.we > 0 for costs in measured.deferred)
    assert all(memory.energy > 0 and memory.force > 0 for memory in (*measured.memory, *measured.deferred_memory))


@pytest.mark.parametrize("name", ["wavek", "1f1b-2nd"])
def test_messages_are_those_of_the_executor(measured: Measured, name: str) -> None:
    """Bytes of every message, as the receiving rank of the executor expects it."""
    import tiny

    from lightning_januspipe.capture import CapturedStage
    from lightning_januspipe.engine.p2p import packed_size
    from lightning_januspipe.engine.specs import ChainSpec

    potential = tiny.module(num_layers=3).get_submodule(measured.potential.path)
    chain: ChainSpec = measured.potential.chain
    functions = [CapturedStage(measured.potential, i, potential) for i in range(3)]
    schedule = build_schedule(name, 3, 2, measured.costs, chunks=1)
    if name == "1f1b-2nd":
        assert not schedule.is_folded
    inputs = [MicrobatchInput([], measured.symbols)] * 2
    seen = 0
    for rank in range(3):
        stages = {s: SimpleNamespace(function=functions[s]) for s in schedule.stages_of(rank)}
        step = StepInProgress(Executor(rank, stages, chain), Route(schedule, rank), inputs, None)  # type: ignore[arg-type]
        for messages in step.route.incoming.values():
            for message in messages:
                assert measured.message_bytes(message) == packed_size(step.form(message).shapes())
                seen += 1
    assert seen == sum(map(len, schedule.messages().values())) > 0


def test_even_shares_for_more_ranks(measured: Measured) -> None:
    stages = measured.stages(6)
    assert isinstance(stages.costs, PhaseCosts) and isinstance(stages.memory, MemoryCosts)
    assert 6 * stages.costs.total == pytest.approx(sum(costs.total for costs in measured.costs))
    assert 6 * stages.memory.energy == pytest.approx(sum(memory.energy for memory in measured.memory))
    assert measured.stages(3).costs == measured.costs and measured.stages(3).chunks == 1


def test_too_many() -> None:
    import tiny

    module, data = tiny.module(num_layers=2), tiny.data()
    data.setup("fit")
    with pytest.raises(TooManyRanks, match="9 ranks, but the potential has only") as info:
        measure_stages(module, lambda batch: module.training_step(batch, 0), *_batches(data), range(9), repeats=1)
    assert 1 <= info.value.most < 9 and math.isfinite(info.value.most)
