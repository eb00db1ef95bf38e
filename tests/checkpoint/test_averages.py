"""Averages of weights, wherever they are kept, are whole in checkpoints of a pipeline."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import average_workers as workers
import pytest
import torch
from nested import close
from pools import slow
from torch import nn

from lightning_januspipe.checkpoint.averages import Place, followers
from lightning_januspipe.testing import RankPool


@pytest.mark.parametrize("how", ["in the module and by name", slow("lists"), "lightning"])
def test_checkpoints_are_those_of_one_process(pool: RankPool, how: str, tmp_path: Path) -> None:
    (expected,) = pool.run(workers.checkpoint, None, how, str(tmp_path / "one"), world_size=1)
    assert {"val_loss", "train_loss"} <= set(expected["metrics"])
    for found in pool.run(workers.checkpoint, {"num_microbatches": 1}, how, str(tmp_path / "two"), world_size=2):
        close(how, expected, found)


def test_what_only_some_ranks_hold_is_left(pool: RankPool) -> None:
    """Averages of one rank, and gradients that each rank has of its own stage."""
    (first, told), (second, also_told) = pool.run(workers.other_holders, world_size=2)
    for words in (told, also_told):
        assert "OnFirstRank.average" in words and "rank_zero_only" in words and "Gradients" not in words
    assert first.keys() | second.keys() > first.keys() != second.keys(), "the gradients of other stages"


class Model(nn.Module):
    """Two layers alike, in a module beside other parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.weight = nn.Parameter(torch.zeros(1))
        self.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)


def names_of(module: Model, found: dict[Place, tuple[nn.Parameter, torch.Tensor]]) -> list[str]:
    names = {p: n for n, p in module.named_parameters()}
    assert all(name == names[p] for (_, name), (p, _) in found.items())
    return sorted(names[p] for p, _ in found.values())


TRAINED = ["potential.0.bias", "potential.0.weight", "potential.1.bias", "potential.1.weight"]


@pytest.mark.parametrize("which", ["everything", "trainable", "potential"])
@pytest.mark.parametrize("how", ["list", "object", "dict", "nested", "buffers", "copy", "held copy"])
def test_followers(which: str, how: str) -> None:
    module, holder = Model(), SimpleNamespace(step=3, name="holder")
    whole: nn.Module = module.potential if which == "potential" else module
    named = {n: p for n, p in whole.named_parameters() if which != "trainable" or p.requires_grad}
    copies = {n: p.detach().clone() for n, p in named.items()}
    if how == "list":
        holder.values = [*copies.values()]
    elif how == "object":
        holder.average = SimpleNamespace(shadow=tuple(copies.values()), other=[1, 2])
    elif how == "dict":
        holder.values = copies
    elif how == "nested":
        holder.state = {"decay": 0.9, "shadow": copies}
    elif how == "buffers":
        average = nn.Module()
        for i, value in enumerate(copies.values()):
            average.register_buffer(f"b{i}", value)
        module.average = average
    elif which == "trainable":
        pytest.skip("a copy has all parameters")
    else:
        model = copy.deepcopy(whole)
        vars(holder).update({"model": model} if how == "copy" else {"average": SimpleNamespace(model=model)})
        copies = dict(model.named_parameters())
    trained = list(module.potential.parameters())
    found = followers(module, [holder], trained)
    assert names_of(module, found) == TRAINED
    prefix = "potential." if which == "potential" else ""
    by_name = {f"{prefix}{n}": value for n, value in copies.items()}
    names = {p: n for n, p in module.named_parameters()}
    assert all(tensor is by_name[names[p]] for p, tensor in found.values())


def test_layers_alike_do_not_follow_one_another() -> None:
    module = Model()
    assert followers(module, [], list(module.potential.parameters())) == {}


@pytest.mark.parametrize("values", [[torch.zeros(2, 2)] * 6, [torch.zeros(1)], {"weight": torch.zeros(2)}])
def test_other_tensors_do_not_follow(values: Any) -> None:
    module = Model()
    assert followers(module, [SimpleNamespace(values=values)], list(module.potential.parameters())) == {}


def test_nothing_follows_where_every_rank_trains_everything() -> None:
    module = Model()
    assert followers(module, [SimpleNamespace(values=[*module.parameters()])], []) == {}
