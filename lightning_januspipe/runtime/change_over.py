"""Compiles the stages of a rank while training has begun eagerly, and puts them in their places between two steps."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from lightning_januspipe.capture.trace.operators import is_of_package
from lightning_januspipe.compiled.artifacts import StageSource
from lightning_januspipe.compiled.background import NICENESS, BackgroundCompile
from lightning_januspipe.compiled.blueprint import TraceableStage, is_traceable
from lightning_januspipe.compiled.compile_process import CompileResult
from lightning_januspipe.compiled.compiled_stage import CompiledStage
from lightning_januspipe.compiled.compiler import CompileReport, StageCompiler
from lightning_januspipe.compiled.torch_internals import missing_compiler
from lightning_januspipe.engine.eager_stages import eager_stages
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.mesh import Mesh


@dataclass(frozen=True)
class CompileShare:
    """Says what a rank wants to have compiled.

    Attributes:
        host: its machine.
        artifacts: its folder of compiled phases.
        keys: the keys of its stages' sources, and whether these are compiled already.
        missing: which compiler it lacks, in words.
    """

    host: str
    artifacts: str
    keys: Mapping[str, bool]
    missing: str


@dataclass
class _Noted:
    """Keeps what a stage is made of."""

    function: StageFunction
    gradients: GradientBuffers
    chain: ChainSpec


class ChangeOver:
    """Makes the stages of a rank, eager ones first, and compiled ones once they are compiled on all ranks.

    One rank of each machine compiles a stage for all ranks there that have the same. All ranks call :meth:`start` and
    :meth:`change`.

    Args:
        compiler: makes the compiled stages.
        mesh: this rank's process groups.
        activations: what each stage keeps between its phases while they are eager.
        imports: modules that may define operators of the stages.
        trains_meanwhile: whether training goes on while stages are compiled.

    Attributes:
        is_over: whether nothing changes any more.
        is_compiled: whether an earlier run has compiled all stages of all ranks.
    """

    def __init__(
        self,
        compiler: StageCompiler,
        mesh: Mesh,
        activations: Sequence[str],
        imports: Sequence[str] = (),
        trains_meanwhile: bool = True,
    ) -> None:
        self.is_over = self.is_compiled = False
        self._imports, self._trains_meanwhile = tuple(imports), trains_meanwhile
        self._compiler, self._mesh, self._activations = compiler, mesh, activations
        self._own: Path | None = None
        self._noted: dict[int, _Noted] = {}
        self._background: BackgroundCompile | None = None
        self._began, self._seconds, self._cpu_seconds = time.perf_counter(), 0.0, 0.0

    def __call__(self, function: StageFunction, gradients: GradientBuffers, chain: ChainSpec) -> Stage:
        """Returns a stage that runs eagerly."""
        self._noted[function.index] = _Noted(function, gradients, chain)
        return eager_stages(self._activations[function.index])(function, gradients, chain)

    def start(self) -> str:
        """Starts to compile what no cache has; returns in words what happens."""
        compiler = self._compiler
        if compiler.artifacts is None:
            self._own = compiler.artifacts = Path(tempfile.mkdtemp(prefix="januspipe-compiled-"))
        sources = self._sources()
        keys = {key: compiler.kept(source, key) is not None for key, source in sources.items()}
        lacks = missing_compiler(compiler.device) or ""
        mine = CompileShare(socket.gethostname(), str(compiler.artifacts), keys, lacks)
        of_ranks = self._mesh.gathered(mine, "agreement on what is compiled")
        lacking = next((share.missing for share in of_ranks if share.missing), "")
        if lacking:
            self.end()
            return f"phases stay eager: {lacking}"
        owners = compiling_ranks(of_ranks)
        place, rank = (mine.host, mine.artifacts), self._mesh.rank
        own = {key: source for key, source in sources.items() if owners.get((*place, key)) == rank}
        if own:
            here = {owner for (host, *_), owner in owners.items() if host == mine.host}
            workers = max(1, _num_cores() // len(here))
            imports = self._imports if any(map(_has_foreign_operators, own.values())) else ()
            niceness = NICENESS if self._trains_meanwhile else 0
            self._background = BackgroundCompile(own, compiler.artifacts, compiler.cache, workers, imports, niceness)
        self.is_compiled = not owners
        return "phases run eagerly until they are compiled in the background"

    def wait(self) -> None:
        """Waits until this rank compiles no more."""
        while self.is_waiting():
            time.sleep(0.05)

    def is_waiting(self) -> bool:
        """Tells whether this rank still compiles."""
        return self._background is not None and not self._background.has_ended()

    def change(self, stages: dict[int, Stage]) -> str:
        """Puts compiled stages in the place of eager ones, while nothing is in flight; returns in words what was done.

        Args:
            stages: the stages of this rank by their index, which are changed.
        """
        result = CompileResult() if self._background is None else self._background.result()
        of_ranks = self._mesh.gathered(result, "exchange of what is compiled")
        self._compiler.uncompiled = {key: why for found in of_ranks for key, why in found.failed.items()}
        for index, noted in sorted(self._noted.items()):
            stage = self._compiler(noted.function, noted.gradients, noted.chain)
            if isinstance(stage, CompiledStage):
                stages[index] = stage
        self._seconds, self._cpu_seconds = time.perf_counter() - self._began, result.cpu_seconds
        self.end()
        reports = self._mesh.gathered_over_pipeline(self.report(), "gathering of what was compiled")
        return self._described(reports, sum(found.cpu_seconds for found in of_ranks))

    def report(self) -> CompileReport:
        """Returns what is compiled on this rank, and how long it took with the processes that did it."""
        report = self._compiler.report()
        return replace(report, seconds=self._seconds, cpu_seconds=report.cpu_seconds + self._cpu_seconds)

    def end(self) -> None:
        """Ends what runs in the background; stages stay as they are."""
        self.is_over = True
        if self._background is not None:
            self._background.end()
        if self._own is not None:
            self._compiler.artifacts = None
            shutil.rmtree(self._own, ignore_errors=True)

    def _sources(self) -> dict[str, StageSource]:
        """Returns the sources of this rank's stages, by key; a stage without one stays eager."""
        found: dict[str, StageSource] = {}
        for noted in self._noted.values():
            if not is_traceable(noted.function):
                continue
            with suppress(Exception):  # of the stage alone, which says so at the change
                source, key = self._compiler.source(cast(TraceableStage, noted.function), noted.chain)
                if key is not None:
                    found[key] = source
        return found

    def _described(self, reports: Sequence[CompileReport], cpu_seconds: float) -> str:
        words = [line for report in reports for line in report.eager]
        num = sum(report.num_compiled for report in reports)
        if num:
            stages = f"phases of {num} {'stage' if num == 1 else 'stages'}"
            how = f"compiled{' in the background' if self._trains_meanwhile else ''}"
            seconds = f"{max(report.seconds for report in reports):.1f} s"
            how = f"read from the cache in {seconds}" if self.is_compiled else f"{how} in {seconds}"
            how += f" ({cpu_seconds:.0f} s of CPU time)" if cpu_seconds else ""
            words.insert(0, f"{stages} {how}")
        return "; ".join(words)


def compiling_ranks(of_ranks: Sequence[CompileShare]) -> dict[tuple[str, str, str], int]:
    """Returns for each machine, folder and key that is not compiled yet the rank that compiles it."""
    found: dict[tuple[str, str, str], int] = {}
    for rank, share in enumerate(of_ranks):
        for key, is_compiled in share.keys.items():
            if not is_compiled:
                found.setdefault((share.host, share.artifacts, key), rank)
    return found


def _has_foreign_operators(source: StageSource) -> bool:
    program = getattr(source.plan.body, "program", None)
    return program is not None and any(map(is_of_package, program.nodes))


def _num_cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1
