"""Experts by element: what they compute, on stages, and on graph ranks."""

from __future__ import annotations

import pytest
import torch
from capture_models import DTYPE, Step, Traced, assert_parity, make_batch
from graph_models import Mixture
from torch import Tensor

from lightning_januspipe.capture.validate.against_eager import validate_stages
from lightning_januspipe.experts import ElementExperts, GroupedLinear
from lightning_januspipe.graph.insert_exchanges import shard_captured

SIZES = {"num_elements": 3, "num_experts": 4, "in_features": 5, "out_features": 2}


def row_by_row(experts: ElementExperts, x: Tensor, element: Tensor) -> Tensor:
    """What the experts compute, in a loop."""
    gates, chosen = experts.routes()
    rows = []
    for row, own in zip(x, element.tolist(), strict=True):
        total = torch.zeros(2, dtype=DTYPE)
        for gate, e in zip(gates[own], chosen[own].tolist(), strict=True):
            core, gated_by = (row @ of.weight[e] + of.bias[e] for of in (experts.core, experts.gate))
            total = total + gate * torch.nn.functional.silu(core) * gated_by.sigmoid()
        if experts.shared_core is not None:
            total = total + torch.nn.functional.silu(experts.shared_core(row)) * experts.shared_gate(row).sigmoid()
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("has_shared", [False, True])
def test_equals_a_loop_over_rows(top_k: int, has_shared: bool) -> None:
    torch.manual_seed(0)
    experts = ElementExperts(**SIZES, top_k=top_k, has_shared=has_shared).to(DTYPE)
    x, element = torch.randn(7, 5, dtype=DTYPE, requires_grad=True), torch.tensor([0, 2, 2, 0, 0, 2, 0])
    found, expected = experts(x, element), row_by_row(experts, x, element)
    torch.testing.assert_close(found, expected)
    parameters = [x, *experts.parameters()]
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), parameters) for y in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)
    assert experts.logits.grad is None and experts(x[:0], element[:0]).shape == (0, 2)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    experts = ElementExperts(**SIZES, top_k=2).to(DTYPE)
    x, element = torch.randn(4, 5, dtype=DTYPE, requires_grad=True), torch.tensor([0, 1, 0, 1])
    assert torch.autograd.gradgradcheck(lambda rows: experts(rows, element), (x,))


def test_arguments() -> None:
    with pytest.raises(ValueError, match="top_k=5; expected 1 to num_experts=4"):
        ElementExperts(**SIZES, top_k=5)
    with pytest.raises(ValueError, match="num_elements=0; expected at least 1"):
        ElementExperts(**{**SIZES, "num_elements": 0})
    with pytest.raises(ValueError, match="in_features=0; expected at least 1"):
        GroupedLinear(2, 0, 1)


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(Step(Mixture(3)))


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_stages(traced: Traced, num_stages: int) -> None:
    captured = traced.cut(num_stages)
    validate_stages(captured, traced.potential, traced.call_on(make_batch((4, 2), seed=2)))
    assert_parity(captured, traced.module, make_batch((2, 5, 1, 3), seed=1))
    one_element = make_batch((3, 4))
    one_element["species"].zero_()
    assert_parity(captured, traced.module, one_element)


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_graph_ranks(traced: Traced, num_ranks: int) -> None:
    captured = traced.cut(2)
    call = traced.call_on(make_batch((9, 4, 3)))
    tensors = captured.inputs(traced.potential)(call.args, call.kwargs)
    assert shard_captured(captured).verify(traced.potential, tensors, num_ranks)
