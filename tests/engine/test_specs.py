"""Shapes that torch's tracer prints, evaluated for other sizes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._sympy import functions

from lightning_januspipe.engine import specs
from lightning_januspipe.engine.specs import TensorSpec

SYMBOLS = {"s0": 7, "s1": 5, "s77": 12}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("s0", 7),
        ("2*s0", 14),
        ("s0 + s1", 12),
        ("s0*s1 - 3", 32),
        ("s0**2", 49),
        ("(s0//2)", 3),
        ("((s0*s1)//(s0 + 1))", 4),
        ("-(((-s0)//4))", 2),
        ("FloorDiv(s0, 2)", 3),
        ("Mod(s0 + 1, s1)", 3),
        ("PythonMod(-s0, 4)", 1),
        ("ModularIndexing(s77, 2, 4)", 2),
        ("CleanDiv(s77, 4)", 3),
        ("Max(s1, s0)", 7),
        ("Min(s0, s1 + 1)", 6),
        ("Max(1, s0 - 9)", 1),
        ("Max(1, (s77//5), s1)", 5),
        ("TruncToInt(IntTrueDiv(s0, 2))", 3),
        ("CeilToInt(IntTrueDiv(s0, 2))", 4),
    ],
)
def test_expressions(expression: str, value: int) -> None:
    sizes = TensorSpec((expression, 3), torch.float64).sizes(SYMBOLS)
    assert sizes == (value, 3)
    assert all(type(s) is int for s in sizes)


def test_new_values_of_the_symbols_are_used() -> None:
    spec = TensorSpec(("2*s0", "s1"), torch.float64)
    assert [spec.sizes({"s0": a, "s1": b}) for a, b in ((1, 2), (3, 4), (0, 0))] == [(2, 2), (6, 4), (0, 0)]


def test_unknown_symbol() -> None:
    with pytest.raises(KeyError, match="u0"):
        TensorSpec(("u0 + s0",), torch.float64).sizes(SYMBOLS)


OPERATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cat": lambda x, y: torch.cat([x, y, x]),
    "every second": lambda x, y: x[::2],
    "windows": lambda x, y: x.unfold(0, 3, 2),
    "pairs": lambda x, y: (x[:, None] * y[None]).reshape(-1, 3),
    "halves": lambda x, y: x[: x.shape[0] // 2],
    "modulo": lambda x, y: x.new_zeros(x.shape[0] % y.shape[0], 2),
    "larger": lambda x, y: x.new_zeros(torch.sym_max(x.shape[0], y.shape[0] + 1)),
    "smaller": lambda x, y: x.new_zeros(torch.sym_min(x.shape[0] * 2, y.shape[0])),
    "rounded up": lambda x, y: x.new_zeros(-(-x.shape[0] // 4)),
    "true division": lambda x, y: x.new_zeros(torch.sym_int(x.shape[0] * 3 / 2)),
    "both": lambda x, y: torch.cat([x, y])[: (x.shape[0] * y.shape[0]) // (x.shape[0] + 2)],
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_shapes_as_torch_prints_them(name: str) -> None:
    """Trace at one size, print the shape, evaluate it at others and compare with the operation itself."""
    operation = OPERATIONS[name]
    printed: list[Any] = []

    def traced(x: Tensor, y: Tensor) -> Tensor:
        out = operation(x, y)
        printed.append([str(s) for s in (*x.shape, *y.shape)])
        printed.append(tuple(int(s) if isinstance(s, int) else str(s.node.expr) for s in out.shape))
        return out

    make_fx(traced, tracing_mode="symbolic")(torch.zeros(9, 3), torch.zeros(6, 3))
    names, shape = printed
    assert any(isinstance(s, str) for s in shape), "nothing symbolic to evaluate"
    for num_x, num_y in ((9, 6), (14, 11), (23, 8)):
        found = TensorSpec(shape, torch.float32).sizes(dict(zip(names, (num_x, 3, num_y, 3), strict=True)))
        assert found == tuple(operation(torch.zeros(num_x, 3), torch.zeros(num_y, 3)).shape)


@pytest.mark.parametrize(
    "text",
    [
        "2*s0 + s1**2",
        "FloorDiv(s0 + 1, 3)",
        "((s0 + s1)//2)",
        "Eq((s0//2), s1 % 3)",
        "Max(1, s0, s1)",
        "Ne(Mod(s0*s1, 3), 0)",
        "Eq(s0, 1 - s1)",
        "(s0 > 1) & (s1 < 5)",
        "s0/2",
    ],
)
def test_expressions_have_their_values_in_sympy(text: str) -> None:
    known = {name: getattr(functions, name) for name in ("FloorDiv", "Max", "Mod")}
    parsed = sympy.sympify(text, locals=known)
    for s0, s1 in product(range(4), range(4)):
        given = {"s0": s0, "s1": s1}
        assert specs.evaluate(text, given) == parsed.subs(given), given


def test_sizes_are_compared_without_sympy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sympy, "sympify", None)
    specs._compiled.cache_clear()
    assert specs.violated_sizes("Ne(Mod(s0, 7), 3)", {"s0": 10, "s1": 2}) == {"s0": 10}
    assert specs.TensorSpec((3, "2*s0"), torch.float32).sizes({"s0": 4}) == (3, 8)
