"""Graphs that were traced for many structures, atoms and edges are right for one of each, or say that they are not."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from capture_models import Potential, Step, Traced, assert_parity, make_batch
from compiled_models import factory, joint_graphs
from torch import Tensor

from lightning_januspipe.compiled import torch_internals as internals
from lightning_januspipe.compiled.compiled_stage import CompiledStage
from lightning_januspipe.compiled.joint import Joint
from lightning_januspipe.compiled.phase_graphs import phase_graphs
from lightning_januspipe.compiled.size_one import guards_of_ones


def traced(function: Callable[[Tensor], list[Tensor]]) -> tuple[torch.fx.GraphModule, internals.FakeTensorMode]:
    """Returns a graph for any number of rows."""
    mode = internals.symbolic_mode()
    rows = internals.new_size(mode, "rows", 5)
    with mode:
        x = torch.empty(rows, 3)
    graph = internals.traced_graph(function, [x])
    assert not internals.size_guards(mode)
    return graph, mode


def test_layouts_do_not_matter() -> None:
    """A transposed tensor of one row is contiguous, and one of several rows is not."""
    graph, mode = traced(lambda x: [x.t().reshape(-1), x.t().contiguous()])
    assert len(internals.asked_for_one(mode)) == 1
    assert guards_of_ones(graph, mode) == []


def test_dimensions_that_are_dropped_matter() -> None:
    graph, mode = traced(lambda x: [x.t().reshape(-1), x.squeeze(0)])
    (rows,) = internals.asked_for_one(mode)
    assert guards_of_ones(graph, mode) == [f"Ne({rows}, 1)"]


def test_operations_that_refuse_one_row_are_not_reported(caplog: pytest.LogCaptureFixture) -> None:
    graph, mode = traced(lambda x: [x.t().reshape(-1), x.new_zeros(1, 3).expand(x.shape[0], 3)])
    (zeros,) = [node for node in graph.graph.nodes if node.args and node.args[0] == [1, 3]]
    zeros.args = ([4, 3], *zeros.args[1:])
    del zeros.meta["val"]
    assert len(guards_of_ones(graph, mode)) == 1
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def asked_in(joints: list[Joint]) -> int:
    return sum(len(internals.asked_for_one(joint.mode)) for joint in joints)


class Wide(Potential):
    """Its stage boundaries are transposed."""

    def features(self, batch: dict[str, Tensor], vectors: Tensor) -> Tensor:
        """Returns features."""
        return super().features(batch, vectors).t().reshape(-1).view(self.readout.in_features, -1).t()


def test_one_structure_runs_compiled() -> None:
    """The question comes up in these stages, and its answer is no condition."""
    traced = Traced(Step(Wide(2)))
    captured = traced.cut(2)
    joints = joint_graphs(traced, captured)
    assert asked_in(joints) and not any(joint.sizes.guards for joint in joints)
    graphs = [phase_graphs(joint) for joint in joints]
    for sizes in ((6,), (1,)):
        made: list[CompiledStage] = []
        assert_parity(captured, traced.module, make_batch(sizes, seed=2), make_stage=factory(graphs, made))
        assert len(made) == 2 and not any(stage.num_misfits for stage in made)
