"""Shards potentials with stages of their own: their parts work on own rows, and ask for rows of other ranks.

A part gets the rows of its rank: own atoms, and the edges into them. It gets features of other atoms with
:func:`with_halo`. Its results for structures are sums over own atoms; after the last part they are summed over the
ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lightning_januspipe.capture.stages.explicit import ExplicitPotential, ExplicitStage, Tensors
from lightning_januspipe.engine.specs import ChainSpec, TensorSpec
from lightning_januspipe.errors import CaptureError, quoted
from lightning_januspipe.graph.collectives import gather_halo, replicate, sum_over_ranks
from lightning_januspipe.graph.exchange import Exchange
from lightning_januspipe.graph.index_analysis import IndexSource, RowIndex
from lightning_januspipe.graph.placement import REPLICATE, Placement, PlacementKind
from lightning_januspipe.graph.row_classes import RowClasses
from lightning_januspipe.graph.sharded_potential import ShardedPotential

_HOW = (
    "For graph_size > 1, set stage_edges = (('edge_index', 0), ('edge_index', 1)): for the "
    "sources and for the targets of the edges, the input that holds them, and the row of it. Or use graph_size=1."
)


class RankInputs(dict[str, Tensor]):
    """Holds the inputs of a part on one of several graph ranks.

    Args:
        tensors: tensors with own rows, by name.
        exchange: the exchange of atoms.
    """

    def __init__(self, tensors: Tensors, exchange: Exchange) -> None:
        super().__init__(tensors)
        self.exchange = exchange


def with_halo(features: Tensor, inputs: Tensors) -> Tensor:
    """Returns the features of all atoms that a part's edges join: of own atoms, and of atoms of other graph ranks.

    A part of :class:`~lightning_januspipe.ExplicitStages` calls it before it looks features up by the source atoms of
    edges. All graph ranks have to call it in the same places. With one graph rank it returns the features unchanged.

    Args:
        features: (N, ...) features of the own atoms.
        inputs: the inputs that the part was called with.

    Returns:
        (N + H, ...): the own atoms first, then H atoms of other ranks. Gradients go back to the atoms' own ranks.

    Example:
        >>> def forward(self, inputs, features):
        ...     source, target = inputs["edge_index"]
        ...     messages = with_halo(features["h"], inputs)[source]
        ...     return {"h": torch.zeros_like(features["h"]).index_add(0, target, messages)}
    """
    return gather_halo(features, inputs.exchange) if isinstance(inputs, RankInputs) else features


@dataclass(frozen=True)
class ExplicitRankPotential:
    """Holds a potential with stages of its own, on the rows of one graph rank.

    Attributes:
        staged: the potential.
        classes: the size symbols of its atoms and edges.
    """

    staged: ExplicitPotential
    classes: tuple[str, str]

    @property
    def num_stages(self) -> int:
        """Returns the length of the chain."""
        return self.staged.num_stages

    @property
    def chain(self) -> ChainSpec:
        """Returns the specs of derivative and observables."""
        return self.staged.chain

    def bind(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Returns the values of the size symbols on this rank."""
        return {s: tensors[i].shape[d] for s, (i, d) in self.staged.symbols.items()}

    def stage(self, index: int, potential: nn.Module) -> ExplicitRankStage:
        """Returns one stage; its tensors end with one exchange for each class of rows, the first for the atoms."""
        return ExplicitRankStage(self.staged, index, potential, self.classes)


class ExplicitRankStage(ExplicitStage):
    """Runs consecutive parts as one stage, on the rows of one graph rank.

    Args:
        staged: the whole chain.
        index: position of this stage in it.
        potential: the live potential.
        classes: the size symbols of atoms and edges.
    """

    def __init__(self, staged: ExplicitPotential, index: int, potential: nn.Module, classes: tuple[str, str]) -> None:
        super().__init__(staged, index, potential)
        self._classes = classes

    def _inputs(self, tensors: Sequence[Any]) -> tuple[Tensors, list[Tensor]]:
        staged, num = self._staged, len(self._staged.inputs_by_name)
        named, leaves = super()._inputs(tensors[:num])
        exchange = cast(Exchange, tensors[num])
        local = RankInputs(named, exchange)
        for name in staged.coordinates:
            if _class_of(staged.inputs_by_name[name], self._classes) is None:
                local[name] = replicate(named[name], exchange)  # each rank computes its own rows from it
        return local, leaves

    def _results(self, results: Tensors, inputs: Tensors) -> Tensors:
        assert isinstance(inputs, RankInputs)
        return {
            name: sum_over_ranks(results[name], inputs.exchange)
            if _class_of(spec, self._classes) is None
            else results[name]
            for name, spec in self._staged.features[-1].items()
        }


