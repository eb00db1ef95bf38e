"""Pools of ranks, and the tests that authors of models inherit."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import faulty_clients
import plain_modules
import pytest
import torch
from pools import InSessionPool, init_twice, pool_of, state

from lightning_januspipe.testing import (
    PotentialConformance,
    RankError,
    RankPool,
    RunRecord,
    compare_records,
    quiet_trainer,
)


def test_several_process_groups_in_one_job(pool: RankPool) -> None:
    """What the first has left behind does not disturb the second."""
    assert pool.run(init_twice, world_size=2) == [2.0, 2.0]


def test_forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They have the environment and the start method of this process, and random numbers of their own."""
    monkeypatch.setenv("POOLS_TEST", "first")
    with pool_of(2) as ranks:
        before = ranks.run(os.getpid)
        assert ranks.run(os.getpid) == before
        found = ranks.run(state, "POOLS_TEST")
        assert [rank[:2] for rank in found] == [("first", multiprocessing.get_start_method())] * 2
        assert found[0][2] != found[1][2]

        with pytest.raises(RankError, match=r"(?s)rank 0: .*FileNotFoundError.*rank 1: "):
            ranks.run(os.stat, "/absent")
        monkeypatch.setenv("POOLS_TEST", "second")
        assert [value for value, *_ in ranks.run(state, "POOLS_TEST")] == ["second"] * 2
        assert not set(ranks.run(os.getpid)) & set(before)


def test_functions_that_ranks_cannot_import(pool: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="cannot be sent.*at the top level of a file"):
        pool.run(lambda: 0, world_size=1)
    (tmp_path / "only_here.py").write_text("def function(): ...")
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        function = importlib.import_module("only_here").function
    try:
        with pytest.raises(RankError, match="(?s)No module named 'only_here'.*folder on sys.path"):
            pool.run(function, world_size=1)
    finally:
        del sys.modules["only_here"]


@pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
def test_quiet_trainer(namespace: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip(namespace)
    trainer = quiet_trainer(namespace=namespace, max_epochs=3, default_root_dir=tmp_path)
    assert type(trainer).__module__.startswith(namespace)
    assert (trainer.max_epochs, trainer.num_devices, trainer.logger, trainer.checkpoint_callbacks) == (3, 1, None, [])
    assert not trainer.progress_bar_callback and not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="namespace='lightening'; expected one of lightning, pytorch_lightning"):
        quiet_trainer(namespace="lightening")


class TestConformance(InSessionPool, PotentialConformance):
    """A LightningModule as users write it passes."""

    make_module = plain_modules.InStep
    datamodules = {"molecules": plain_modules.Data}


class Faulty(PotentialConformance):
    """Not collected: has its tests called by the test below."""

    make_module = plain_modules.InStep
    datamodules = {"molecules": plain_modules.Data, "equal": faulty_clients.EquallyLarge}
    strategies = {
        "two-stages": {"pipeline_size": 2, "num_microbatches": 3},
        "two-replicas": {"data_size": 2, "num_microbatches": 2},
        "compiled": {"num_microbatches": 1, "compile": True, "stages": "explicit"},
    }
    steps = 1


@pytest.mark.parametrize(
    ("factory", "strategy", "message"),
    [
        (
            faulty_clients.wrong_message,
            "two-stages",
            r"Faulty on molecules: JanusPipeStrategy\(pipeline_size=2, data_size=1, graph_size=1, num_microbatches=3\) "
            r"on 2 rank\(s\) does not train as a plain Trainer does: rank \d: the gradient of .* in step 0 differs by",
        ),
        (
            faulty_clients.ScaledGradient,
            "two-replicas",
            r"rank \d: the gradient of model.embedding.weight in step 0 differs by \d",
        ),
        (
            faulty_clients.Unseeded,
            "two-replicas",
            "shift was another before training than in the process of the reference.*seed its random numbers",
        ),
        (
            faulty_clients.Branching,
            "two-stages",
            r"on molecules: .*: rank 0: CaptureError: .*\(.*faulty_clients.py",
        ),
        (
            plain_modules.Explicit,  # its first part cannot be traced
            "compiled",
            "not all stages could be compiled: stage 0 runs eagerly: CaptureError: the forward reads a list of values",
        ),
    ],
)
def test_faulty_models_are_told(
    pool: RankPool, monkeypatch: pytest.MonkeyPatch, factory: Any, strategy: str, message: str
) -> None:
    monkeypatch.setattr(Faulty, "make_module", factory)
    monkeypatch.setattr(Faulty, "pool", pool)
    Faulty.setup_class()
    with pytest.raises(AssertionError, match=message):
        Faulty().test_trains_as_plain_lightning("molecules", strategy)


def test_stages_that_run_eagerly_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """With compile=True, unless the class says why none of its stages can be compiled."""
    reason = "stage 0 runs eagerly: CaptureError: an operation writes to a tensor"
    Faulty()._require_compiled([])
    with pytest.raises(AssertionError, match=f"Faulty: not all stages could be compiled: {reason}. If nothing"):
        Faulty()._require_compiled([reason])
    monkeypatch.setattr(Faulty, "eager_reason", "writes to a tensor")
    Faulty()._require_compiled([reason, reason])
    with pytest.raises(AssertionError, match="all stages could be compiled, though eager_reason = 'writes to a tens"):
        Faulty()._require_compiled([])
    with pytest.raises(AssertionError, match="expected that stages run eagerly for 'writes to a tensor': another"):
        Faulty()._require_compiled([reason, "another"])


def test_single_precision_is_told() -> None:
    def record(dtype: torch.dtype, change: float) -> RunRecord:
        weight = torch.ones(3, dtype=dtype)
        return RunRecord({"weight": weight}, [1.0], [{"weight": weight * (1 + change)}], {"weight": weight})

    for dtype, change in ((torch.float32, 1e-6), (torch.float64, 1e-8)):
        with pytest.raises(AssertionError, match="gradient of weight in step 0 differs by") as error:
            compare_records(record(dtype, 0.0), [record(dtype, change)], 1e-9)
        hint = "weight is torch.float32, which cannot agree to rtol=1e-09: build the module and its data in float64"
        assert (hint in str(error.value)) == (dtype == torch.float32)
        compare_records(record(dtype, 0.0), [record(dtype, change)], 1e-5)


def test_equally_large_structures_are_refused(pool: RankPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faulty, "pool", pool)
    Faulty().test_structures_differ_in_size("molecules")
    with pytest.raises(AssertionError, match=r"all 8 structures of Faulty.datamodules\['equal'\] are equally large"):
        Faulty().test_structures_differ_in_size("equal")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({}, "TestMine has no make_module"),
        ({"make_module": plain_modules.InStep}, "TestMine has no datamodules"),
        (
            {
                "make_module": plain_modules.InStep,
                "datamodules": Faulty.datamodules,
                "strategies": {"mine": {"pipeline_size": 2}},
            },
            r"TestMine.strategies\['mine'\] = {'pipeline_size': 2} has no num_microbatches",
        ),
    ],
)
def test_incomplete_classes_are_told(attributes: dict[str, Any], message: str) -> None:
    mine = type("TestMine", (PotentialConformance,), attributes)
    with pytest.raises(ValueError, match=message):
        mine().pytest_generate_tests(None)
