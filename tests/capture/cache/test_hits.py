"""A program from the cache is validated like a new one, so what its key does not tell is found."""

from __future__ import annotations

from contextvars import ContextVar
from pathlib import Path

from capture_models import OTHER, TRACED, Batch, Potential, Step, assert_parity, make_batch
from torch import Tensor

from lightning_januspipe.capture import Capture, ProgramCache, capture_module

FACTOR = ContextVar("FACTOR", default=1.0)
"""Counts by its type in the key: pickle refuses it."""


class Scaled(Potential):
    """Reads in its forward what no key tells."""

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        return super().pool(values * FACTOR.get(), batch)


def captured(module: Step, cache: ProgramCache) -> Capture:
    return capture_module(module, module.training_step, make_batch(TRACED), make_batch(OTHER), [[0, 1]], cache=cache)


def test_a_hit_is_validated(tmp_path: Path) -> None:
    module, cache = Step(Scaled(2)), ProgramCache(tmp_path / "programs")
    assert "traced in" in captured(module, cache).origin
    found = captured(module, cache)
    assert "read from the cache" in found.origin
    assert_parity(found.potential, module, make_batch((3, 1, 2)))
    (stored,) = (tmp_path / "programs").iterdir()
    token = FACTOR.set(1.1)
    try:
        found = captured(module, cache)
        assert "traced in" in found.origin, "the stored program computes something else"
        assert_parity(found.potential, module, make_batch((3, 1, 2)))
        assert list((tmp_path / "programs").iterdir()) == [stored], "the key is the same"
        assert "read from the cache" in captured(module, cache).origin, "the new program took the place of the old one"
    finally:
        FACTOR.reset(token)
