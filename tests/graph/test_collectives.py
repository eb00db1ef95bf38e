"""Exchanges between graph ranks: exact to any order, the same messages on all ranks, and faults that would be found."""

from __future__ import annotations

import pytest
import torch
from graph_derivative_workers import FAULTS, force_loss, numerical_derivatives, third_derivative, under_faults
from graph_workers import (
    SHARDINGS,
    messages,
    phases,
    refusals,
    same_bits,
    values,
    with_a_part_that_needs_no_gradient,
)

from lightning_januspipe.graph import (
    Exchange,
    collect_rows,
    count_once,
    gather_halo,
    replicate,
    sum_halo,
    sum_over_ranks,
    whole,
)
from lightning_januspipe.testing import RankPool

RTOL = 1e-12


@pytest.mark.parametrize(("kind", "num_ranks"), [*((k, 3) for k in SHARDINGS), ("mixed", 2), ("mixed", 4)])
def test_values_of_any_dtype_and_layout(pool: RankPool, kind: str, num_ranks: int) -> None:
    assert [w for wrong in pool.run(values, kind, world_size=num_ranks) for w in wrong] == []


@pytest.mark.parametrize("replicated_positions", [False, True])
@pytest.mark.parametrize(("kind", "num_ranks"), [*((k, 3) for k in SHARDINGS), ("mixed", 2), ("mixed", 4)])
def test_the_parameter_gradient_of_a_force_loss(
    pool: RankPool, kind: str, num_ranks: int, replicated_positions: bool
) -> None:
    for errors in pool.run(force_loss, kind, replicated_positions, world_size=num_ranks):
        assert max(errors.energy, errors.forces, errors.gradients) < RTOL


@pytest.mark.parametrize(("kind", "num_ranks"), [("mixed", 2), ("one rank has nothing", 3), ("mixed", 4)])
def test_numerical_derivatives(pool: RankPool, kind: str, num_ranks: int) -> None:
    pool.run(numerical_derivatives, kind, world_size=num_ranks)


def test_a_third_derivative(pool: RankPool) -> None:
    for found, expected in pool.run(third_derivative, world_size=3):
        assert abs(found - expected) < RTOL * abs(expected) and abs(expected) > 1e-3


def test_faults_are_found(pool: RankPool) -> None:
    by_rank = pool.run(under_faults, world_size=2)
    for name in FAULTS:
        for own, replicated, differing in (found[name] for found in by_rank):
            if name == "none":
                assert max(own.gradients, replicated.gradients) < RTOL and differing == []
                continue
            assert name.split(":")[0] in [*differing, "replicate"] and differing, f"numerical derivatives miss: {name}"
            errors = replicated if name.startswith("replicate") else own
            assert errors.energy < RTOL, "these are faults of derivatives"
            assert errors.gradients > 1e-3, f"the gradient of a force loss misses: {name}"
            if "raw" in name and not name.startswith("replicate"):
                assert errors.forces < RTOL, "only the second derivative is wrong"


def test_a_free_division_sends_nothing(pool: RankPool) -> None:
    for counts in pool.run(messages, "free", world_size=3):
        assert counts["all_to_all_single"] == 0
        # The energy and the sum of features; and the latter's cotangent, which forces depend on, is differentiated.
        assert counts["all_reduce"] == 3


@pytest.mark.parametrize("kind", ["mixed", "one rank has nothing", "one reads, none is read"])
def test_all_ranks_send_the_same_number_of_messages(pool: RankPool, kind: str) -> None:
    first, *others = pool.run(messages, kind, world_size=3)
    assert first["all_to_all_single"] > 8 and all(o == first for o in others)


def test_sums_have_the_same_bits_on_all_ranks(pool: RankPool) -> None:
    (first, _), *others = pool.run(same_bits, world_size=3)
    assert all(torch.equal(first, other) for other, _ in others)


def test_without_gradients(pool: RankPool) -> None:
    assert pool.run(with_a_part_that_needs_no_gradient, world_size=2) == [[(True, True)] * 4] * 2


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_what_does_not_fit_is_refused(pool: RankPool, num_ranks: int) -> None:
    for rank, found in enumerate(pool.run(refusals, world_size=num_ranks)):
        assert len(found) == 5
        assert all("rows on this rank" in m for m in found[:3])
        assert f"rank {rank} of {num_ranks}, but this is rank 0 of 1" in found[3]
        assert f"this is rank {rank} of {num_ranks}" in found[4]


@pytest.mark.parametrize("name", ["two stages", "observables in several stages", "no coordinates in the middle"])
def test_exchanges_inside_of_stages(pool: RankPool, name: str) -> None:
    """Through the phases, at once and deferred: the same numbers as in one process, with no needless exchange."""
    at_once, deferred = (pool.run(phases, name, defer, world_size=3) for defer in (False, True))
    for error, _ in at_once + deferred:
        assert error < RTOL
    # A layer with geometry exchanges messages in each of four phases, and positions in FE, FF and BF. Messages of the
    # first layer depend on parameters only: in FE and BE.
    num_layers = 3 if name.startswith("obs") else 2
    assert {counts["all_to_all_single"] for _, counts in at_once + deferred} == {num_layers * (4 + 3) - 2}
    assert {counts["all_reduce"] for _, counts in at_once} == {counts["all_reduce"] for _, counts in deferred}


def test_one_rank_exchanges_nothing() -> None:
    exchange, x = Exchange(whole(3)), torch.rand(3, 2, requires_grad=True)
    for function in (gather_halo, sum_halo, sum_over_ranks, replicate, count_once):
        assert function(x, exchange) is x
    collected = collect_rows(x, exchange)
    assert torch.equal(collected, x) and not collected.requires_grad
