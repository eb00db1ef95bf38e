"""Exchanges between graph ranks in phase graphs: single nodes that run once, in one order, on all ranks or on none."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise, product
from typing import Any

import graph_models as models
import pytest
from capture_models import OTHER, TRACED, Potential, Step, Traced, make_batch
from compiled_models import graphs_of, kept_values_of
from compiled_mutants import zeros_that_are_not_found
from pools import slow

from lightning_januspipe.compiled import compiler as compiler_module
from lightning_januspipe.compiled import levels, minimum_cut
from lightning_januspipe.compiled import phase_graphs as phases
from lightning_januspipe.compiled.compiled_stage import CompiledStage
from lightning_januspipe.compiled.compiler import StageCompiler
from lightning_januspipe.compiled.exchanges import exchange_order, exchanges_of, first_difference
from lightning_januspipe.compiled.graphs import placeholders
from lightning_januspipe.compiled.joint import Joint
from lightning_januspipe.compiled.kinds_of_work import KindOfWork, work_of
from lightning_januspipe.compiled.minimum_cut import Activation
from lightning_januspipe.compiled.phase_graphs import PhaseGraphs, phase_graphs
from lightning_januspipe.compiled.ports import Kind
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.graph.insert_exchanges import ShardedProgram, shard_captured
from lightning_januspipe.schedule import Phase
from lightning_januspipe.testing import RankPool

SIZES = tuple(models.angles_of(make_batch(sizes)) for sizes in (TRACED, OTHER))


@cache
def sharded(kind: type[Potential]) -> tuple[Traced, ShardedProgram, list[Joint]]:
    """A potential in two stages with exchanges, and their joint graphs."""
    traced = Traced(Step(kind(num_layers=2)), SIZES[0])
    captured = traced.cut(2)
    found = shard_captured(captured)
    return traced, found, graphs_of(traced, captured, found.potential, SIZES)


@pytest.mark.parametrize("kind", [Potential, models.States, slow(models.Angles), slow(models.Attention)])
def test_every_exchange_runs_once_whatever_is_kept(kind: type[Potential]) -> None:
    """In the order of the joint graph, each after the one before it."""
    for joint in sharded(kind)[2]:
        plain = levels.split_sums(levels.drop_repetitions(levels.without_mutations(joint)))
        expected = Counter(n.target.__name__ for n in exchanges_of(plain.graph))
        assert sum(expected.values()) > 4
        for activation, defer in product(("keep", "pointwise", "recompute"), (False, True)):
            graphs = phase_graphs(joint, activation, defer)
            found = [exchanges_of(module.graph) for module in graphs.modules.values()]
            assert Counter(n.target.__name__ for of_phase in found for n in of_phase) == expected
            assert sum(map(bool, found)) >= 3, "exchanges are in one or two phases only"
            for of_phase in found:
                assert all(b.kwargs["after"] is a for a, b in pairwise(of_phase))


def test_rows_of_others_that_are_read_from_inputs_alone() -> None:
    """The first stage exchanges nothing, and its inputs have halo rows."""
    traced = Traced(Step(models.Pairs()), SIZES[0])
    captured = traced.cut(2)
    first, second = graphs_of(traced, captured, shard_captured(captured).potential, SIZES)
    assert not exchanges_of(first.graph) and exchanges_of(second.graph)
    assert any("halo_" in symbol for symbols in first.sizes.groups.values() for symbol in symbols)


def test_what_is_kept_of_exchanges() -> None:
    """With "recompute" phases keep results of exchanges, and less than they would keep otherwise."""
    for joint in sharded(models.States)[2]:
        graphs = phase_graphs(joint, "recompute")
        names = {n.name for module in graphs.modules.values() for n in exchanges_of(module.graph)}
        assert names.intersection(n for s in graphs.phases.signatures.values() for n in s.kept)
        whole = phase_graphs(joint, "keep").phases
        for phase in (Phase.FE, Phase.FF, Phase.BF):
            assert graphs.phases.held_bytes(phase) < whole.held_bytes(phase)


def test_no_tensor_is_kept_for_its_size() -> None:
    """The number itself is kept, of rows that an exchange brought as of any other."""
    for joint, activation in product(sharded(Potential)[2], ("keep", "pointwise", "recompute")):
        graphs = phase_graphs(joint, activation)
        given = [n for module in graphs.modules.values() for n in placeholders(module.graph)]
        read = {n.name for n in given if any(work_of(user) is not KindOfWork.SIZE for user in n.users)}
        kept = kept_values_of([graphs])
        assert kept and not {name for *_, name in kept} - read


@pytest.mark.parametrize(
    ("kind", "num_stages", "activation", "defer", "least"),
    [
        slow(Potential, 1, "recompute", False, 2),
        slow(Potential, 1, "recompute", True, 4),  # BE and WF keep different values for WE
        slow(Potential, 1, "keep", False, 20),
        (models.Degrees, 1, "pointwise", True, 9),
        slow(Potential, 2, "keep", True, 60),
        slow(Potential, 2, "pointwise", False, 20),
        slow(models.States, 2, "recompute", True, 15),
    ],
)
def test_every_value_that_graph_ranks_keep_matters(
    pool: RankPool, kind: type[Potential], num_stages: int, activation: Activation, defer: bool, least: int
) -> None:
    """Zeros in the place of any of them change parameter gradients; without them, these are those of one process."""
    for num_kept, missed in pool.run(zeros_that_are_not_found, kind, num_stages, activation, defer, world_size=2):
        assert num_kept >= least and not missed


def test_an_exchange_that_is_computed_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(minimum_cut.RECOMPUTED, "recompute", set(KindOfWork))
    with pytest.raises(AssertionError, match="an exchange between graph ranks runs in two phases"):
        for joint in sharded(models.States)[2]:
            phase_graphs(joint, "recompute")


def test_an_exchange_that_is_left_out_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_last(joint: Joint, found: PhaseGraphs) -> None:
        last = exchanges_of(found.modules[Phase.FF].graph)[-1]
        last.replace_all_uses_with(last.args[0])  # type: ignore[arg-type]
        last.graph.erase_node(last)
        verify(joint, found)

    verify = phases.verify_phases
    monkeypatch.setattr(phases, "verify_phases", without_last)
    with pytest.raises(AssertionError, match="no phase runs the exchanges .* between graph ranks"):
        phase_graphs(sharded(Potential)[2][0])


def test_an_exchange_at_a_wrong_level_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "GIVEN", {**levels.GIVEN, Kind.FORCE_COTANGENT: Phase.FF})
    with pytest.raises(AssertionError, match="reads .* which no earlier phase keeps"):
        for joint in sharded(Potential)[2]:
            phase_graphs(joint, "keep")


def test_ranks_with_other_exchanges_are_told_apart() -> None:
    graphs = phase_graphs(sharded(models.States)[2][0])
    order = exchange_order(graphs.modules)
    assert first_difference([order, order, order]) is None
    swapped = {**order, "FF": [order["FF"][1], order["FF"][0], *order["FF"][2:]]}
    assert f"exchange 0 of FF is {order['FF'][0]!r}" in str(first_difference([order, order, swapped]))
    assert "'none' on rank 1" in str(first_difference([order, {**order, "BE": order["BE"][:-1]}]))


def _compiler(monkeypatch: pytest.MonkeyPatch, other_rank: Callable[[Any], Any]) -> tuple[StageCompiler, Any]:
    """Returns a compiler that interprets, of a rank beside another one, and what makes its first stage."""
    monkeypatch.setattr(compiler_module, "compile_graph", lambda graph, mode: graph)
    traced, found, _ = sharded(Potential)
    captured = found.captured
    inputs = captured.inputs(traced.potential)
    calls = [traced.call_on(b) for b in SIZES]
    first, second = (captured.bind_sizes(inputs(c.args, c.kwargs)) for c in calls)
    compiler = StageCompiler((first, second), "cpu", over_ranks=lambda mine: [mine, other_rank(mine)])
    stage = found.potential.stage(0, traced.potential)
    return compiler, lambda: compiler(stage, GradientBuffers(), found.potential.chain)


def test_a_stage_is_compiled_on_all_graph_ranks_or_on_none(monkeypatch: pytest.MonkeyPatch) -> None:
    compiler, make = _compiler(monkeypatch, lambda mine: mine)
    assert isinstance(make(), CompiledStage)
    compiler, make = _compiler(monkeypatch, lambda mine: replace(mine, refused="RuntimeError: no memory"))
    assert not isinstance(make(), CompiledStage)
    assert compiler.report().eager == ("stage 0 runs eagerly: on graph rank 1, RuntimeError: no memory",)


def test_ranks_with_another_order_do_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    _, make = _compiler(monkeypatch, lambda mine: replace(mine, order={**mine.order, "FE": mine.order["FE"][::-1]}))
    with pytest.raises(CaptureError, match="stage 0, compiled, exchanges rows .* in another order .* exchange 0 of FE"):
        make()
