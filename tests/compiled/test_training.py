"""Training with compiled phases equals training in one process; most tests run the phase graphs uncompiled."""

from __future__ import annotations

import re
from contextlib import nullcontext
from functools import partial
from typing import Any

import graph_models
import plain_modules
import pytest
import tiny
from compiled_workers import (
    captures_to_compile,
    eager_microbatches,
    first_plan,
    fit_then_evaluate,
    smallest_of_two_layers,
    train_changing_over,
    train_changing_over_when_compiled,
    train_compiled,
    train_compiled_with_deferred_gradients,
    train_compiled_with_guests,
    train_interpreted,
    train_interpreted_moving,
    train_interpreted_with_guests,
    train_partly_interpreted,
    train_recomputing_within_a_limit,
    train_with_a_misfit_on_one_rank,
    train_without_an_exchange,
)
from expert_workers import experts, matris, train_with_guests
from parity_check import check_parity
from pools import pool_of, slow

from lightning_januspipe.testing import RankError, RankPool, compare_records, train_in_pipeline, train_reference
from lightning_januspipe.testing.interpreted import train_interpreted as train_despite_misfits


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        slow(1, {"num_microbatches": 4}),
        (2, {"schedule": "wavek-zb", "num_microbatches": 4}),
        slow(2, {"schedule": "wavek", "num_microbatches": 4, "activation": "keep"}),
        slow(2, {"schedule": "wavek", "num_microbatches": 4, "activation": "pointwise"}),
        slow(2, {"schedule": "wavek", "num_microbatches": 4, "activation": "offload"}),
        slow(2, {"schedule": "wavek-zb", "num_microbatches": 4, "activation": "keep"}),
        slow(2, {"schedule": "wavek-zb", "num_microbatches": 4, "activation": "recompute"}),
        slow(2, {"schedule": "gpipe", "num_microbatches": 2, "activation": "recompute"}),
        slow(2, {"schedule": "1f1b-fold", "num_microbatches": 8}),
        slow(2, {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2}),
        slow(2, {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "shard": "optimizer"}),
        slow(2, {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "shard": "parameters"}),
        slow(4, {"pipeline_size": 2, "data_size": 2, "num_microbatches": 4, "shard": "optimizer"}),
        slow(4, {"pipeline_size": 2, "data_size": 2, "num_microbatches": 4, "shard": "parameters"}),
        slow(4, {"pipeline_size": 2, "schedule": "wavek-zb", "num_microbatches": 4}),
        slow(1, {"num_microbatches": 2, "activation": "offload"}),
        slow(2, {"schedule": "gpipe", "num_microbatches": 4, "activation": "offload"}),
        slow(2, {"schedule": "wavek-zb", "num_microbatches": 4, "activation": "offload"}),
    ],
)
def test_parity(pool: RankPool, devices: int, strategy: dict[str, object]) -> None:
    check_parity(pool, devices, train=train_interpreted, compile=True, **strategy)


def test_parity_of_several_tasks(pool: RankPool) -> None:
    """Each task has a readout of its own, and structures of a micro-batch have different ones."""
    small = {"module": tiny.small_tasks_module, "data": tiny.tasks_data, "steps": 2}
    check_parity(pool, 1, train=train_interpreted, compile=True, num_microbatches=2, **small)


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (2, {"schedule": "wavek-zb", "num_microbatches": 4}),
        slow(1, {"num_microbatches": 2}),
        slow(3, {"num_microbatches": 1, "activation": "recompute"}),
    ],
)
def test_parity_of_stages_of_a_models_own(pool: RankPool, devices: int, strategy: dict[str, object]) -> None:
    given = {"module": plain_modules.ExplicitTraceable, "data": plain_modules.Data, "stages": "explicit", **strategy}
    ranks = check_parity(pool, devices, train=train_interpreted, compile=True, **given)
    assert not any(rank.eager for rank in ranks)


def test_a_micro_batch_without_edges_is_eager_where_a_part_branches(pool: RankPool) -> None:
    given = {"module": plain_modules.ExplicitBranching, "data": plain_modules.Data, "stages": "explicit"}
    (rank,) = check_parity(pool, 1, train=train_despite_misfits, compile=True, num_microbatches=4, **given)
    assert rank.num_misfits == 1 and not rank.eager


