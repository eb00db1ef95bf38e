"""Exchanges in captured potentials: where they stand, that they are enough, and what has none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache

import graph_models as models
import pytest
from capture_models import Potential, Step, Traced, make_batch
from graph_contract_workers import Values
from torch import Tensor, nn

from lightning_januspipe.capture import CaptureError
from lightning_januspipe.graph import exchange_ops
from lightning_januspipe.graph.insert_exchanges import ShardedProgram, shard_captured
from lightning_januspipe.graph.placement import PlacementKind
from lightning_januspipe.graph.shard_microbatch import MicrobatchSharder

KINDS = (
    *(Potential, models.BothWays, models.States, models.Angles, models.Attention, models.Peaks, models.Composed),
    *(models.Numbered, models.Masked, models.Started, models.Sliced, Values),
)
BATCH = models.angles_of(make_batch((9, 4, 3)))


@cache
def traced(kind: type[Potential], num_layers: int) -> Traced:
    return Traced(Step(kind(num_layers=num_layers)), models.angles_of(make_batch((4, 3, 5))))


def with_exchanges(kind: type[Potential], num_layers: int = 2, num_stages: int = 2) -> tuple[Traced, ShardedProgram]:
    """A potential, traced, cut and with exchanges."""
    found = traced(kind, num_layers)
    return found, shard_captured(found.cut(num_stages))


def exchanges(found: ShardedProgram) -> Counter[str]:
    """How often each exchange stands in a potential."""
    nodes = found.potential.program.nodes
    return Counter(
        n.target.__name__ for n in nodes if getattr(n.target, "__module__", "").endswith("graph.exchange_ops")
    )


@pytest.mark.parametrize("num_ranks", [2, 3, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_sharded_batch_is_the_whole_one(kind: type[Potential], num_ranks: int) -> None:
    source, found = with_exchanges(kind)
    captured = source.cut(2)
    call = source.call_on(BATCH)
    tensors = captured.inputs(source.potential)(call.args, call.kwargs)
    halos = [
        s.num_halo
        for s in MicrobatchSharder(found, source.potential, num_ranks).plan_balanced(tensors).shards[found.classes.root]
    ]
    assert sum(halos) > 0, "rows of other ranks are read"
    assert found.verify(source.potential, tensors, num_ranks)


def test_exchanges_stand_where_rows_of_others_are_read() -> None:
    """Positions and the features before each layer come from other ranks; energies are summed, strain is replicated."""
    _, found = with_exchanges(Potential, num_layers=3)
    assert exchanges(found) == {"gather_halo": 4, "sum_over_ranks": 1, "replicate": 1}
    assert [v.kind for v in found.observables] == [PlacementKind.SHARD, PlacementKind.REPLICATE] or [
        v.kind for v in found.observables
    ] == [PlacementKind.REPLICATE, PlacementKind.SHARD]
    assert [v.kind for v in found.derivatives] == [PlacementKind.SHARD, PlacementKind.REPLICATE]


def test_sums_into_rows_of_others_go_there() -> None:
    _, found = with_exchanges(models.BothWays)
    counts = exchanges(found)
    assert counts["with_room"] == counts["sum_halo"] == 2


def test_parameters_of_what_all_ranks_compute_count_once() -> None:
    """Weights and biases of three layers of states, the first states, the energy's scale and shift."""
    _, found = with_exchanges(models.States, num_layers=3)
    assert exchanges(found)["count_once"] == 9


def test_edges_of_angles_are_sharded_too() -> None:
    source, found = with_exchanges(models.Angles)
    assert len(found.classes.names) == 3
    call = source.call_on(BATCH)
    tensors = source.cut(2).inputs(source.potential)(call.args, call.kwargs)
    shards = MicrobatchSharder(found, source.potential, 3).plan_balanced(tensors).shards
    for name, of_class in shards.items():
        assert sum(s.num_own for s in of_class) == of_class[0].num_rows
        assert any(s.num_halo for s in of_class) == (name != found.classes.names[-1]), "nothing reads angles"


def test_stages_have_the_exchanges_of_what_they_run() -> None:
    _, found = with_exchanges(Potential, num_layers=4, num_stages=3)
    potential, seen = found.potential, 0
    for body in potential.cut.bodies:
        own = set(body)
        for name in body:
            for given in potential.program.by_name[name].inputs():
                if getattr(potential.program.by_name[given].target, "__name__", "") == "gather_halo":
                    assert given in own or given in potential.regions.geometry
                    seen += 1
    assert seen >= 4, "each layer reads rows of others"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (models.MeanField, "combines all atoms or edges"),
        (models.Weighted, "computes aten.mul.Tensor of the indices of atoms or edges"),
        (models.Shifted, "combines all atoms or edges"),
        (models.Counted, "uses the number of atoms or edges as a value"),
        (models.Looked, "looks atoms or edges up by indices that it computes"),
    ],
)
def test_what_has_no_exchange_is_refused(kind: type[Potential], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason) as caught:
        with_exchanges(kind)
    assert "graph_size=1" in str(caught.value)


def test_a_missing_exchange_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The verification does not believe what the analysis says: halos that stay empty change energies."""
    from lightning_januspipe.graph import verify_captured as module

    source, found = with_exchanges(Potential)
    captured = source.cut(2)
    call = source.call_on(BATCH)
    tensors = captured.inputs(source.potential)(call.args, call.kwargs)
    monkeypatch.setitem(module._EXCHANGES, exchange_ops.gather_halo, module._EXCHANGES[exchange_ops.with_room])
    with pytest.raises(CaptureError, match="sharded over 2 ranks, .* differs by"):
        found.verify(source.potential, tensors, 2)


@pytest.mark.parametrize("wrong", [None, 0, -1])
def test_gradients_are_compared_in_groups(monkeypatch: pytest.MonkeyPatch, wrong: int | None) -> None:
    from lightning_januspipe.graph.verify_captured import LockStep

    source, found = with_exchanges(Potential)
    call = source.call_on(BATCH)
    tensors = source.cut(2).inputs(source.potential)(call.args, call.kwargs)
    trained = [name for name, p in source.potential.named_parameters() if p.requires_grad]
    changed = "" if wrong is None else repr(trained[wrong])
    gradients, groups = LockStep.gradients, []

    def noted(ranks: LockStep, parameters: Sequence[nn.Parameter]) -> list[tuple[str, Tensor]]:
        result = gradients(ranks, parameters)
        groups.append(len(result))
        is_wrong = bool(changed and ranks._shards)
        return [(what, g + 1 if is_wrong and what.endswith(changed) else g) for what, g in result]

    monkeypatch.setattr(LockStep, "gradients", noted)
    with nullcontext() if wrong is None else pytest.raises(CaptureError, match=f"for {changed} of the potential"):
        found.verify(source.potential, tensors, 2, gradient_bytes=1.0)
    assert groups == [1] * 2 * len(trained)
