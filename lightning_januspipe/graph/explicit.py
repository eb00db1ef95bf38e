"""Graph ranks for potentials that divide themselves: the parts are written for own rows, and ask for those of others.

A part gets the rows of its rank: own atoms, and the edges into them. What it knows of other atoms it gets with
:func:`with_halo`. Results for structures are sums over the own atoms; they are summed over the ranks for the part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from lightning_januspipe.capture.stages.explicit import ExplicitPotential, ExplicitStage, Tensors
from lightning_januspipe.engine.specs import ChainSpec, TensorSpec
from lightning_januspipe.errors import CaptureError, shown
from lightning_januspipe.graph.collectives import Exchange, gather_halo, replicate, sum_over_ranks
from lightning_januspipe.graph.index_analysis import Numbers, Source
from lightning_januspipe.graph.placement import REPLICATED, Kind, Value
from lightning_januspipe.graph.row_classes import Classes
from lightning_januspipe.graph.sharded_potential import Division

_HOW = (
    "For graph_size > 1, set stage_edges = (('edge_index', 0), ('edge_index', 1)): the input, and the row of it, with "
    "the atom that each edge comes from, and with the one that it is summed into. Or use graph_size=1."
)


class LocalInputs(dict[str, Tensor]):
    """The inputs of a part on one of several graph ranks.

    Args:
        tensors: own rows by name.
        exchange: of the atoms.
    """

    def __init__(self, tensors: Tensors, exchange: Exchange) -> None:
        super().__init__(tensors)
        self.exchange = exchange


def with_halo(features: Tensor, inputs: Tensors) -> Tensor:
    """Features of all atoms that a part's edges join: own ones, and copies of those of other graph ranks.

    A part of :class:`~lightning_januspipe.ExplicitStages` calls it before it looks features up by the
    atoms that edges come from. All graph ranks have to call it alike. On one rank nothing is added.

    Args:
        features: (N, ...) of the own atoms, which are the first.
        inputs: what the part was called with.

    Returns:
        (N + H, ...), with H atoms of other ranks. Gradients of these go back to their own ranks.

    Example:
        >>> def forward(self, inputs, features):
        ...     source, target = inputs["edge_index"]
        ...     messages = with_halo(features["h"], inputs)[source]
        ...     return {"h": torch.zeros_like(features["h"]).index_add(0, target, messages)}
    """
    return gather_halo(features, inputs.exchange) if isinstance(inputs, LocalInputs) else features


@dataclass(frozen=True)
class LocalExplicit:
    """A potential in its own stages, on the rows of one graph rank.

    Attributes:
        divided: the potential.
        classes: the size symbols of its atoms and edges.
    """

    divided: ExplicitPotential
    classes: tuple[str, str]

    @property
    def num_stages(self) -> int:
        """Length of the chain."""
        return self.divided.num_stages

    @property
    def chain(self) -> ChainSpec:
        """Specs of derivative and observables."""
        return self.divided.chain

    def bind(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Values of the size symbols on this rank."""
        return {s: tensors[i].shape[d] for s, (i, d) in self.divided.symbols.items()}

    def stage(self, index: int, potential: nn.Module) -> LocalStage:
        """One stage; its tensors end with one exchange for each class of rows, the first for the atoms."""
        return LocalStage(self.divided, index, potential, self.classes)


class LocalStage(ExplicitStage):
    """Some of the parts, on the rows of one graph rank.

    Args:
        divided: the whole chain.
        index: position of this stage in it.
        potential: the live potential.
        classes: the size symbols of atoms and edges.
    """

    def __init__(self, divided: ExplicitPotential, index: int, potential: nn.Module, classes: tuple[str, str]) -> None:
        super().__init__(divided, index, potential)
        self._classes = classes

    def _inputs(self, tensors: Sequence[Any]) -> tuple[Tensors, list[Tensor]]:
        divided, num = self._divided, len(self._divided.inputs_by_name)
        named, leaves = super()._inputs(tensors[:num])
        exchange = cast(Exchange, tensors[num])
        local = LocalInputs(named, exchange)
        for name in divided.coordinates:
            if _class_of(divided.inputs_by_name[name], self._classes) is None:
                local[name] = replicate(named[name], exchange)  # each rank uses it for its own rows
        return local, leaves

    def _results(self, results: Tensors, inputs: Tensors) -> Tensors:
        assert isinstance(inputs, LocalInputs)
        return {
            name: sum_over_ranks(results[name], inputs.exchange)
            if _class_of(spec, self._classes) is None
            else results[name]
            for name, spec in self._divided.features[-1].items()
        }


