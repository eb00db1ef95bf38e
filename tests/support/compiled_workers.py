"""What the ranks of the tests of compiled training run. Most run the phase graphs operation by operation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx

from lightning_januspipe.compiled import compiler
from lightning_januspipe.testing import RunRecord, train_in_pipeline


@contextmanager
def interpreted(change: Any = None) -> Iterator[list[fx.GraphModule]]:
    """Inside, phase graphs are not compiled but interpreted; yields the list of them.

    Args:
        change: maps the graph of a phase, as a function, to what runs in its place.
    """
    graphs: list[fx.GraphModule] = []

    def run(graph: fx.GraphModule, mode: Any) -> Any:
        graphs.append(graph)
        return graph if change is None else change(graph)

    with mock.patch.object(compiler, "compile_graph", run), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs eagerly")
        yield graphs


def train_interpreted(*arguments: Any) -> RunRecord:
    """Trains with interpreted phase graphs; every micro-batch has to fit."""
    with interpreted() as graphs:
        record = train_in_pipeline(*arguments)
    assert graphs, "no phase graph was made"
    return record


def train_on_graph_ranks(*arguments: Any) -> RunRecord:
    """Trains, and no phase graph may be made."""
    with interpreted() as graphs:
        record = train_in_pipeline(*arguments)
    assert not graphs
    return record
