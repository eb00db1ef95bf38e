"""Which ranks train a parameter, from the stages that read it and the ranks of the stages."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from lightning_januspipe.mesh import Mesh, MeshShape
from lightning_januspipe.runtime.parameters import PlacedParameters
from lightning_januspipe.runtime.runner import Runner
from lightning_januspipe.runtime.single_stage import SingleStage


def on_rank(rank: int, num_ranks: int) -> Any:
    """Returns what a mesh tells of a rank of one pipeline, without process groups."""
    return SimpleNamespace(shape=MeshShape(num_ranks, 1), pipeline_rank=rank)


@pytest.fixture
def module() -> nn.Module:
    """A module with four parameters: ``0``, ``1`` and ``2`` are read by stages, ``3`` is not."""
    return nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(4)])


def test_ranks_follow_stages_and_placement(module: nn.Module) -> None:
    a, b, shared, outside = module.parameters()
    stages = {a: {0}, b: {3}, shared: {1, 2}, outside: set()}
    found = PlacedParameters(module, on_rank(1, 2), stages, ((0, 1, 0, 1), (0, 1, 0, 1)))
    assert [found.ranks_of[p] for p in (a, b, shared, outside)] == [{0}, {1}, {0, 1}, {0, 1}]
    assert [found.stages_of[p] for p in (a, b, shared, outside)] == [{0}, {3}, {1, 2}, {0, 1, 2, 3}]
    assert [found.holds(p) for p in (a, b, shared, outside)] == [False, True, True, True]
    assert [found.owner(p) for p in (a, b, shared, outside)] == [0, 1, 0, 0]
    assert [found.owns(p) for p in (a, b, shared, outside)] == [False, True, False, False]
    assert found.partly_held() == [a, b]


def test_both_ranks_of_a_split_stage_train_its_parameters(module: nn.Module) -> None:
    a, b, *_ = module.parameters()
    found = PlacedParameters(module, on_rank(0, 3), {a: {0}, b: {1}}, ((0, 1), (2, 1)))
    assert found.ranks_of[a] == {0, 2}
    assert found.ranks_of[b] == {1}


def test_every_parameter_is_owned_once(module: nn.Module) -> None:
    stages = {p: {i % 3} for i, p in enumerate(module.parameters())}
    of_ranks = [PlacedParameters(module, on_rank(rank, 3), stages, ((0, 1, 2), (2, 1, 0))) for rank in range(3)]
    assert [sum(found.owns(p) for found in of_ranks) for p in module.parameters()] == [1, 1, 1, 1]


def test_one_rank_trains_everything_also_what_comes_later(module: nn.Module) -> None:
    mesh = Mesh(MeshShape(1, 1), 0, torch.device("cpu"))
    runner: Runner = SingleStage(module, mesh)
    later = nn.Parameter(torch.zeros(1))
    assert all(runner.parameters.holds(p) and runner.parameters.owns(p) for p in (*module.parameters(), later))
    assert runner.parameters.partly_held() == runner.parameters.averages() == []
    runner.parameters.synchronize()  # sends nothing
    runner.parameters.reduce_gradients()
    assert (runner.num_stages, runner.placement, runner.bytes_sent, runner.recorded_step()) == (1, (0,), 0, None)
