"""The whole way from a module and two batches to validated stages, with the module left as it was."""

from __future__ import annotations

import copy
import random
import re
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from capture_models import DTYPE, OTHER, TRACED, Batch, Potential, Step, assert_parity, make_batch
from torch import Tensor, nn

from lightning_januspipe.capture import Capture, CaptureError, capture_module


class Busy(Step):
    """Its step updates metrics and buffers, logs, draws random numbers and writes to its batch."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__(potential)
        self.error = torchmetrics.MeanAbsoluteError()
        self.norm = nn.BatchNorm1d(3, dtype=DTYPE)
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.long))
        self.logged: list[str] = []
        self.counts = {"steps": 0, "names": ["first"]}
        self._outputs: deque[Tensor] = deque()
        self._running = torch.zeros(2)

    def log(self, name: str, value: Any) -> None:
        self.logged.append(name)

    def training_step(self, batch: Batch) -> Any:
        self.num_steps += 1
        self.counts["steps"] += 1  # type: ignore[operator]
        self.counts["names"].append("again")  # type: ignore[attr-defined]
        self._outputs.append(batch["energy"])
        self._running += 1
        self._last = batch["energy"]
        self.norm.weight.grad = torch.ones(3, dtype=DTYPE)
        batch["positions"] = batch["positions"] + 0.01 * torch.randn_like(batch["positions"]) * np.random.rand()
        random.random()
        self.norm(batch["positions"])
        out = self.potential(batch)
        self.error(out["energy"].detach(), batch["energy"])
        self.log("error", self.error)
        batch["energy"] = out["energy"]
        return (out["forces"] - batch["forces"]).square().mean()


def capture(module: Step, num_stages: int, **arguments: Any) -> Capture:
    batches = make_batch(TRACED), make_batch(OTHER)
    return capture_module(module, module.training_step, *batches, [range(num_stages)], **arguments)


@pytest.fixture(scope="module")
def busy() -> tuple[Busy, Capture, dict[str, Any], dict[str, Any]]:
    module = Busy(Potential(3))
    module.error(torch.zeros(3), torch.ones(3))
    module.norm(torch.randn(5, 3, dtype=DTYPE))
    module.potential.layers[1].eval()
    for parameter in module.potential.readout.parameters():
        parameter.grad = torch.full_like(parameter, 3.0)
    before = state(module)
    captured = capture(module, 2)
    return module, captured, before, state(module)


def state(module: Busy) -> dict[str, Any]:
    found: dict[str, Any] = {f"state {k}": v.clone() for k, v in module.state_dict().items()}
    found |= {f"buffer {k}": v.clone() for k, v in module.named_buffers()}
    found |= {f"grad {k}": None if p.grad is None else p.grad.clone() for k, p in module.named_parameters()}
    found |= {f"training {k}": m.training for k, m in module.named_modules()}
    found |= {f"attributes {k}": sorted(m.__dict__) for k, m in module.named_modules()}
    found |= {f"metric {k}": v.clone() for k, v in module.error.metric_state.items()}
    found |= {"metric updates": module.error._update_count, "logged": list(module.logged)}
    found |= {"counts": copy.deepcopy(module.counts), "outputs": len(module._outputs)}
    found |= {"running": module._running.clone()}
    found |= {"torch": torch.get_rng_state(), "numpy": np.random.get_state()[1].copy(), "python": random.getstate()}
    found |= {f"hooks {k}": len(m._forward_hooks) + len(m._forward_pre_hooks) for k, m in module.named_modules()}
    return found


def test_module_is_unchanged(busy: Any) -> None:
    _, _, before, after = busy
    assert before.keys() == after.keys()
    for name, value in before.items():
        if isinstance(value, (Tensor, np.ndarray)):
            assert (value == after[name]).all(), name
        else:
            assert value == after[name], name
    assert before["buffer num_steps"] == 0
    assert before["metric updates"] == 1


def test_stages_are_right(busy: Any) -> None:
    module, captured, _, _ = busy
    potential = captured.potential
    assert potential.path == "potential"
    assert potential.cut.num_stages == len(captured.costs) == 2
    assert all(s.total > 0 for s in captured.costs)
    assert_parity(potential, Step(module.potential), make_batch((5, 1, 2)))


def test_module_is_unchanged_after_an_error() -> None:
    module = Busy(Potential(1))
    before = state(module)
    with pytest.raises(CaptureError, match="cuttable"):
        capture(module, 50)
    after = state(module)
    assert torch.equal(before["torch"], after["torch"])
    assert after["buffer num_steps"] == 0 and after["metric updates"] == 0
    assert torch.equal(before["buffer norm.running_mean"], after["buffer norm.running_mean"])


def test_named_potential() -> None:
    class Wrapper(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, batch: Batch) -> Any:
            return {k: 2 * v for k, v in self.inner(batch).items()}

    module = Step(Wrapper(Potential(2)))
    captured = capture(module, 2, potential="potential.inner").potential
    assert captured.path == "potential.inner"
    assert "embedding.weight" in captured.program.parameters.values()
    assert_parity(captured, module, make_batch((2, 3, 4)))


def test_description() -> None:
    found = capture(Step(Potential(3)), 2)
    text = found.describe()
    assert re.fullmatch(r"potential 'potential' in 2 stages with .*, a boundary of \d+ B per atom", text)
    assert re.fullmatch(
        r"potential 'potential' captured \(traced in .* s\): \d+ operations, ready after .* s", found.describe_capture()
    )
    assert " in 2 stages with " in found.describe(2) and " in 2 stages on 1 rank with " in found.describe(1)
    shares = [int(x) for x in re.findall(r"(\d+) %", text)]
    assert len(shares) == 2 and 99 <= sum(shares) <= 101
    assert capture(Step(Potential(3)), 1).describe() == "potential 'potential' in one stage"


def test_batch_with_other_entries() -> None:
    module = Step(Potential(1))
    other = {k: v for k, v in make_batch(OTHER).items() if k != "stress"}
    with pytest.raises(CaptureError, match=r"without .*'stress'.*same entries"):
        capture_module(module, module.training_step, make_batch(TRACED), other, [range(1)])


def test_evaluation_step() -> None:
    """Validation without fit: no second derivatives, no loss."""
    module = Step(Potential(2)).eval()
    captured = capture_module(module, module.potential, make_batch(TRACED), make_batch(OTHER), [range(2)]).potential
    assert captured.cut.num_stages == 2
    assert [captured.program.outputs[i] for i in captured.regions.outputs] == captured.program.outputs


class AnotherInEvaluation(Potential):
    """Returns other energies in evaluation mode."""

    def forward(self, batch: Batch) -> Any:
        out = super().forward(batch)
        return out if self.training else {**out, "energy": 2 * out["energy"]}


def test_a_potential_that_differs_in_evaluation() -> None:
    """It is refused where its training step evaluates, and evaluated as a whole where validation does."""
    module = Step(AnotherInEvaluation(2))
    with pytest.raises(CaptureError, match="in evaluation mode output"):
        capture(module, 2)
    assert all(m.training for m in module.modules()), "the refusal left submodules in evaluation mode"
    assert "in evaluation mode output" in capture(module, 2, evaluation_step=module.training_step).not_evaluated


class Flagged(Potential):
    """Writes to its batch, and returns fewer entries where it is told not to compute the stress."""

    def forward(self, batch: Batch, training: bool = False, stress: bool = True) -> Any:
        batch["positions"] = batch["positions"] + 0.1
        out = super().forward(batch)
        return out if stress else {"energy": out["energy"]}


class FlaggedStep(Step):
    """Its evaluation leaves out ``training``."""

    def training_step(self, batch: Batch) -> Any:
        out = self.potential(batch, training=self.training)
        return (out["energy"].square().sum() + out["forces"].square().sum()) + out["stress"].square().sum()

    def validation_step(self, batch: Batch) -> Any:
        return self.potential(batch)["energy"]

    def faulty_step(self, batch: Batch) -> Any:
        return self.potential(batch, stress=False)["energy"]


def test_evaluation_may_call_the_potential_with_other_options() -> None:
    module = FlaggedStep(Flagged(2))
    captured = capture(module, 2, evaluation_step=module.validation_step).potential
    assert captured.call.evaluation == {"kwargs['training']": "(no value)"}
    assert capture(module, 2).potential.call.evaluation == {"kwargs['training']": False}, (
        "from the step in evaluation mode"
    )
    not_evaluated = capture(module, 2, evaluation_step=module.faulty_step).not_evaluated
    assert "returns only 1 tensors in evaluation" in not_evaluated


def test_an_evaluation_step_for_other_batches() -> None:
    module = FlaggedStep(Flagged(1))
    assert capture(module, 1, evaluation_step=lambda batch: batch["unknown"]).potential.call.evaluation == {}
