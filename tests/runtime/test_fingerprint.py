"""The fingerprint of a batch, by which ranks tell whether they hold the same one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_januspipe.runtime.fingerprint import fingerprint, same_batch


def _batch(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(6, 3, generator=generator),
        torch.randint(5, (6,), generator=generator),
        torch.rand(2, generator=generator) > 0.5,
    ]


def test_fingerprint_is_that_of_the_values() -> None:
    assert fingerprint(_batch()) == fingerprint([t.clone().requires_grad_(t.is_floating_point()) for t in _batch()])


@pytest.mark.parametrize(
    "change",
    [
        lambda b: [b[0].roll(1, 0), *b[1:]],
        lambda b: [b[0][[1, 0, 2, 3, 4, 5]], *b[1:]],
        lambda b: [b[0].flip(1), *b[1:]],
        lambda b: [b[0] + 1e-6, *b[1:]],
        lambda b: [b[0], b[1] + (torch.arange(6) == 3), b[2]],
        lambda b: [b[0], b[1], ~b[2]],
        lambda b: [b[0][:5], *b[1:]],
        lambda b: [b[0], torch.cat([b[1], torch.zeros(1, dtype=torch.int64)]), b[2]],
        lambda b: [*b, torch.zeros(0)],
        lambda b: b[:2],
        lambda b: [b[0].clone().index_fill_(0, torch.tensor([2]), float("nan")), *b[1:]],
        lambda b: [],
    ],
)
def test_fingerprint_tells_batches_apart(change: Any) -> None:
    assert fingerprint(change(_batch())) != fingerprint(_batch())
    assert fingerprint(_batch(1)) != fingerprint(_batch())


@pytest.mark.parametrize(
    "values", [[float("nan"), 1.0], [float("inf"), -float("inf")], [float("inf"), 1.0, float("nan")]]
)
def test_fingerprint_of_values_that_are_not_finite_equals_itself(values: list[float]) -> None:
    first, second = fingerprint([torch.tensor(values)]), fingerprint([torch.tensor(values)])
    assert first == second
    assert first != fingerprint([torch.tensor([v + 0.0 for v in reversed(values)])])


def test_rounding_is_no_difference() -> None:
    """A sum depends on where in memory its terms lie; a batch has to be recognized all the same."""
    values = torch.randn(20011, dtype=torch.float64) * 1e3
    moved = torch.cat([torch.zeros(1, dtype=torch.float64), values])[1:]
    nearly = values * (1 + 1e-15)
    for other in (moved, nearly):
        assert same_batch(fingerprint([values]), fingerprint([other]))
    changed = values.clone()
    changed[7] += 0.1
    assert not same_batch(fingerprint([values]), fingerprint([changed]))
    assert not same_batch(fingerprint([values]), fingerprint([values.flip(0)]))
    assert not same_batch(fingerprint([]), fingerprint([values]))
