"""What of a potential's inputs and results is sharded over the graph ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from torch import Tensor, nn

from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.graph.index_analysis import IndexSource, RowIndex
from lightning_januspipe.graph.placement import Placement
from lightning_januspipe.graph.row_classes import RowClasses


class RankPotential(Protocol):
    """A potential whose stages work on own rows; their tensors end with one exchange for each class of rows."""

    @property
    def num_stages(self) -> int:
        """Length of the chain."""

    @property
    def chain(self) -> ChainSpec:
        """Specs of derivative and observables."""

    def stage(self, index: int, potential: nn.Module) -> StageFunction:
        """One stage, with the parameters of the live potential."""


P = TypeVar("P", bound=RankPotential, covariant=True)


@dataclass(frozen=True)
class ShardedPotential(Generic[P]):
    """A potential for several graph ranks.

    Attributes:
        potential: with exchanges; its inputs end with one exchange for each of ``classes.names``.
        bind: from its inputs on one rank to the values of its size symbols.
        classes: what is sharded, and by what.
        rows: (position of an input, dimension) -> the class that it has an entry for.
        renumbered: parts of inputs that hold numbers of rows -> the class that they count.
        observables: kinds of the observables.
        derivatives: kinds of the differentiation inputs, and so of the derivative.
        positions: place of the input with positions (N, 3), if it is among the inputs.
        computed: numbers of rows that operations compute from inputs; they are computed for the whole micro-batch, and
            are the last inputs.
        extended: (position, dimension) of the inputs of which the potential also takes rows with the halo, after the
            exchanges: every rank has them, so nothing has to be sent.
    """

    potential: P
    bind: Callable[[Sequence[Tensor]], dict[str, int]]
    classes: RowClasses
    rows: dict[tuple[int, int], str]
    renumbered: dict[IndexSource, str]
    observables: tuple[Placement, ...]
    derivatives: tuple[Placement, ...]
    positions: int | None
    computed: tuple[RowIndex, ...] = ()
    extended: tuple[tuple[int, int], ...] = ()
