"""Keeps the compiled phases of stages as files, by all that they depend on: a second start traces and compiles nothing.

Inductor has a cache of its own, whose keys differ between processes that compile the same graph. The key here is made
of what the phase graphs are made of, so that a process may compile for another one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_januspipe.capture.cache.key import environment
from lightning_januspipe.capture.cache.store import FileCache, Words
from lightning_januspipe.compiled.blueprint import StageBlueprint
from lightning_januspipe.compiled.compiled_stage import PhaseRunners
from lightning_januspipe.compiled.minimum_cut import Activation
from lightning_januspipe.compiled.phase_graphs import StagePhases
from lightning_januspipe.compiled.torch_internals import Settings, unpacked
from lightning_januspipe.schedule.actions import Phase


@dataclass(frozen=True)
class StageSource:
    """Holds what the compiled phases of one stage are made from, as plain data.

    Attributes:
        plan: the stage.
        activation: what its phases keep.
        defer: leave what only parameters wait for to WF and WE.
        trains: also compile BF and BE.
        settings: what compiled code depends on beside its graph.
    """

    plan: StageBlueprint
    activation: Activation
    defer: bool
    trains: bool
    settings: Settings

    def key(self) -> str | None:
        """Returns 64 hexadecimal digits that tell the compiled phases from all others; None where nothing does."""
        digest = self.plan.digest()
        if digest is None:
            return None
        parts = (digest, self.activation, str(self.defer), str(self.trains), repr(self.settings), *environment())
        found = hashlib.sha256()
        for part in parts:
            found.update(f"{len(part)}:{part}".encode())
        return found.hexdigest()


@dataclass(frozen=True)
class StageArtifacts:
    """Holds the compiled phases of one stage as bytes.

    Attributes:
        phases: what the phases take, return and keep, with the guards that compiling has added.
        order: the exchanges of each phase; see :func:`~.exchanges.exchange_order`.
        functions: the compiled function of each phase.
    """

    phases: StagePhases
    order: Mapping[str, list[str]]
    functions: Mapping[Phase, bytes]

    def runners(self, tolerance: float | None) -> PhaseRunners:
        """Returns the phases, ready to run.

        Args:
            tolerance: what rounding explains of a difference from the eager phases.
        """
        return PhaseRunners(self.phases, {p: unpacked(f) for p, f in self.functions.items()}, tolerance)


class ArtifactCache(FileCache[StageArtifacts]):
    """Stores the compiled phases of stages; the key is that of a :class:`StageSource`."""

    suffix = ".stage"
    magic = b"januspipe stage 1\n"
    kind = StageArtifacts
    words = Words("the compiled phases of a stage", "the stage is compiled again", "every start compiles them again")
