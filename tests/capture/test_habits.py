"""What widely used packages do in their forwards is captured, and trains as it does without stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from capture_models import Traced, assert_parity
from habits import (
    CallableBatch,
    Graphs,
    Potential,
    RegistryBatch,
    SlottedBatch,
    Step,
    WritesOnce,
    WritesVectors,
    collate,
    sample,
)
from torch import nn

from lightning_januspipe.capture.trees import copied, leaves
from lightning_januspipe.capture.validate.against_eager import validate
from lightning_januspipe.errors import CaptureError


def trains(step: nn.Module, make: Callable[[Any], Any] = lambda b: b) -> None:
    """Asserts that two and three stages train like the module on a batch of other sizes."""
    traced = Traced(step, make(collate([sample(0), sample(1), sample(2)])))
    other = collate([sample(i) for i in (5, 3, 4, 7)])
    for num_stages in (2, 3):
        potential = traced.cut(num_stages)
        validate(potential, traced.potential, traced.call_on(make(dict(other))))
        assert_parity(potential, step, make(dict(other)), 1e-9)


@pytest.mark.parametrize(
    ("potential", "make", "labels"),
    [
        (Potential, CallableBatch, lambda b: b),
        (WritesOnce, RegistryBatch, lambda b: b),
        (Potential, SlottedBatch, lambda b: b),
        (WritesVectors, lambda b: Graphs(b, {}), lambda g: g.nodes),
    ],
)
def test_containers_are_copied_whole(potential: Any, make: Any, labels: Any) -> None:
    trains(Step(potential(), labels), make)


class Cell:
    """Holds itself, tensors, and a counter without tensors."""

    def __init__(self) -> None:
        self.me, self.tensor, self.names = self, torch.ones(2), {"a"}


def test_copies_share_tensors_and_nothing_else() -> None:
    cell = Cell()
    batch = {"cell": cell, "keys": {"x"}, "pair": Graphs({"a": cell.tensor}, {}), "function": sample}
    other = copied(batch)
    other["cell"].names.add("b")
    other["keys"].add("y")
    other["pair"].edges["new"] = cell.tensor
    assert cell.names == {"a"} and batch["keys"] == {"x"} and batch["pair"].edges == {}
    assert other["cell"] is not cell and other["cell"].tensor is cell.tensor and other["function"] is sample
    assert [p for p, x in leaves(batch) if isinstance(x, torch.Tensor)] == ["['cell'].tensor", "['pair'].nodes['a']"]


def test_call_without_tensors() -> None:
    class Convert(Potential):
        def forward(self, b: Any) -> Any:
            return super().forward(collate([sample(n) for n in b.numbers]))

    with pytest.raises(
        CaptureError, match=r"is called without tensors: its arguments hold \{'\[0\]\[0\]': '.*Names'\}"
    ):
        Traced(Step(Convert(), lambda b: collate([sample(n) for n in b.numbers])), Names([1, 2]))


class Names:
    """Holds no tensors."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
