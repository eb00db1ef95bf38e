"""Ranks that use one cache at the same time, and a small program to put into it."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_januspipe.capture.cache.store import VARIABLE, ProgramCache
from lightning_januspipe.capture.trace.program import Node, Program, Ref
from lightning_januspipe.engine.specs import TensorSpec

KEY = "0" * 64


def small_program(value: float = 1.0, returned: Any = None) -> Program:
    """Returns a program of one input, one constant and one operation."""
    spec = TensorSpec(("n", 2), torch.float64)
    return Program(
        nodes=[
            Node("x", "placeholder", "x", (), {}, spec),
            Node("c", "placeholder", "c", (), {}, TensorSpec((2,), torch.float64)),
            Node("e", "call_function", "aten.mul.Tensor", (Ref("x"), Ref("c")), {}, spec),
        ],
        parameters={},
        buffers={},
        constants={"c": torch.full((2,), value, dtype=torch.float64)},
        inputs=["x"],
        energies=["e"],
        coordinates=["x"],
        gradient="g",
        outputs=["e"],
        returned=returned,
        symbols={"n": (0, 0)},
    )


def write_and_read(folder: str, repeats: int) -> tuple[str, set[float]]:
    """Replaces and reads two entries again and again; returns the default folder and the values that were read.

    Any warning, such as one of a damaged file, is an error.
    """
    cache, rank = ProgramCache(Path(folder)), float(os.environ["RANK"])
    found = set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(repeats):
            key = str(i % 2) * 64
            cache.save(key, small_program(rank))
            program = cache.load(key)
            assert program is not None and program.by_name["e"] is program.nodes[2]
            found.add(float(program.constants["c"][0]))
    return os.environ[VARIABLE], found
