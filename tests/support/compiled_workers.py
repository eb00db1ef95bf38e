"""What the ranks of the tests of compiled training run. Most run the phase graphs operation by operation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from lightning_januspipe.testing import RunRecord, interpreted_phases, train_in_pipeline


@contextmanager
def interpreted(change: Any = None) -> Iterator[list[fx.GraphModule]]:
    """Interprets phase graphs inside; a micro-batch that runs eagerly is an error there."""
    with interpreted_phases(change) as graphs, warnings.catch_warnings():
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
