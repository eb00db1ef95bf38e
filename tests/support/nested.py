"""Compares nested numbers, such as the states of optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def close(name: str, expected: Any, found: Any) -> None:
    """Nested numbers agree to 1e-9, relative to the largest entry of a tensor."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), f"{name}: {expected.keys() ^ found.keys()}"
        for key in expected:
            close(f"{name}.{key}", expected[key], found[key])
    elif isinstance(expected, (list, tuple)):
        assert len(expected) == len(found), name
        for i, (x, y) in enumerate(zip(expected, found, strict=True)):
            close(f"{name}[{i}]", x, y)
    elif isinstance(expected, torch.Tensor) and expected.is_floating_point():
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale + 1e-15, msg=lambda m: f"{name}: {m}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9), name
    else:
        assert found == expected, name
