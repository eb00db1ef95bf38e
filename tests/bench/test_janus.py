"""The prediction for MatRIS-MoE counts what training with forces computes and sends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_januspipe.bench.janus import EXCHANGES, PRODUCTS, count_size, measured_operations
from lightning_januspipe.expert_ranks import bounds_of, plan_rows, return_rows, row_exchange, send_rows
from lightning_januspipe.experts import grouped_linear
from lightning_januspipe.models import matris_moe
from lightning_januspipe.runtime import expert_times


def test_products_and_exchanges_of_the_four_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Counter[tuple[str, str]] = Counter()
    phase = "energy"

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "grouped" in str(func):
                found[phase, "outer" if "outer" in str(func) else "linear"] += 1
            return func(*args, **(kwargs or {}))

    def counted(forward: Any) -> Any:
        def run(x: Tensor, *more: Any) -> Tensor:
            found[phase, "exchange"] += 1
            return forward(x, *more)

        return staticmethod(run)

    for kind in (row_exchange._SendRows, row_exchange._ReturnRows):
        monkeypatch.setattr(kind, "forward", counted(kind.forward))
    expert = torch.tensor([0, 1, 2, 1])
    exchange = plan_rows(expert, torch.bincount(expert)[None], bounds_of(3, 1), 0, None)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(3, *shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 8), (8, 4))]
    with Products():
        rows = send_rows(torch.tanh(x), exchange)
        rows = torch.tanh(grouped_linear(rows, weights[0], exchange.experts))
        energy = (return_rows(grouped_linear(rows, weights[1], exchange.experts), exchange, expert) ** 3).sum()
        phase = "force"
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        phase = "backward"
        ((force**2).sum() + energy**2).backward()
    assert found["energy", "linear"] == found["energy", "exchange"] == 2
    # Outer products in the force are derivatives of weights, which no phase needs.
    products = sum(n for (p, kind), n in found.items() if kind == "linear" or (kind == "outer" and p == "backward"))
    assert products == PRODUCTS * found["energy", "linear"]
    assert sum(n for (_, kind), n in found.items() if kind == "exchange") == EXCHANGES * found["energy", "exchange"]


def test_what_one_size_has() -> None:
    counted = count_size("tiny", edges=10)
    # Two blocks of width 16, experts of width 16, two of four for each row; messages of edges, then updates of atoms.
    of_messages, of_updates = 3 * 16 * 16 * 2 + 16 * 16, 2 * 16 * 16 * 2 + 16 * 16
    assert counted.experts == 2 * 4 * (of_messages + of_updates)
    assert counted.products == 2 * 2 * (10 * of_messages + of_updates)
    assert counted.sent == 2 * 2 * (10 * (48 + 16) + 32 + 16)


def test_operations_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose six products take a second for each of the three matrices of an expert."""
    monkeypatch.setattr(expert_times, "_seconds", lambda run, _: float(run.args[1]))
    monkeypatch.setitem(matris_moe.SIZES, "S", {"expert_features": 2})
    assert measured_operations(torch.device("cpu")) == pytest.approx(12 * 3 * 128 * 2)