def localize_explicit(divided: ExplicitPotential, potential: nn.Module) -> Division:
    """How a potential that divides itself is divided over graph ranks.

    Args:
        divided: the potential in stages.
        potential: the live potential, which says by ``stage_edges`` what its edges join.

    Raises:
        CaptureError: it does not say that, or a part hands on what is neither of atoms nor of edges.
    """
    position = {name: i for i, name in enumerate(divided.inputs_by_name)}
    ends = [_end(divided, position, given) for given in _declared(divided, potential)]
    atoms = _atoms(divided)
    edges = ends[0][1]
    if atoms == edges or ends[1][1] != edges:
        raise CaptureError(
            f"stage_edges of the potential {shown(divided.path)} names inputs of {ends[0][1]} and {ends[1][1]}, "
            f"where atoms are {atoms}; expected two of the same size, that of the edges. {_HOW}"
        )
    source, target = (Numbers(where, edges, atoms, writes=i == 1) for i, (where, _) in enumerate(ends))
    for index, features in enumerate(divided.features[:-1]):
        for name, spec in features.items():
            if _class_of(spec, (atoms, edges)) is None:
                raise CaptureError(
                    f"graph_size > 1 is not possible: part {index} of the potential {shown(divided.path)} hands on "
                    f"{name!r} of shape {spec.shape}, which has no row for each atom ({atoms}) or edge ({edges}). Sum "
                    "over atoms in the last part only, or use graph_size=1."
                )
    rows = {
        (position[name], dim): size
        for name, spec in divided.inputs_by_name.items()
        for dim, size in enumerate(spec.shape)
        if size in (atoms, edges)
    }
    place = next((i for n, i in position.items() if n in divided.coordinates and rows.get((i, 0)) == atoms), None)
    local = LocalExplicit(divided, (atoms, edges))
    return Division(
        potential=local,
        bind=local.bind,
        classes=Classes(atoms, {edges: target}, {atoms: [source], edges: []}),
        rows={key: str(name) for key, name in rows.items()},
        renumbered={source.source: atoms, target.source: atoms},
        observables=tuple(_value(spec, (atoms, edges)) for spec in divided.features[-1].values()),
        derivatives=tuple(_value(divided.inputs_by_name[n], (atoms, edges)) for n in divided.coordinates),
        positions=place,
    )


def _declared(divided: ExplicitPotential, potential: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    """Source and target of the edges: names of inputs, and rows of them."""
    given = getattr(potential, "stage_edges", None)
    pairs = [(e,) if isinstance(e, str) else e for e in given] if isinstance(given, (list, tuple)) else []
    ends = [(str(e[0]), tuple(e[1:])) for e in pairs if isinstance(e, (list, tuple)) and e]
    is_right = len(pairs) == len(ends) == len(set(ends)) == 2
    if not is_right or any(name not in divided.inputs_by_name for name, _ in ends):
        raise CaptureError(
            f"the potential {shown(divided.path)} has stage_edges = {given!r}; expected the source and the target of "
            f"edges, among its inputs {list(divided.inputs_by_name)}. {_HOW}"
        )
    return ends


def _end(
    divided: ExplicitPotential, position: Mapping[str, int], given: tuple[str, tuple[int, ...]]
) -> tuple[Source, str]:
    """One end of the edges, and the symbol of their number."""
    name, selected = given
    whole = divided.inputs_by_name[name].shape
    shape = whole[len(selected) :]
    is_row = all(
        isinstance(n, int) and isinstance(i, int) and 0 <= i < n for i, n in zip(selected, whole, strict=False)
    )
    if len(shape) != 1 or not isinstance(shape[0], str) or not is_row:
        raise CaptureError(
            f"stage_edges of the potential {shown(divided.path)} names {name!r} {list(selected)} of shape {shape}; "
            f"expected one number for each edge. {_HOW}"
        )
    return Source(position[name], tuple((0, place) for place in selected)), shape[0]


def _atoms(divided: ExplicitPotential) -> str:
    for name in divided.coordinates:
        shape = divided.inputs_by_name[name].shape
        if len(shape) == 2 and isinstance(shape[0], str) and shape[1] == 3:
            return shape[0]
    raise CaptureError(
        f"graph_size > 1 needs positions (N, 3) among stage_coordinates; those of the potential {shown(divided.path)} "
        f"are {list(divided.coordinates)}. Use graph_size=1."
    )


def _class_of(spec: TensorSpec, classes: Sequence[str]) -> tuple[str, int] | None:
    """The class of a tensor's rows, and their dimension."""
    return next(((str(size), dim) for dim, size in enumerate(spec.shape) if size in classes), None)


def _value(spec: TensorSpec, classes: Sequence[str]) -> Value:
    found = _class_of(spec, classes)
    return REPLICATED if found is None else Value(Kind.OWN, *found)
