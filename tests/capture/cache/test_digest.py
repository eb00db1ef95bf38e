"""The digest of a module changes with all that a trace depends on, and with nothing else."""

from __future__ import annotations

import functools
import importlib
import logging
import random
import sys
import threading
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import key_models
import pytest
import torch
import torchmetrics
from key_models import Another, Inner, Kind, Net, Scripted, helper, key, scripted, triple
from torch import nn

from lightning_januspipe.capture.cache.digest import Digester


def replace_linear(net: Net) -> None:
    net.inner["a"].linear = nn.Linear(3, 4)


def swap_children(net: Net) -> None:
    net.inner._modules = {k: net.inner._modules[k] for k in ("b", "a")}


def swap_class(net: Net) -> None:
    net.inner["a"].__class__ = Another


def set_lambda(net: Net) -> None:
    net.act = lambda x: x * 3


def set_closure(net: Net, number: float) -> None:
    net.act = lambda x: x * number


CHANGES: dict[str, Callable[[Net], Any]] = {
    "float attribute": lambda net: setattr(net, "cutoff", 5.1),
    "type of a number": lambda net: setattr(net, "cutoff", 5),
    "another attribute": lambda net: setattr(net, "more", None),
    "value of a buffer": lambda net: net.shift.add_(1),
    "dtype of a buffer": lambda net: setattr(net, "shift", net.shift.double()),
    "value of a tensor": lambda net: net.offset.add_(1),
    "value of an array": lambda net: net.table.__setitem__(0, 7.0),
    "member of a set": lambda net: net.species.add("N"),
    "attribute of an object": lambda net: setattr(net.settings, "cutoff", 1.6),
    "deep in containers": lambda net: net.nested[0].update(radii=(0.3, 0.6)),
    "shape of a parameter": replace_linear,
    "dtype of a parameter": lambda net: net.inner["a"].linear.double(),
    "a frozen parameter": lambda net: net.inner["a"].linear.weight.requires_grad_(False),
    "tied parameters": lambda net: setattr(net.inner["a"].tied, "weight", net.inner["a"].linear.weight),
    "a shared module": lambda net: net.inner.update({"b": net.inner["a"]}),
    "class of a module": swap_class,
    "order of modules": swap_children,
    "training": lambda net: net.inner["b"].tied.eval(),
    "body of a lambda": set_lambda,
    "closure": lambda net: set_closure(net, 2.0),
    "argument of a partial": lambda net: setattr(net, "weight", functools.partial(torch.mul, other=1.6)),
    "function of torch": lambda net: setattr(net, "function", torch.sigmoid),
    "function of the user": lambda net: setattr(net, "function", helper),
    "member of an enum": lambda net: setattr(net, "kind", Kind.MEAN),
    "a dtype": lambda net: setattr(net, "dtype", torch.float32),
    "a hook": lambda net: net.inner["a"].register_forward_hook(lambda m, a, out: out * 2),
    "attribute of a scripted module": lambda net: setattr(net, "script", scripted(Scripted(4.1))),
    "a scripted function": lambda net: setattr(net, "compiled", scripted(triple)),
    "a generated module": lambda net: setattr(net, "graph", torch.fx.symbolic_trace(nn.ReLU())),
    "forward of one object": lambda net: setattr(net.inner["a"], "forward", triple),
}


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_has_another_key(change: str) -> None:
    net = Net()
    before = key(net)
    CHANGES[change](net)
    after = key(net)
    assert after != before
    assert key(net) == after


def test_closures_are_told_apart() -> None:
    keys = []
    for number in (2.0, 3.0, 2.0):
        net = Net()
        set_closure(net, number)
        keys.append(key(net))
    assert keys[0] == keys[2] != keys[1]


def train_a_little(net: Net) -> None:
    for parameter in net.parameters():
        parameter.data.normal_()
        parameter.grad = torch.ones_like(parameter)


def add_hook_again(net: Net) -> None:
    for _ in range(3):
        net.inner["a"].register_forward_hook(print).remove()


def refill_set(net: Net) -> None:
    members = sorted(net.species, reverse=True)
    net.species = set()
    net.species.update(members)


