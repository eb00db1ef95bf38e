"""Describes the inputs and results of a potential that is sharded over graph ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.graph.index_analysis import IndexSource, RowIndex
from lightning_januspipe.graph.placement import Placement
from lightning_januspipe.graph.row_classes import RowClasses

IndexFunction = Callable[[Sequence[Tensor]], dict[str, Tensor]]
"""From the inputs of a whole micro-batch to the indices that the potential computes, and to values of indices, by the
operation's name."""


class RankPotential(Protocol):
    """Has stages that work on one rank's own rows; its inputs end with one exchange for each class of rows."""

    @property
    def num_stages(self) -> int:
        """Returns the length of the chain."""

    @property
    def chain(self) -> ChainSpec:
        """Returns the specs of derivative and observables."""

    def stage(self, index: int, potential: nn.Module) -> StageFunction:
        """Returns one stage, with the parameters of the live potential."""


@dataclass(frozen=True, kw_only=True)
class ShardedPotential:
    """Holds a potential for several graph ranks.

    Attributes:
        potential: with exchanges; its inputs end with one exchange for each of ``classes.names``.
        bind: from its inputs on one rank to the values of its size symbols.
        classes: the classes of rows that are sharded.
        rows: (position of an input, dimension) -> the class of rows along this dimension.
        localized: parts of inputs that hold row indices -> the class that they point to. Each rank gets local indices.
        observables: placements of the observables.
        derivatives: placements of the differentiation inputs, and so of the derivative.
        positions: which input has the positions (N, 3), if one has.
        types: which input has the types of atoms (N,), if one is known to.
        computed: row indices that operations compute from inputs. They are computed for the whole micro-batch, and
            are inputs after the extended ones.
        values: other values that operations compute from row indices, with their placements: which edges join an atom
            with itself, say. They are computed for the whole micro-batch too, and are the last inputs.
        extended: (position, dimension) of inputs whose rows the potential takes with the halo too, after the
            exchanges: every rank has these rows, so nothing has to be sent.
    """

    potential: RankPotential
    bind: Callable[[Sequence[Tensor]], dict[str, int]]
    classes: RowClasses
    rows: dict[tuple[int, int], str]
    localized: dict[IndexSource, str]
    observables: tuple[Placement, ...]
    derivatives: tuple[Placement, ...]
    positions: int | None
    types: int | None = None
    computed: tuple[RowIndex, ...] = ()
    values: Mapping[str, Placement] = field(default_factory=dict)
    extended: tuple[tuple[int, int], ...] = ()

    def index_function(self, potential: nn.Module) -> IndexFunction:
        """Returns the function that computes the :attr:`computed` indices and the :attr:`values`.

        Args:
            potential: the live potential.
        """
        assert not self.computed and not self.values
        return lambda _: {}

    def verify(
        self, potential: nn.Module, tensors: Sequence[Tensor], num_ranks: int, gradient_bytes: float | None = None
    ) -> bool:
        """Compares a micro-batch that is sharded over graph ranks with the whole one, in this process.

        Args:
            potential: the live potential.
            tensors: the inputs of the whole micro-batch.
            num_ranks: G.
            gradient_bytes: the most bytes of parameter gradients that are there at once, twice; None for all.

        Returns:
            False where that takes all ranks together; see
            :func:`~lightning_januspipe.graph.verify_explicit.verify_explicit_sharding`.

        Raises:
            CaptureError: they differ.
        """
        return False
