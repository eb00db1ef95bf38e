"""Potentials with stages of their own on graph ranks: what they have to declare, and the verification of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import graph_explicit_workers as workers
import graph_models
import plain_modules
import pytest
import torch
from explicit_models import Alone, CountsStructures, Features, SelfDividing
from torch import nn

from lightning_januspipe import with_halo
from lightning_januspipe.capture import CaptureError
from lightning_januspipe.capture.stages.explicit import ExplicitPotential
from lightning_januspipe.graph import shard_potential
from lightning_januspipe.graph.placement import PlacementKind
from lightning_januspipe.testing import RankError, RankPool, assert_matches_single_process


def test_rows_are_found_by_their_sizes() -> None:
    module, found = workers.captured(SelfDividing())
    sharded = shard_potential(found.potential, module.potential)
    names = list(found.potential.inputs_by_name)  # type: ignore[attr-defined]
    staged = {(names[position], dim) for position, dim in sharded.rows}
    assert staged == {("positions", 0), ("species", 0), ("edges", 1), ("index", 0)}
    assert {(names[s.position], s.selected) for s in sharded.localized} == {
        ("edges", ((0, 0),)), ("edges", ((0, 1),))
    }  # fmt: skip
    assert [v.kind for v in sharded.observables] == [PlacementKind.REPLICATE, PlacementKind.SHARD], (
        "energies and charges"
    )
    assert [v.kind for v in sharded.derivatives] == [PlacementKind.SHARD, PlacementKind.REPLICATE], (
        "positions and strain"
    )
    assert sharded.positions == names.index("positions")


def test_one_rank_needs_no_halo() -> None:
    features = torch.randn(3, 2)
    assert with_halo(features, {"positions": torch.randn(3, 3)}) is features


def changed(**attributes: Any) -> nn.Module:
    return type("Changed", (SelfDividing,), attributes)()


class _State(nn.Module):
    """Hands on something for each structure."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, inputs: Features, features: Features) -> Features:
        found = self.part(inputs, features)
        return {**found, "state": inputs["cell"].sum((1, 2)) + 0 * found["h"].sum()}


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"stage_edges": None}, r"has stage_edges = None; expected the source and the target of edges, among"),
        ({"stage_edges": ("from", "to")}, r"has stage_edges = \('from', 'to'\); expected"),
        ({"stage_edges": ("positions", ("edges", 0))}, r"names 'positions' \[\] of shape .* one index for each edge"),
        ({"stage_edges": (("edges", 0), "species")}, "expected two inputs with one entry for each edge"),
        ({"stage_edges": ("species", "index")}, "expected two inputs with one entry for each edge"),
        ({"stage_edges": (("edges", 0), ("edges", 0))}, "expected the source and the target of edges"),
        ({"stage_edges": (0, 1)}, r"has stage_edges = \(0, 1\); expected the source and the target"),
        ({"stage_edges": "edges"}, "expected the source and the target of edges"),
        ({"stage_edges": (("edges", 5), ("edges", 0))}, r"names 'edges' \[5\] of shape"),
        ({"stage_coordinates": ("strain",)}, r"needs positions \(N, 3\) among stage_coordinates"),
    ],
)
def test_what_has_to_be_declared(attributes: dict[str, Any], reason: str) -> None:
    _, found = workers.captured(SelfDividing())
    staged = found.potential
    assert isinstance(staged, ExplicitPotential)
    if "stage_coordinates" in attributes:
        staged = replace(staged, coordinates=attributes["stage_coordinates"])
    with pytest.raises(CaptureError, match=reason) as caught:
        shard_potential(staged, changed(**attributes))
    assert "graph_size=1" in str(caught.value)


def test_features_of_structures_are_not_handed_on() -> None:
    potential = SelfDividing()
    potential.parts[1] = _State(potential.parts[1])
    module, found = workers.captured(potential)
    with pytest.raises(CaptureError, match=r"part 1 .* returns 'state' of shape .* no row for each atom"):
        shard_potential(found.potential, module.potential)


@pytest.mark.parametrize(("num_ranks", "sizes"), [(2, (9, 4, 3)), (2, (4, 4)), (3, (12,)), (3, (1, 1))])
def test_proof(pool: RankPool, num_ranks: int, sizes: tuple[int, ...]) -> None:
    """Also where a rank has no atoms."""
    assert pool.run(workers.verify, "SelfDividing", sizes, world_size=num_ranks) == [""] * num_ranks


@pytest.mark.parametrize("kind", ["Shifted", "Squared"])
@pytest.mark.parametrize("sizes", [(9, 4, 3), (4, 4)], ids=["", "could be dealt whole"])
def test_what_is_no_sum_over_atoms_is_refused(pool: RankPool, kind: str, sizes: tuple[int, ...]) -> None:
    for reason in pool.run(workers.verify, kind, sizes, world_size=2):
        assert "sharded over 2 ranks, the result 'energy'" in reason and "have to be sums over atoms" in reason


def test_proof_leaves_the_module_as_it_was_also_in_inference_mode(pool: RankPool) -> None:
    """And in the default type of the precision."""
    strategy = {"graph_size": 2, "pipeline_size": 1, "num_microbatches": 1}
    for calls, loss in pool.run(workers.validated, strategy, world_size=2):
        assert calls == 0, "a buffer counts calls of the part in training only"
        assert loss == pytest.approx(pool.run(workers.validated, None, world_size=1)[0][1], rel=1e-9)


def test_a_part_that_fails_on_one_rank_ends_all_at_once(pool: RankPool, tmp_path: Path) -> None:
    """Although that rank keeps its exception."""
    strategy = {"graph_size": 2, "pipeline_size": 1, "num_microbatches": 1, "timeout": 90}
    (other, seconds), (own, _) = pool.run(workers.failed, strategy, str(tmp_path), world_size=2, timeout=120)
    assert own == "ValueError: no such table"
    assert other.startswith("RankLostError: global rank 0 waited") and seconds < 30


class Counting(plain_modules.Explicit):
    def __init__(self) -> None:
        super().__init__()
        self.potential = CountsStructures()


def test_the_number_of_structures_is_that_of_an_input(pool: RankPool) -> None:
    """A rank may have no atoms of the last structure; found before training."""
    strategy = {"graph_size": 2, "pipeline_size": 1, "num_microbatches": 1}
    with pytest.raises(RankError, match="Take the number of structures from the shape of an input") as caught:
        assert_matches_single_process(Counting, graph_models.Data, devices=2, strategy=strategy, steps=1, pool=pool)
    assert "verify_explicit_sharding" in str(caught.value)


class LacksExchange(plain_modules.Explicit):
    def __init__(self) -> None:
        super().__init__()
        self.potential = Alone()


def test_a_part_that_does_not_ask_for_other_atoms_is_refused(pool: RankPool) -> None:
    """Before training, and without a rank that waits for ever."""
    strategy = {"graph_size": 2, "pipeline_size": 1, "num_microbatches": 1}
    with pytest.raises(RankError, match=r"without with_halo\(features, inputs\), or stage_edges"):
        assert_matches_single_process(
            LacksExchange, graph_models.Data, devices=2, strategy=strategy, steps=1, pool=pool
        )