def add_objects_of_training(net: Net) -> None:
    """What holds other objects before and after, but the same attributes."""
    net.optimizer = torch.optim.Adam(net.parameters())
    net.log_to, net.generator, net.lock = logging.getLogger("a"), torch.Generator(), threading.Lock()
    net.random = random.Random(1)
    net.metric = torchmetrics.MeanAbsoluteError()


def use_objects_of_training(net: Net) -> None:
    net.optimizer.zero_grad()
    net.optimizer.param_groups[0]["lr"] = 0.5
    net.generator.manual_seed(5)
    net.random.random()
    net.metric(torch.zeros(3), torch.ones(3))


NO_CHANGES: dict[str, Callable[[Net], Any]] = {
    "nothing": lambda net: None,
    "parameters": train_a_little,
    "parameters of a scripted module": lambda net: net.script.linear.weight.data.normal_(),
    "hooks that are gone": add_hook_again,
    "order in which a set was filled": refill_set,
    "hooks of state dicts": lambda net: net.register_state_dict_post_hook(lambda *_: None),
    "training": use_objects_of_training,
}


@pytest.mark.parametrize("change", NO_CHANGES)
def test_the_same_model_has_the_same_key(change: str) -> None:
    net, other = Net(), Net()
    for module in (net, other):
        add_objects_of_training(module)
    before = key(net)
    assert key(other) == before
    NO_CHANGES[change](net)
    assert key(net) == before


def test_code_outside_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Globals and class attributes that the user's code reads, and functions that it calls."""
    keys = [key(Net())]
    changes: list[tuple[Any, str, Any]] = [
        (key_models, "SCALE", 2.5),
        (key_models, "OPTIONS", {"power": 3}),
        (key_models, "helper", triple),
        (Inner, "factor", 1.5),
        (Inner, "forward", lambda self, x: x),
    ]
    for owner, name, value in changes:
        monkeypatch.setattr(owner, name, value)
        keys.append(key(Net()))
    assert len(set(keys)) == len(keys)


def test_globals_that_cannot_be_pickled(monkeypatch: pytest.MonkeyPatch) -> None:
    """They count by type alone; validation has to find that their values differ."""
    values = [2.0, (i for i in range(2)), (i for i in range(3)), *(ContextVar("x", default=v) for v in (2.0, 3.0))]
    keys = []
    for value in values:
        monkeypatch.setattr(key_models, "SCALE", value)
        keys.append(key(Net()))
    assert keys[1] == keys[2] and keys[3] == keys[4]
    assert len(set(keys)) == 3


PACKAGE = """
import torch

CUTOFF, TABLE, NOT_READ = 5.0, [torch.zeros(2)], 1

class Model(torch.nn.Module):
    def forward(self, x):
        return x * CUTOFF + len(TABLE)
"""


def test_plain_globals_of_installed_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Numbers and text that a package's code reads may have been set by the program, as a default dtype is."""
    folder = tmp_path / "site-packages"
    folder.mkdir()
    (folder / "installed_potential.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(folder))
    package = importlib.import_module("installed_potential")
    monkeypatch.setitem(sys.modules, "installed_potential", package)  # forgotten after the test
    before = key(package.Model())
    monkeypatch.setattr(package, "NOT_READ", 2)
    monkeypatch.setattr(package, "TABLE", [1])  # validation has to find this
    assert key(package.Model()) == before
    monkeypatch.setattr(package, "CUTOFF", 5.1)
    assert key(package.Model()) != before


def test_class_attributes_count_in_the_users_own_classes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch counts calls in attributes of its classes, which would be another key at every capture."""

    class Own(nn.Module):
        factor = 1

    def digests() -> list[str]:
        digester = Digester(nn.Linear(1, 1))
        return [digester.digest(cls) for cls in (Own, nn.Linear)]

    before = digests()
    monkeypatch.setattr(nn.Linear, "calls", 3, raising=False)
    assert digests() == before
    monkeypatch.setattr(Own, "factor", 2)
    assert digests()[0] != before[0]
