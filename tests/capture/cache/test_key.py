"""The key of a program: in other processes, versions and settings, for other calls, and where there is none."""

from __future__ import annotations

import functools
import importlib
import os
import shutil
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from key_models import Inner, Net, Settings, call, key
from torch import Tensor, nn

import lightning_januspipe
from lightning_januspipe.capture.adapters import Adapter
from lightning_januspipe.capture.cache import digest
from lightning_januspipe.capture.cache import key as key_module
from lightning_januspipe.capture.cache.key import ProgramKey, program_key
from lightning_januspipe.capture.find.call_format import CallFormat
from lightning_januspipe.capture.find.grad_call import PotentialCall
from lightning_januspipe.capture.find.in_step import StepPotential

ENVIRONMENTS: dict[str, Callable[[pytest.MonkeyPatch], Any]] = {
    "version of torch": lambda patch: patch.setattr(torch, "__version__", "9.9"),
    "version of the package": lambda patch: patch.setattr(lightning_januspipe, "__version__", "9.9"),
    "version of Python": lambda patch: patch.setattr(sys, "version_info", (9, 9, 0)),
    "default dtype": lambda patch: torch.set_default_dtype(torch.bfloat16),
    "a framework's version": lambda patch: patch.setattr(np, "__version__", "9.9"),
}


