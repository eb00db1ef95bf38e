"""What has no derivative is computed for the whole micro-batch, and grids are looked up: right, and broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import graph_models
import pytest
from capture_models import Step as PlainStep
from capture_models import Traced, make_batch
from graph_habits import CountsWithin, FillsGrid, MasksLast
from habits import Step, collate, sample
from torch import Tensor, nn

from lightning_januspipe.capture import CaptureError
from lightning_januspipe.graph import insert_exchanges
from lightning_januspipe.graph.insert_exchanges import ShardedProgram, shard_captured
from lightning_januspipe.graph.shard_microbatch import MicrobatchSharder, ShardedInputs, ShardPlan


def batch(*seeds: int) -> Any:
    return collate([sample(seed) for seed in seeds])


@cache
def sharded(kind: type[nn.Module]) -> tuple[Traced, ShardedProgram]:
    """A potential, traced, cut and with exchanges."""
    found = Traced(Step(kind()), batch(0, 1, 2), batch(5, 3, 4, 7))
    return found, shard_captured(found.cut(2))


def verify(kind: type[nn.Module], num_ranks: int, *seeds: int) -> None:
    """Compares all ranks in lock-step with the whole micro-batch."""
    found, potential = sharded(kind)
    call = found.call_on(batch(*seeds))
    potential.verify(found.potential, found.cut(2).inputs(found.potential)(call.args, call.kwargs), num_ranks)


@pytest.mark.parametrize("seeds", [(5, 3, 4, 7), (0,), (1, 1)])
@pytest.mark.parametrize("kind", [FillsGrid, CountsWithin, MasksLast])
def test_also_where_ranks_have_no_atoms(kind: type[nn.Module], seeds: tuple[int, ...]) -> None:
    verify(kind, 5, *seeds)


def test_what_is_run_for_the_whole_micro_batch() -> None:
    """Each rank is given the weights of its atoms, and nothing that the weights are made of."""
    _, found = sharded(CountsWithin)
    assert len(found.values) == 1
    (weights,) = found.values
    assert found.captured.program.spec(weights).dtype.is_floating_point
    _, grid = sharded(FillsGrid)
    assert [index.slots != 1 for index in grid.computed] == [False, True], "edges of atoms, and places in the grid"


def _whole(inputs: ShardedInputs, plan: ShardPlan, values: list[str]) -> list[Tensor]:
    num = len(inputs.extended) - len(values)
    return [*inputs.extended[:num], *(plan.computed[name] for name in values)]


def _of_others(inputs: ShardedInputs, plan: ShardPlan, values: list[str]) -> list[Tensor]:
    return [*inputs.extended[:-1], inputs.extended[-1].roll(1, 0)]


@pytest.mark.parametrize(
    ("broken", "kind"),
    [(_whole, CountsWithin), (_of_others, CountsWithin), (_of_others, FillsGrid), (_whole, MasksLast)],
)
def test_rows_that_are_not_a_ranks_own(
    monkeypatch: pytest.MonkeyPatch, broken: Callable[..., list[Tensor]], kind: type[nn.Module]
) -> None:
    shard = MicrobatchSharder.shard
    values = list(sharded(kind)[1].values)

    def other(self: MicrobatchSharder, tensors: list[Tensor], plan: ShardPlan, rank: int) -> ShardedInputs:
        found = shard(self, tensors, plan, rank)
        return replace(found, extended=broken(found, plan, values))

    monkeypatch.setattr(MicrobatchSharder, "shard", other)
    with pytest.raises(CaptureError, match=r"graph_size > 1 is not possible: .*(differs by|fails on the rows)"):
        verify(kind, 2, 5, 3, 4, 7)


def test_places_in_a_grid_that_are_taken_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MicrobatchSharder, "_slots", lambda self, tensors, index: 1)
    with pytest.raises((CaptureError, IndexError)):
        verify(FillsGrid, 2, 5, 3, 4, 7)


def test_grids_without_the_rows_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_januspipe.graph import exchange_ops
    from lightning_januspipe.graph import verify_captured as module

    monkeypatch.setitem(module._EXCHANGES, exchange_ops.gather_halo, module._EXCHANGES[exchange_ops.with_room])
    with pytest.raises(CaptureError, match=r"sharded over 2 ranks, .* differs by"):
        verify(FillsGrid, 2, 5, 3, 4, 7)


def test_what_has_a_derivative_is_not_run_for_the_whole_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused; if it were run so, energies would be right, and the verification would find gradients wrong."""
    found = Traced(PlainStep(graph_models.MeanField()), make_batch((4, 3, 5)))
    captured = found.cut(2)
    with pytest.raises(CaptureError, match="combines all atoms or edges"):
        shard_captured(captured)
    monkeypatch.setattr(insert_exchanges._ExchangeInserter, "may_run_whole", lambda self, name: True)
    monkeypatch.setattr(insert_exchanges, "values_of_indices", lambda p, f, c, n, changing, unplaced: list(unplaced))
    call = found.call_on(make_batch((9, 4, 3)))
    tensors = captured.inputs(found.potential)(call.args, call.kwargs)
    with pytest.raises(CaptureError, match=r"the (derivative|parameter gradient) .* differs by"):
        shard_captured(captured).verify(found.potential, tensors, 2)