@pytest.mark.slow
def test_compiled_phases_take_over_in_stages_of_a_models_own(pool: RankPool) -> None:
    given = {"module": plain_modules.ExplicitTraceable, "data": plain_modules.Data, "stages": "explicit"}
    ranks = check_parity(pool, 2, train=train_changing_over, compile="auto", num_microbatches=4, **given)
    assert len({rank.changes.after for rank in ranks}) == 1 and not any(rank.eager for rank in ranks)


@pytest.mark.parametrize(
    ("strategy", "reasons"),
    [
        ({"num_microbatches": 4}, ["CaptureError: the forward reads a list of values"]),
        (
            {"pipeline_size": 1, "graph_size": 2, "num_microbatches": 2, "stages": "explicit"},
            ["it runs parts of the model on graph ranks"] * 2,
        ),
    ],
)
def test_parity_where_stages_of_a_models_own_stay_eager(
    pool: RankPool, strategy: dict[str, object], reasons: list[str]
) -> None:
    """The first part loops over values, and on graph ranks no part is traced."""
    given = {"module": plain_modules.Explicit, "data": plain_modules.Data, "compile": True, **strategy}
    ranks = check_parity(pool, 2, train=train_partly_interpreted, **given)
    found = [reason for rank in ranks for reason in rank.eager]
    assert len(found) == len(reasons)
    assert all(f.startswith(f"stage 0 runs eagerly: {reason}") for f, reason in zip(found, reasons, strict=True))


@pytest.mark.parametrize(("compiles", "expected"), [(True, True), ("auto", True), (False, False)])
def test_stages_that_will_be_compiled_are_cut_as_such(pool: RankPool, compiles: Any, expected: bool) -> None:
    first, other = pool.run(captures_to_compile, {"compile": compiles, "num_microbatches": 2}, world_size=2)
    assert (first, other) == ([expected], [])


@pytest.mark.parametrize(
    ("devices", "module", "strategy"),
    [
        slow(2, None, {"pipeline_size": 1, "num_microbatches": 2, "activation": "recompute"}),
        slow(2, None, {"pipeline_size": 1, "num_microbatches": 2, "activation": "keep"}),
        slow(2, None, {"pipeline_size": 1, "num_microbatches": 2, "activation": "pointwise"}),
        slow(2, None, {"pipeline_size": 1, "num_microbatches": 2, "shard": "optimizer"}),
        slow(2, None, {"pipeline_size": 1, "num_microbatches": 2, "shard": "parameters"}),
        slow(4, None, {"schedule": "wavek-zb", "num_microbatches": 4}),
        slow(4, None, {"schedule": "wavek", "num_microbatches": 4, "activation": "recompute"}),
        slow(4, None, {"schedule": "wavek", "num_microbatches": 4, "activation": "keep"}),
        slow(4, None, {"schedule": "wavek-zb", "num_microbatches": 4, "activation": "recompute"}),
        slow(2, None, {"pipeline_size": 1, "num_microbatches": 2, "activation": "offload"}),
        slow(4, None, {"schedule": "wavek-zb", "num_microbatches": 4, "activation": "offload"}),
        (2, graph_models.states, {"pipeline_size": 1, "num_microbatches": 2}),
        slow(2, graph_models.pairs, {"pipeline_size": 1, "num_microbatches": 2}),
        slow(2, graph_models.attention, {"pipeline_size": 1, "num_microbatches": 2, "activation": "recompute"}),
        slow(4, graph_models.angles, {"num_microbatches": 1}),
        slow(2, graph_models.composed, {"pipeline_size": 1, "num_microbatches": 2}),
    ],
)
def test_parity_of_graph_ranks(pool: RankPool, devices: int, module: Any, strategy: dict[str, object]) -> None:
    own = {} if module is None else {"module": module, "data": graph_models.Data}
    check_parity(pool, devices, train=train_interpreted, compile=True, graph_size=2, **own, **strategy)


@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (2, {"schedule": "wavek-zb", "num_microbatches": 4}),
        slow(1, {"num_microbatches": 2}),
        slow(2, {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "shard": "parameters"}),
        slow(2, {"pipeline_size": 1, "graph_size": 2, "num_microbatches": 2}),
    ],
)
def test_parity_where_compiled_phases_take_over(pool: RankPool, devices: int, strategy: dict[str, object]) -> None:
    """Some steps are eager, the others compiled; the ranks are ready after unequal numbers of steps."""
    ranks = check_parity(pool, devices, train=train_changing_over, compile="auto", **strategy)
    assert len({rank.changes.after for rank in ranks}) == 1, "ranks changed over before unequal steps"


