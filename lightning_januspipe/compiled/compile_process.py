"""Compiles the stages of a training process in another process, which ends when the training process does.

It has a low priority, and compiles the phases of a stage side by side in as many processes of its own as it may.
"""

from __future__ import annotations

import os
import pickle
import select
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from lightning_januspipe.compiled import torch_internals
from lightning_januspipe.compiled.artifacts import ArtifactCache, StageArtifacts, StageSource
from lightning_januspipe.compiled.compiler import compile_graph, require_fit, traced, with_recorded_guards
from lightning_januspipe.compiled.exchanges import exchange_order
from lightning_januspipe.compiled.phase_graphs import PhaseGraphs, phase_graphs
from lightning_januspipe.errors import in_one_line
from lightning_januspipe.schedule.actions import Phase

REQUEST, RESULT, OUTPUT = "request", "result", "output"
"""Names of the files that the two processes share: what to compile, how it went, and what was printed."""


@dataclass(frozen=True)
class CompileRequest:
    """Says what to compile.

    Attributes:
        sources: The pickled sources of stages, by their keys.
        imports: Modules that define the operators of the sources.
        artifacts: The folder for what is compiled.
        num_workers: Processes that may compile side by side.
        niceness: How much lower their priority is than that of training, as ``os.nice`` has it.
    """

    sources: Mapping[str, bytes]
    imports: tuple[str, ...]
    artifacts: Path
    num_workers: int
    niceness: int


@dataclass
class CompileResult:
    """Says how compiling went.

    Attributes:
        failed: Why stages are not compiled, by the keys of their sources.
        cpu_seconds: CPU time of all processes.
    """

    failed: dict[str, str] = field(default_factory=dict)
    cpu_seconds: float = 0.0


def main(folder: str) -> None:
    """Compiles what the request in a folder says; standard input ends when the training process does.

    Args:
        folder: The folder, which is this process's alone.
    """
    threading.Thread(target=_end_with_training, daemon=True).start()
    torch_internals.compile_one_by_one()
    place, result = Path(folder), CompileResult()
    request = pickle.loads((place / REQUEST).read_bytes())
    assert isinstance(request, CompileRequest)
    os.nice(request.niceness)
    for name in request.imports:
        with suppress(Exception):  # it may need a process that trains; pickle names an operator that is missing
            import_module(name)
    for key, content in request.sources.items():
        try:
            source = pickle.loads(content)
            ArtifactCache(request.artifacts).save(key, compiled_stage(source, place, request.num_workers))
        except Exception as error:  # torch's tracing and compiling may fail in any way
            traceback.print_exc()
            result.failed[key] = in_one_line(error)
    result.cpu_seconds = sum(os.times()[:4])
    (place / f"{RESULT}.part").write_bytes(pickle.dumps(result))
    os.replace(place / f"{RESULT}.part", place / RESULT)


def compiled_stage(source: StageSource, place: Path, num_workers: int) -> StageArtifacts:
    """Traces, cuts and compiles one stage.

    Args:
        source: What the stage is made from.
        place: A folder for what processes hand on.
        num_workers: Processes that may compile side by side.
    """
    source.settings.apply()
    graphs = phase_graphs(traced(source), source.activation, source.defer)
    order = exchange_order(graphs.modules)
    # A process that has used a GPU must not fork. There inductor itself compiles kernels side by side.
    forks = num_workers > 1 and source.settings.device == "cpu"
    made = _side_by_side(graphs, place, num_workers) if forks else {p: _compiled(graphs, p) for p in graphs.modules}
    sizes = graphs.phases.sizes.with_guards([guard for _, guards in made.values() for guard in guards])
    phases = replace(graphs.phases, sizes=sizes)
    require_fit(phases, source)
    return StageArtifacts(phases, order, {phase: made[phase][0] for phase in graphs.modules})


def _compiled(graphs: PhaseGraphs, phase: Phase) -> tuple[bytes, tuple[str, ...]]:
    """Returns the compiled function of one phase, and the guards on sizes that it is right for."""
    function = torch_internals.packed(compile_graph(graphs.modules[phase], graphs.mode))
    if function is None:
        raise RuntimeError(f"torch cannot hand what it has compiled for {phase.value} to another process")
    return function, with_recorded_guards(graphs).sizes.guards


def _side_by_side(graphs: PhaseGraphs, place: Path, num_workers: int) -> dict[Phase, tuple[bytes, tuple[str, ...]]]:
    """Compiles all phases in processes of their own, the phases with the most operations first; see _compiled."""
    torch_internals.choose_vector_instructions()
    modules = graphs.modules
    waiting = sorted(modules, key=lambda phase: -len(modules[phase].graph.nodes))
    running: dict[int, Phase] = {}
    found: dict[Phase, tuple[bytes, tuple[str, ...]]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_workers:
                phase = waiting.pop(0)
                sys.stdout.flush()
                process = os.fork()
                if process == 0:
                    _compile_and_end(graphs, phase, place / phase.value)
                running[process] = phase
            process, status = os.wait()
            phase = running.pop(process)
            if status:
                raise RuntimeError(f"the process that compiled {phase.value} has ended with the status {status}")
            result = pickle.loads((place / phase.value).read_bytes())
            if isinstance(result, str):
                raise RuntimeError(result)
            found[phase] = result
    finally:
        for process in running:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
    return found


def _compile_and_end(graphs: PhaseGraphs, phase: Phase, file: Path) -> NoReturn:
    """Compiles one phase in a process that was forked for it, and ends this process."""
    status = 1
    try:
        result: Any
        try:
            result = _compiled(graphs, phase)
        except Exception as error:
            traceback.print_exc()
            result = in_one_line(error)
        file.write_bytes(pickle.dumps(result))
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def _end_with_training() -> None:
    """Waits for the end of the training process, then ends this process and all that it has started."""
    training = os.getppid()
    is_there = True
    while is_there:  # the pipe may have other writers, such as workers of loaders
        is_there = not select.select([0], [], [], 1.0)[0] and os.getppid() == training
    os.killpg(os.getpgrp(), signal.SIGKILL)
