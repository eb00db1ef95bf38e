"""Trains with compiled phases whose graphs run operation by operation: the same graphs, without the time to compile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import fx

from lightning_januspipe.compiled import compiler
from lightning_januspipe.compiled.artifacts import ArtifactCache
from lightning_januspipe.compiled.background import BackgroundCompile
from lightning_januspipe.compiled.compile_process import CompileResult
from lightning_januspipe.runtime import change_over
from lightning_januspipe.testing.runs import RunRecord, train_in_pipeline


class _NothingToDo(BackgroundCompile):
    """Stands for a process that has ended and compiled nothing, so that phases are interpreted here."""

    def __init__(self, sources: Any, *_: Any, **__: Any) -> None:
        assert sources

    def has_ended(self) -> bool:
        return True

    def result(self) -> CompileResult:
        return CompileResult()

    def end(self) -> None: ...


@contextmanager
def interpreted_phases(change: Callable[[fx.GraphModule], Any] | None = None) -> Iterator[list[fx.GraphModule]]:
    """Interprets phase graphs inside the block, instead of compiling them; yields the list of the graphs made.

    Args:
        change: Maps the graph of a phase to what runs in its place.
    """
    graphs: list[fx.GraphModule] = []

    def run(graph: fx.GraphModule, mode: Any) -> Any:
        graphs.append(graph)
        return graph if change is None else change(graph)

    with (
        mock.patch.object(compiler, "compile_graph", run),
        mock.patch.object(compiler.StageCompiler, "require_own_work"),
        mock.patch.object(change_over, "BackgroundCompile", _NothingToDo),
        mock.patch.object(compiler, "artifact_cache", return_value=ArtifactCache(None)),
    ):
        yield graphs


def train_interpreted(*arguments: Any) -> RunRecord:
    """Trains as :func:`.train_in_pipeline` does, with interpreted phases."""
    with interpreted_phases():
        return train_in_pipeline(*arguments)