@pytest.mark.parametrize(("limit", "kept"), [slow(1e9, "pointwise"), slow(8e6, "recompute")])
def test_compiled_phases_take_over_within_a_memory_limit(pool: RankPool, limit: float, kept: str) -> None:
    """Eager phases are planned, and compiled ones keep no more than these."""
    given = {"compile": "auto", "schedule": "wavek-zb", "num_microbatches": 4, "memory_limit": limit}
    ranks = check_parity(pool, 2, train=train_changing_over, **given)
    assert [set(rank.changes.kept) for rank in ranks] == [{kept}] * 2
    assert len({rank.changes.after for rank in ranks}) == 1


def test_the_schedule_is_made_for_the_times_of_compiled_phases(pool: RankPool) -> None:
    """The stages that are late on their rank when they are compiled count as such, on both ranks and in the line."""
    late = 0.1
    ranks = pool.run(first_plan, {"schedule": "wavek", "num_microbatches": 4}, late, world_size=2)
    costs = ranks[0]["costs"]
    assert all(r["costs"] == r["planned"] == costs for r in ranks)
    of_late = [c.total for c, rank in zip(costs, ranks[0]["placement"], strict=True) if rank == 1]
    assert of_late and all(late * 4 < total < late * 12 for total in of_late)
    shares = [int(share) for share in re.findall(r"(\d+) %", ranks[0]["line"])]
    total = sum(c.total for c in costs)
    assert shares == [round(100 * c.total / total) for c in costs]


@pytest.mark.slow
def test_a_memory_limit_chooses_what_graph_ranks_keep(pool: RankPool) -> None:
    """The whole micro-batch would keep twice 6 MB with "pointwise", and next to nothing with "recompute"."""
    given = {"compile": True, "graph_size": 2, "pipeline_size": 1, "num_microbatches": 2, "memory_limit": 3e6}
    check_parity(pool, 2, train=train_recomputing_within_a_limit, **given)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_inductor_compiles_in_the_background(pool: RankPool) -> None:
    """The training processes compile nothing, and a second start has all phases from its first step on."""
    given = {"compile": "auto", "num_microbatches": 4, "graph_size": 2}
    for _ in range(2):
        train, module = train_changing_over_when_compiled, partial(tiny.module, num_layers=1)
        check_parity(pool, 2, module=module, train=train, limit=1100, **given)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_inductor_compiles_deferred_weight_gradients(pool: RankPool) -> None:
    given = {"compile": True, "schedule": "wavek-zb", "num_microbatches": 4}
    train = train_compiled_with_deferred_gradients
    check_parity(pool, 2, module=smallest_of_two_layers, train=train, limit=1400, **given)


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["data_size", "graph_size"])
def test_parity_where_compiled_phases_with_experts_take_over(pool: RankPool, axis: str) -> None:
    given = {"compile": "auto", "num_microbatches": 2, "expert_size": 2, "pipeline_size": 1, axis: 2}
    data = graph_models.Data
    check_parity(pool, 2, module=partial(experts, 1), data=data, train=train_changing_over, **given)


@pytest.mark.parametrize(
    ("devices", "module", "strategy"),
    [
        (2, partial(experts, 1), {"pipeline_size": 1, "data_size": 2, "shard": "parameters"}),
        slow(2, partial(experts, 2), {"pipeline_size": 1, "graph_size": 2}),
        slow(2, partial(experts, 4), {"pipeline_size": 1, "data_size": 2, "activation": "recompute"}),
        slow(2, partial(experts, 1, 0), {"pipeline_size": 1, "data_size": 2, "activation": "keep"}),
        slow(2, partial(experts, 1), {"pipeline_size": 1, "graph_size": 2, "activation": "offload"}),
        slow(2, matris, {"pipeline_size": 1, "data_size": 2}),
        slow(4, partial(experts, 2), {"pipeline_size": 2, "data_size": 2, "schedule": "wavek-zb"}),
        slow(4, partial(experts, 2), {"pipeline_size": 2, "graph_size": 2, "shard": "optimizer"}),
        slow(4, partial(experts, 2), {"pipeline_size": 1, "data_size": 2, "graph_size": 2, "expert_size": 4}),
    ],
)
def test_parity_of_experts(pool: RankPool, devices: int, module: Any, strategy: dict[str, object]) -> None:
    given = {"compile": True, "num_microbatches": 2, "expert_size": 2, **strategy}
    data = tiny.data if module is matris else graph_models.Data
    check_parity(pool, devices, module=module, data=data, train=train_interpreted, **given)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_parity_of_experts_in_three_dimensions() -> None:
    mesh = {"pipeline_size": 2, "data_size": 2, "graph_size": 2, "num_microbatches": 2, "shard": "parameters"}
    with pool_of(8) as pool:
        given = {"compile": True, "expert_size": 4, **mesh}
        data, module = graph_models.Data, partial(experts, 2)
        check_parity(pool, 8, module=module, data=data, train=train_interpreted, **given)


