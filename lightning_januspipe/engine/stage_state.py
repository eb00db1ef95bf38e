"""Defines what the executor changes of the sharded state of stages, between their phases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Collective(Protocol):
    """Stands for a collective that is under way, as torch's asynchronous collectives do."""

    def wait(self) -> Any:
        """Waits for the end; on a CUDA device lets the current stream wait."""


class StageState(Protocol):
    """Holds the state of this rank's stages that other ranks share.

    Collectives of stages meet those of the other ranks that hold the same stages, in the order of the calls.
    """

    def unshard(self, stage: int) -> Sequence[Collective]:
        """Starts to gather the parameters of a stage, unless they are there, and returns what is under way."""

    def wait_for_parameters(self, stage: int) -> None:
        """Waits until the parameters of a stage are there."""

    def reshard(self, stage: int) -> None:
        """Releases the parameters of a stage, if they are in shards."""

    def reduce(self, stage: int) -> Sequence[Collective]:
        """Starts to reduce the gradients of a stage, and returns what is under way; the optimizer step waits for it."""