def shard_explicit(staged: ExplicitPotential, potential: nn.Module) -> ShardedPotential:
    """Shards a potential with stages of its own over graph ranks.

    Args:
        staged: the potential in stages.
        potential: the live potential, whose ``stage_edges`` name the source and the target of its edges.

    Raises:
        CaptureError: ``stage_edges`` is missing or wrong, or a part before the last returns a feature without a row for
            each atom or edge.
    """
    position = {name: i for i, name in enumerate(staged.inputs_by_name)}
    ends = [_end(staged, position, given) for given in _declared(staged, potential)]
    atoms = _atoms(staged)
    edges = ends[0][1]
    if atoms == edges or ends[1][1] != edges:
        raise CaptureError(
            f"stage_edges of the potential {quoted(staged.path)} names inputs of sizes {ends[0][1]} and "
            f"{ends[1][1]}, with {atoms} atoms; expected two inputs with one entry for each edge. {_HOW}"
        )
    source, target = (RowIndex(where, edges, atoms, writes=i == 1) for i, (where, _) in enumerate(ends))
    for index, features in enumerate(staged.features[:-1]):
        for name, spec in features.items():
            if _class_of(spec, (atoms, edges)) is None:
                raise CaptureError(
                    f"graph_size > 1 is not possible: part {index} of the potential {quoted(staged.path)} returns "
                    f"{name!r} of shape {spec.shape}, which has no row for each atom ({atoms}) or edge ({edges}). Sum "
                    "over atoms in the last part only, or use graph_size=1."
                )
    rows = {
        (position[name], dim): size
        for name, spec in staged.inputs_by_name.items()
        for dim, size in enumerate(spec.shape)
        if size in (atoms, edges)
    }
    place = next((i for n, i in position.items() if n in staged.coordinates and rows.get((i, 0)) == atoms), None)
    local = ExplicitRankPotential(staged, (atoms, edges))
    return ShardedPotential(
        potential=local,
        bind=local.bind,
        classes=RowClasses(atoms, {edges: target}, {atoms: [source], edges: []}),
        rows={key: str(name) for key, name in rows.items()},
        localized={source.source: atoms, target.source: atoms},
        observables=tuple(_placement(spec, (atoms, edges)) for spec in staged.features[-1].values()),
        derivatives=tuple(_placement(staged.inputs_by_name[n], (atoms, edges)) for n in staged.coordinates),
        positions=place,
    )


def _declared(staged: ExplicitPotential, potential: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Returns source and target of the edges, each as the name of an input and the row of it."""
    given = getattr(potential, "stage_edges", None)
    pairs = [(e,) if isinstance(e, str) else e for e in given] if isinstance(given, (list, tuple)) else []
    ends = [(str(e[0]), tuple(e[1:])) for e in pairs if isinstance(e, (list, tuple)) and e]
    is_right = len(pairs) == len(ends) == len(set(ends)) == 2
    if not is_right or any(name not in staged.inputs_by_name for name, _ in ends):
        raise CaptureError(
            f"the potential {quoted(staged.path)} has stage_edges = {given!r}; expected the source and the target of "
            f"edges, among its inputs {list(staged.inputs_by_name)}. {_HOW}"
        )
    return ends


def _end(
    staged: ExplicitPotential, position: Mapping[str, int], given: tuple[str, tuple[int, ...]]
) -> tuple[IndexSource, str]:
    """Returns one end of the edges, and the size symbol that counts the edges."""
    name, selected = given
    whole = staged.inputs_by_name[name].shape
    shape = whole[len(selected) :]
    is_row = all(
        isinstance(n, int) and isinstance(i, int) and 0 <= i < n for i, n in zip(selected, whole, strict=False)
    )
    if len(shape) != 1 or not isinstance(shape[0], str) or not is_row:
        raise CaptureError(
            f"stage_edges of the potential {quoted(staged.path)} names {name!r} {list(selected)} of shape {shape}; "
            f"expected one index for each edge. {_HOW}"
        )
    return IndexSource(position[name], tuple((0, place) for place in selected)), shape[0]


def _atoms(staged: ExplicitPotential) -> str:
    for name in staged.coordinates:
        shape = staged.inputs_by_name[name].shape
        if len(shape) == 2 and isinstance(shape[0], str) and shape[1] == 3:
            return shape[0]
    raise CaptureError(
        f"graph_size > 1 needs positions (N, 3) among stage_coordinates; those of the potential {quoted(staged.path)} "
        f"are {list(staged.coordinates)}. Use graph_size=1."
    )


def _class_of(spec: TensorSpec, classes: Sequence[str]) -> tuple[str, int] | None:
    """Returns the class of a tensor's rows and their dimension; None for a tensor without rows."""
    return next(((str(size), dim) for dim, size in enumerate(spec.shape) if size in classes), None)


def _placement(spec: TensorSpec, classes: Sequence[str]) -> Placement:
    found = _class_of(spec, classes)
    return REPLICATE if found is None else Placement(PlacementKind.SHARD, *found)