@pytest.mark.slow
def test_parity_of_experts_that_move(pool: RankPool) -> None:
    given = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "compile": True, "expert_size": 2}
    more = {**given, "expert_placement": "load"}
    data, module = graph_models.Data, partial(experts, 2)
    check_parity(pool, 2, module=module, data=data, train=train_interpreted_moving, **more)


@pytest.mark.parametrize(
    ("devices", "module", "strategy"),
    [
        (2, partial(experts, 1, num_layers=1), {"pipeline_size": 1, "data_size": 2}),
        slow(2, partial(experts, 2, num_layers=1), {"pipeline_size": 1, "graph_size": 2}),
        slow(2, partial(experts, 1, 0), {"pipeline_size": 1, "data_size": 2, "activation": "recompute"}),
        slow(4, partial(experts, 2), {"pipeline_size": 2, "data_size": 2, "schedule": "wavek-zb"}),
        slow(4, partial(experts, 2), {"pipeline_size": 2, "graph_size": 2, "shard": "parameters"}),
        slow(4, partial(experts, 2), {"pipeline_size": 1, "data_size": 2, "graph_size": 2, "expert_size": 4}),
    ],
)
def test_parity_of_experts_on_several_ranks(
    pool: RankPool, devices: int, module: Any, strategy: dict[str, object]
) -> None:
    """In every step the graphs take guests too; how many, they are told with the sizes of the micro-batch."""
    given = {"compile": True, "num_microbatches": 2, "expert_size": 2, "expert_placement": "replicate", **strategy}
    check_parity(pool, devices, graph_models.Data, module, train=train_interpreted_with_guests, **given)


@pytest.mark.slow
def test_gradients_of_guests_that_are_lost_are_found(pool: RankPool) -> None:
    strategy = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "compile": True, "expert_size": 2}
    train = partial(train_interpreted_with_guests, fault="gradients")
    with pytest.raises(AssertionError, match="gradient of .* in step 0 differs by") as error:
        check_parity(pool, 2, graph_models.Data, experts, train=train, **strategy, expert_placement="replicate")
    assert not isinstance(error.value, RankError)


