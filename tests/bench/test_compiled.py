"""``januspipe bench compile``, with phase graphs that run operation by operation in this process."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from compiled_workers import interpreted

from lightning_januspipe.bench import compiled as bench
from lightning_januspipe.bench.training_steps import module_and_loader
from lightning_januspipe.bench.work import Work
from lightning_januspipe.capture.cache.store import VARIABLE


def made(work: Work) -> tuple[Any, Any]:
    """Makes a module and a loader, as a factory for other packages does."""
    return module_and_loader(work, torch.float64, energy_weight=1.0)


WORK = Work(num_atoms=8, batch_size=2, steps=1, num_layers=1, num_features=4, dtype="float64")


def test_every_row_trains_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kept bytes are those of the graphs, and the second start of a row is timed too."""
    cache = os.environ[VARIABLE]

    def time_steps(job: bench.Job) -> bench.StepTimes:
        monkeypatch.setenv("WORLD_SIZE", "1")  # the strategy's launcher removes it at the end of each run
        return bench.time_steps(replace(job, cache=cache))

    monkeypatch.setattr(bench, "_in_fresh_process", time_steps)
    with interpreted() as graphs:
        rows: list[bench.RowName] = ["plain", "eager", "eager-recompute", "pointwise", "own"]
        lines = bench.compiled(WORK, rows=rows, own_factory=f"{__name__}:made").splitlines()
    assert len(graphs) == 8
    table = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in lines if line.startswith("| ")}
    names = ["plain Lightning", "januspipe, eager", "januspipe, eager, recompute", "januspipe, compiled, pointwise"]
    assert list(table)[1:] == [*names, "the package's own compiled training"]
    assert len({row[-1].strip(" |") for row in list(table.values())[1:]}) == 1, "other losses"
    kept = [float(size) for size in table[names[-1]][4].split(" / ")]
    (of_eager,) = re.findall(r"Eager phases of the same stage keep (.*) MB", lines[-1])
    assert all(0 < a < float(b) for a, b in zip(kept, of_eager.split(" / "), strict=True))
