"""What a Trainer does with compile=True beside plain training steps, in one process, with uncompiled phase graphs."""

from __future__ import annotations

import logging
import os
import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import strategy_workers
import tiny
import torch
from compiled_workers import interpreted
from pools import slow
from torch import fx

from lightning_januspipe.compiled import compiler
from lightning_januspipe.compiled.background import BackgroundCompile
from lightning_januspipe.compiled.compile_process import CompileResult
from lightning_januspipe.data import EMTDataModule
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.runtime import build_pipeline, change_over, training_length
from lightning_januspipe.testing import quiet_trainer

COMPILED = {"compile": True, "num_microbatches": 2}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny, "module", partial(tiny.module, num_layers=1))


def close(found: Any, expected: Any) -> None:
    """Compares nested results to 1e-9."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            close(found[key], value)
    elif isinstance(expected, list):
        for a, b in zip(found, expected, strict=True):
            close(a, b)
    elif expected is not None:
        torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), rtol=1e-9, atol=1e-11)


def test_evaluation_without_training() -> None:
    """FE and FF are all that is traced."""
    with interpreted() as graphs:
        found = strategy_workers.evaluate(COMPILED, {})
    assert len(graphs) == 2
    close(found, strategy_workers.evaluate(None, {}))


def test_training_with_validation_and_a_test_after_it() -> None:
    """The phases that training has compiled serve evaluation."""
    with interpreted() as graphs:
        found = strategy_workers.fit_then_evaluate({**COMPILED, "num_microbatches": 1}, {"max_epochs": 1})
    assert len(graphs) == 4
    close(found, strategy_workers.fit_then_evaluate(None, {"max_epochs": 1}))


def test_checkpoints_are_those_of_eager_training(tmp_path: Path) -> None:
    """Saved compiled and resumed by plain Lightning, and the other way round, with clipped gradients."""
    compiled = {**COMPILED, "num_microbatches": 1}

    def arguments(steps: int) -> dict[str, Any]:
        return {"max_steps": steps, "gradient_clip_val": 0.5}

    whole = strategy_workers.fit(None, arguments(4))
    for first, second in ((compiled, None), (None, compiled)):
        with interpreted():
            strategy_workers.fit(first, arguments(3), save=str(tmp_path / "epoch.ckpt"))
            found = strategy_workers.fit(second, arguments(4), resume=str(tmp_path / "epoch.ckpt"))
        close(found["state"], whole["state"])


@pytest.mark.parametrize(
    ("precision", "tolerance"),
    [slow("32-true", 1e-5), ("bf16-mixed", 0.05), slow("bf16-true", 0.05), slow("16-true", 0.05)],
)
def test_precisions(precision: str, tolerance: float) -> None:
    """The first step's gradients are those of plain Lightning, to a few units of rounding."""

    def gradients(strategy: Any) -> dict[str, torch.Tensor]:
        module = tiny.module().float()
        torch.set_default_dtype(torch.float32)
        found: dict[str, torch.Tensor] = {}

        class Keep(lightning.Callback):
            def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
                found.update({n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None})

        data = EMTDataModule(num_train=8, num_val=4, sizes=(4, 8, 16), dtype="float32", batch_size=8, shuffle=False)
        arguments = {"max_steps": 1, "limit_val_batches": 0, "callbacks": [Keep()], "precision": precision}
        quiet_trainer(strategy, **arguments).fit(module, data)
        return found

    expected = gradients(None)
    with interpreted():
        found = gradients({"compile": True})
    scale = max(float(g.abs().max()) for g in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize(("place", "factor"), [(0, 2.0), (-1, 0.0)])
def test_a_wrong_phase_ends_training_before_the_first_optimizer_step(place: int, factor: float) -> None:
    """The first value that a phase returns is twice what it should be, or the last that it keeps is zero."""

    def change(graph: fx.GraphModule) -> Any:
        def run(*inputs: Any) -> Any:
            out = list(graph(*inputs))
            out[place] = factor * out[place]
            return out

        return run

    module = tiny.module()
    before = [p.detach().clone() for p in module.parameters()]
    with interpreted(change), pytest.raises(CaptureError, match="stage 0, compiled, computes something else"):
        quiet_trainer(COMPILED, max_steps=1, limit_val_batches=0).fit(module, tiny.data())
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_a_stage_that_cannot_be_compiled_runs_eagerly(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(graph: fx.GraphModule, mode: Any) -> Any:
        raise RuntimeError("the compiler has an error\nof several lines")

    monkeypatch.setattr(compiler, "compile_graph", fail)
    monkeypatch.setattr(change_over, "BackgroundCompile", Ended)  # it could not either
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        found = strategy_workers.fit({**COMPILED, "num_microbatches": 1}, {"max_steps": 2})
    assert "stage 0 runs eagerly: RuntimeError: the compiler has an error" in caplog.text
    close(found["state"], strategy_workers.fit(None, {"max_steps": 2})["state"])


def test_a_memory_limit_chooses_what_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    """What one stage keeps is then its cotangents of forces and stresses only."""
    strategy = {**COMPILED, "num_microbatches": 1, "memory_limit": 3.6e5}
    with interpreted(), caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        found = strategy_workers.fit(strategy, {"max_steps": 2})
    (line,) = re.findall(
        r"kept of a micro-batch, within 360 kB on a rank: stage 0 recompute .*\(pointwise .*", caplog.text
    )
    assert "phases of 1 stage compiled" in line
    close(found["state"], strategy_workers.fit(None, {"max_steps": 2})["state"])


def test_without_a_compiler_training_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError

    monkeypatch.setattr("lightning_januspipe.compiled.torch_internals.get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=r"compile=True, but no C\+\+ compiler was found: install g\+\+"):
        quiet_trainer(COMPILED, max_steps=1).fit(tiny.module(), tiny.data())


AUTO = {"compile": "auto", "num_microbatches": 1}


class Ended:
    """Stands for a process that compiles, which has ended at once."""

    def __init__(self, sources: Any, *_: Any) -> None:
        self.keys = list(sources)

    def has_ended(self) -> bool:
        """Returns that it has ended."""
        return True

    def result(self) -> CompileResult:
        """Returns that every stage has failed."""
        return CompileResult(dict.fromkeys(self.keys, "RuntimeError: no space left"))

    def end(self) -> None:
        """Does nothing."""


def lines_of(caplog: pytest.LogCaptureFixture, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


@pytest.mark.parametrize(
    ("ratio", "compiler", "line"),
    [
        (10.0, None, "phases stay eager: training is planned for about"),
        (0.0, "no C++ compiler was found", "phases stay eager: no C++ compiler was found"),
    ],
)
def test_nothing_is_compiled_where_it_does_not_pay_or_cannot_be_done(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ratio: float,
    compiler: str | None,
    line: str,
) -> None:
    monkeypatch.setattr(training_length, "LEAST_RATIO", ratio)
    monkeypatch.setattr(change_over, "missing_compiler", lambda device: compiler)
    monkeypatch.setattr(change_over, "BackgroundCompile", None)  # which nothing can start
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        found = strategy_workers.fit(AUTO, {"max_steps": 1})
    assert len(lines_of(caplog, line)) == 1
    close(found["state"], strategy_workers.fit(None, {"max_steps": 1})["state"])


def test_training_stays_eager_where_the_background_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(training_length, "LEAST_RATIO", 0.0)
    monkeypatch.setattr(change_over, "BackgroundCompile", Ended)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        found = strategy_workers.fit(AUTO, {"max_steps": 3})
    assert len(lines_of(caplog, "phases run eagerly until they are compiled in the background")) == 1
    (line,) = lines_of(caplog, "no space left")
    assert line.startswith("januspipe: from step 0 on: stage 0 runs eagerly: CaptureError: RuntimeError: no space left")
    close(found["state"], strategy_workers.fit(None, {"max_steps": 3})["state"])


def test_what_cannot_be_captured_is_trained_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise CaptureError("the forward reads the weather")

    monkeypatch.setattr(build_pipeline, "capture_module", fail)
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        found = strategy_workers.fit(AUTO, {"max_steps": 1})
    assert len(lines_of(caplog, "trained as it is, not compiled: the forward reads the weather")) == 1
    close(found["state"], strategy_workers.fit(None, {"max_steps": 1})["state"])
    with pytest.raises(CaptureError, match="the weather"):
        strategy_workers.fit(COMPILED, {"max_steps": 1})


def test_what_stages_would_make_wrong_is_trained_as_it_is(caplog: pytest.LogCaptureFixture) -> None:
    module = tiny.module()
    module.potential.energy_model.embedding.weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        quiet_trainer(AUTO, max_steps=1).fit(module, tiny.data())
    (line,) = lines_of(caplog, "trained as it is")
    assert "not compiled: parameter potential.energy_model.embedding.weight of" in line
    with pytest.raises(ValueError, match="has a hook that sees gradients"):
        quiet_trainer(COMPILED, max_steps=1).fit(module, tiny.data())


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_what_compiles_is_ended_with_training(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: type[BaseException] | None
) -> None:
    """Training that ends before the stages are compiled, by itself, by Ctrl-C or by an error."""
    monkeypatch.setattr(training_length, "LEAST_RATIO", 0.0)
    monkeypatch.setenv("JANUSPIPE_CACHE", str(tmp_path))
    made: list[BackgroundCompile] = []

    def start(*arguments: Any) -> BackgroundCompile:
        made.append(BackgroundCompile(*arguments))
        return made[-1]

    class Interrupt(lightning.Callback):
        def on_train_batch_end(self, *_: Any) -> None:
            assert not made[0].has_ended()
            if error is not None:
                raise error

    monkeypatch.setattr(change_over, "BackgroundCompile", start)
    trainer = quiet_trainer(AUTO, max_steps=1, limit_val_batches=0, callbacks=[Interrupt()])
    ends: Any = nullcontext() if error is None else pytest.raises((SystemExit, RuntimeError))
    with ends:
        trainer.fit(tiny.module(), tiny.data())
    (background,) = made
    assert background._process.returncode is not None, "it runs on, or nobody has waited for it"
    with pytest.raises(ProcessLookupError):
        os.killpg(background._process.pid, 0)