@pytest.mark.parametrize(
    ("module", "strategy", "trains"),
    [
        (partial(experts, 1, num_layers=1), {"graph_size": 2, "expert_size": 2, "exchange_dtype": "fp16"}, None),
        slow(partial(experts, 1), {"data_size": 2, "expert_size": 2, "exchange_dtype": "bf16"}, None),
        slow(graph_models.attention, {"graph_size": 2, "exchange_dtype": "fp16", "activation": "recompute"}, None),
        slow(
            partial(experts, 2),
            {"data_size": 2, "expert_size": 2, "exchange_dtype": "fp16", "expert_placement": "replicate"},
            (train_with_guests, train_interpreted_with_guests),
        ),
    ],
)
def test_rounded_rows_are_those_of_eager_phases(
    pool: RankPool, module: Any, strategy: dict[str, Any], trains: tuple[Any, Any] | None
) -> None:
    """Compiled phases train as eager ones with the same rounding, and near one process."""
    eager, compiled = trains or (train_in_pipeline, train_interpreted)
    more: dict[str, Any] = {"pipeline_size": 1, "num_microbatches": 2, **strategy}
    of_eager = {name: value for name, value in more.items() if name != "activation"}
    expected = pool.run(eager, module, graph_models.Data, of_eager, 1, {}, world_size=2)
    found = pool.run(compiled, module, graph_models.Data, {**more, "compile": True}, 1, {}, world_size=2)
    compare_records(expected[0], found, 1e-9)
    replicas = strategy.get("data_size", 1)
    plain = {"pipeline_size": 1, "data_size": replicas, "num_microbatches": 2}
    (reference,) = pool.run(train_reference, module, graph_models.Data, plain, 1, {}, replicas, world_size=1)
    compare_records(reference, found, 0.02)
    with pytest.raises(AssertionError, match="differs by|instead of"):  # rows are rounded
        compare_records(reference, found, 1e-7)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_inductor_compiles_exchanges_of_rows_of_experts(pool: RankPool) -> None:
    more = {"compile": True, "pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "expert_size": 2}
    check_parity(pool, 2, module=partial(experts, 1), data=graph_models.Data, train=train_compiled, **more)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_inductor_compiles_stages_with_guests_and_rounded_rows(pool: RankPool) -> None:
    more: dict[str, Any] = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "expert_size": 2}
    module, data = partial(experts, 1, num_layers=1), graph_models.Data
    given = {**more, "compile": True, "expert_placement": "replicate"}
    check_parity(pool, 2, data, module, train=train_compiled_with_guests, limit=1100, **given)
    rounded = {**given, "exchange_dtype": "fp16"}
    eager = {**rounded, "compile": False}
    (expected, *_) = pool.run(train_with_guests, module, data, eager, 1, {}, world_size=2)
    found = pool.run(train_compiled_with_guests, module, data, rounded, 1, {}, world_size=2, timeout=1100)
    compare_records(expected, found, 1e-3)  # a sum whose last digit differs may be rounded to the next number
    (exact, *_) = pool.run(train_in_pipeline, module, data, more, 1, {}, world_size=2)
    with pytest.raises(AssertionError, match="differs by|instead of"):
        compare_records(exact, found, 1e-7)


@pytest.mark.slow
def test_evaluation_with_experts_in_and_after_training(pool: RankPool) -> None:
    """In training experts are spread; the test after it has all of them on each rank, and phases of its own."""
    replicas = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 1}
    expected = pool.run(fit_then_evaluate, replicas, world_size=2)
    found = pool.run(fit_then_evaluate, {**replicas, "compile": True, "expert_size": 2}, world_size=2)
    for ours, others in zip(found, expected, strict=True):
        assert ours["fit"] == pytest.approx(others["fit"], rel=1e-9)
        assert ours["test"][0] == pytest.approx(others["test"][0], rel=1e-9)


@pytest.mark.parametrize("more", [{}, slow({"exchange_dtype": "fp16"})])
def test_an_exchange_that_is_lost_ends_training_before_the_first_optimizer_step(
    pool: RankPool, more: dict[str, str]
) -> None:
    strategy = {"compile": True, "graph_size": 2, "pipeline_size": 1, "num_microbatches": 2, **more}
    with pytest.raises(RankError, match="stage 0, compiled, computes something else"):
        pool.run(train_without_an_exchange, graph_models.states, graph_models.Data, strategy, 1, {}, world_size=2)


@pytest.mark.parametrize(
    ("module", "strategy"),
    [(graph_models.states, {"graph_size": 2}), slow(partial(experts, 1), {"data_size": 2, "expert_size": 2})],
)
def test_a_micro_batch_that_does_not_fit_on_one_rank_is_eager_on_all(
    pool: RankPool, module: Any, strategy: dict[str, int]
) -> None:
    more = {"compile": True, "pipeline_size": 1, "num_microbatches": 2, **strategy}
    given = {"module": module, "data": graph_models.Data, "train": train_with_a_misfit_on_one_rank, **more}
    assert all(rank.num_misfits > 0 and not rank.eager for rank in check_parity(pool, 2, **given))


@pytest.mark.slow
@pytest.mark.parametrize("agrees", [True, False])
def test_ranks_that_share_experts_agree_on_what_is_eager(pool: RankPool, agrees: bool) -> None:
    """Without the sizes of the others' micro-batches the exchanges of one rank would not be those of the other."""
    strategy = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "compile": True, "expert_size": 2}
    more = graph_models.Data, strategy, 3, {}
    with nullcontext() if agrees else pytest.raises(RankError, match="exchange of rows between ranks with experts"):
        found = pool.run(eager_microbatches, agrees, partial(experts, 1), *more, world_size=2)
        assert found[0] == found[1] > 0
