"""Exchanges of rows stand where experts are spread, and rows of the experts' inner width do not travel."""

from __future__ import annotations

import pytest
import torch
from capture_models import Potential, Step, Traced, assert_parity, make_batch
from expert_workers import NUM_EXPERTS, Experts

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.trace.operators import operator_of
from lightning_januspipe.engine.specs import MicrobatchInput
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.expert_ranks import ExpertAxis, ExpertGroup, spread_experts


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(Step(Experts(2)))


class _OnOneRank:
    """A captured potential with exchanges of rows between experts that are all on one rank."""

    def __init__(self, captured: CapturedPotential, potential: torch.nn.Module) -> None:
        self._captured = captured
        self._axis = ExpertAxis(captured, potential, ExpertGroup(1, 0, None), range(captured.num_stages))

    def __getattr__(self, name: str) -> object:
        return getattr(self._captured, name)

    def stage(self, index: int, potential: torch.nn.Module) -> object:
        stage, plan = self._axis.potential.stage(index, potential), self._axis.plan

        class Planned:
            def __getattr__(self, name: str) -> object:
                return getattr(stage, name)

            def __call__(self, tensors: list[torch.Tensor], boundary: list[torch.Tensor]) -> object:
                (given,) = plan([MicrobatchInput(list(tensors), {})])
                return stage(given.tensors, boundary)

        return Planned()


@pytest.mark.parametrize("num_stages", [1, 2])
def test_the_same_gradients_on_one_rank(traced: Traced, num_stages: int) -> None:
    captured = traced.cut(num_stages)
    assert_parity(_OnOneRank(captured, traced.potential), traced.module, make_batch((3, 5), seed=1))


def test_what_is_spread_and_what_travels(traced: Traced) -> None:
    captured = traced.cut(1)
    spread = spread_experts(captured, 2)
    names = {n.removeprefix(f"layers.{layer}.") for n in spread.parameters for layer in range(2)}
    names = {n for n in names if not n.startswith("layers")}
    assert names == {f"{m}.{p}.weight" for m, p in [("messages", "out")] + [
        (m, p) for m in ("messages", "updates") for p in ("core", "gate")
    ]}  # fmt: skip
    assert set(spread.parameters.values()) == {NUM_EXPERTS} and len(spread.sites) == 2 * 2 * 2
    needed = spread.potential.needed(0)
    moved = [n for n in spread.potential.program.operations if n.name in needed]
    by_name = captured.program.by_name
    back = [n for n in moved if operator_of(n) == "return_rows"]
    sent = [n for n in moved if operator_of(n) == "send_rows"]
    # For each of two layers and two experts of each row: messages there and back once, updates there once, and back
    # twice, because biases, which stay, are added before the nonlinearity.
    assert len(sent) == 2 * 2 * 2 and len(back) == 2 * 2 * (1 + 2)
    assert all(by_name[n.name].spec.shape[-1] == 6 for n in back)


def test_potentials_without_experts_are_refused() -> None:
    with pytest.raises(CaptureError, match="no parameter of the potential is read by grouped_linear alone"):
        spread_experts(Traced(Step(Potential(1))).cut(1), 2)


def test_more_ranks_than_experts_are_refused(traced: Traced) -> None:
    with pytest.raises(CaptureError, match="expert_size=6, but .* has 5 experts"):
        spread_experts(traced.cut(1), 6)