@pytest.mark.parametrize("change", ENVIRONMENTS)
def test_another_environment_has_another_key(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    net = Net()
    before = key(net)
    ENVIRONMENTS[change](monkeypatch)
    assert key(net) != before


def test_another_trace_has_another_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The files of this package count, those of capture among them."""
    net, copied = Net(), tmp_path / "lightning_januspipe"
    before = key(net)
    shutil.copytree(key_module._OWN, copied, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(key_module, "_OWN", copied)
    assert key(net) == before
    for edited in ("capture/trace/trace.py", "engine/specs.py"):
        (copied / edited).write_text((copied / edited).read_text() + "\n# edited\n")
        after = key(net)
        assert after != before
        before = after


def test_autocast_has_another_key() -> None:
    net = Net()
    before = key(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert key(net) != before
    assert key(net) == before


def test_calls() -> None:
    net = Net()
    keys = [key(net)]
    assert key(net, call(positions=torch.ones(7, 3), species=torch.ones(7, dtype=torch.long))) == keys[0]
    reordered = OrderedDict(reversed(call().args[0].items()))
    assert key(net, PotentialCall("elsewhere", (dict(reordered),), {}, (1, 2))) == keys[0]
    others = [
        call(positions=torch.zeros(4, 3, dtype=torch.float64)),
        call(positions=torch.zeros(4)),
        call(positions=torch.zeros(1, 3)),
        call(periodic=False),
        call(more=torch.zeros(2)),
        PotentialCall("potential", (reordered,), {}),
        PotentialCall("potential", (), {"batch": call().args[0]}),
    ]
    keys += [key(net, other) for other in others]
    keys.append(key(net, call(), extra=["compiled"]))
    keys.append(key(net, call(), adapters=[Adapter()]))
    assert len(set(keys)) == len(keys)


def test_sizes_and_varying_arguments_do_not_count() -> None:
    first, second = call(num_graphs=3, file="a.xyz"), call(num_graphs=5, file="b.xyz")
    form = CallFormat.of(first.args, first.kwargs, (second.args, second.kwargs))
    assert form.sizes and key(Net(), first, form) == key(Net(), second, form)
    assert key(Net(), first) != key(Net(), second)


class VersionedAdapter(Adapter):
    version = "2"


def test_adapters_count(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(Net(), call(), adapters=[VersionedAdapter()])
    for_graph_ranks = VersionedAdapter()
    for_graph_ranks.graph_size = 2
    assert key(Net(), call(), adapters=[for_graph_ranks]) != before
    monkeypatch.setattr(VersionedAdapter, "version", "3")
    assert key(Net(), call(), adapters=[VersionedAdapter()]) != before


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda: (i for i in range(3)), "inner.a.settings: TypeError: cannot pickle 'generator' object"),
        (lambda: sys.__stdout__, "inner.a.settings: TypeError: cannot pickle '_io.TextIOWrapper'"),
        (lambda: torch.zeros(2).to_sparse(), "inner.a.settings: ValueError: it is a tensor of layout torch.sparse_coo"),
        (lambda: threading.local(), "inner.a.settings: TypeError: cannot pickle '_thread._local'"),
        (lambda: functools.reduce(lambda a, _: [a], range(5000), []), ": RecursionError"),
        (lambda: {Inner}, "it is a set of objects (builtins.type)"),
        (lambda: [[] for _ in range(3000)], "more than 2000 values"),
    ],
)
def test_no_key_but_a_reason(monkeypatch: pytest.MonkeyPatch, value: Callable[[], Any], reason: str) -> None:
    if "2000" in reason:
        monkeypatch.setattr(digest, "_MOST_VALUES", 2000)
    net = nn.Module()
    net.inner = nn.ModuleDict({"a": Inner()})
    net.inner["a"].settings = Settings(1.0)
    net.inner["a"].settings.stream = value()
    found = program_key(net, call())
    assert found == ProgramKey(None, found.reason)
    assert reason in found.reason


def test_a_whole_lightning_module() -> None:
    """Attached to a Trainer, with hyperparameters, metrics and a step that stands for the potential."""
    from lightning.pytorch import LightningModule, Trainer

    class Module(LightningModule):
        def __init__(self, cutoff: float = 5.0) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.model = Inner()
            self.metrics = nn.ModuleDict({"mae": torchmetrics.MeanAbsoluteError()})

        def training_step(self, batch: Any) -> Tensor:
            return self.model(batch["positions"]).sum()

    def keys(module: Module) -> list[str]:
        step = StepPotential(module, lambda batch: module.training_step(batch), ["model"])
        return [key(module), key(step)]

    module = Module()
    before = keys(module)
    assert keys(Module()) == before
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1)
    module.trainer = trainer
    trainer.strategy.connect(module)
    module.metrics["mae"](torch.zeros(2), torch.ones(2))
    module._metric_attributes = {id(module.metrics["mae"]): "mae"}
    assert keys(module) == before
    assert all(a != b for a, b in zip(keys(Module(5.5)), before, strict=True))


MODEL = """
import torch
from project.parts import Part

class Model(torch.nn.Module):
    def __init__(self, cutoff=5.0):
        super().__init__()
        self.part = Part({"H", "C", "N", "O", "S", "P"})
        self.cutoff = cutoff
        self.names = {name: frozenset([name, "x", "y"]) for name in sorted(self.part.species)}

    def forward(self, x):
        return self.part(x) if "H" in {"H", "C", "N"} else x
"""
PARTS = """
import torch

class Part(torch.nn.Module):
    def __init__(self, species):
        super().__init__()
        self.species = species
        self.linear = torch.nn.Linear(2, 2)
        self.act = lambda x: 2 * x

    def forward(self, x):
        return self.act(self.linear(x))
"""
SCRIPT = """
import sys
import torch
from project.model import Model
from lightning_januspipe.capture.find.find_potential import PotentialCall
from lightning_januspipe.capture.cache.key import program_key

class Wrapper(Model):
    pass

assert len(sys.argv) == 2 and torch.initial_seed()
keys = [program_key(Wrapper(c), PotentialCall("", (torch.zeros(2, 2),), {})) for c in (5.0, 5.1)]
print(*(k.digest for k in keys))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's package of two files, and a script that uses it."""
    (tmp_path / "project").mkdir()
    for name, text in {"project/__init__": "", "project/model": MODEL, "project/parts": PARTS, "run": SCRIPT}.items():
        (tmp_path / f"{name}.py").write_text(text)
    return tmp_path


def test_another_process_finds_the_same_key(project: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "run.py", seed],
            cwd=project,
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in ("1", "2")
    ]
    results = [process.communicate(timeout=250) for process in processes]
    assert all(process.returncode == 0 for process in processes), results
    first, second = (out.split() for out, _ in results)
    assert first == second and first[0] != first[1] and len(first[0]) == 64


@pytest.fixture
def imported(project: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(project))
    for name in ("project", "project.model", "project.parts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("project.model")
    for name in ("project", "project.model", "project.parts"):
        monkeypatch.setitem(sys.modules, name, sys.modules[name])  # forgotten after the test
    return module


def test_edited_files_give_another_key(imported: ModuleType, project: Path) -> None:
    keys = [key(imported.Model())]
    for name in ("project/model.py", "project/parts.py"):
        path = project / name
        path.write_text(path.read_text() + "\n# edited\n")
        keys.append(key(imported.Model()))
    assert len(set(keys)) == 3
    (project / "project" / "unused.py").write_text("# not loaded\n")
    assert key(imported.Model()) == keys[-1]


def test_what_was_loaded_counts_and_not_only_the_file(imported: ModuleType, project: Path) -> None:
    """A file that was edited after it was loaded says nothing about what is traced."""
    before = key(imported.Model())
    path = project / "project" / "parts.py"
    path.write_text(PARTS.replace("2 * x", "3 * x"))
    stale = key(imported.Model())
    for name in ("project.parts", "project.model"):
        importlib.reload(sys.modules[name])
    assert len({before, stale, key(imported.Model())}) == 3
