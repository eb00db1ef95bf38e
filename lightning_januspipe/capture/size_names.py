"""Words for symbolic sizes: what is the number of atoms, of edges, of angles, of structures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.stages.explicit import ExplicitPotential
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.trace.program import Node, Program, Ref
from lightning_januspipe.engine.specs import TensorSpec

# Where in an operation's arguments are what is indexed, the indices, and (a number, or None for 0) the dimension.
_INDEXING: dict[str, tuple[int, int, int | None]] = {
    "aten.index.Tensor": (0, 1, None),
    "aten.index_put.default": (0, 1, None),
    "aten.index_select.default": (0, 2, 1),
    "aten.index_add.default": (0, 2, 1),
    "aten.gather.default": (0, 2, 1),
    "aten.scatter_add.default": (0, 2, 1),
    "aten.scatter_reduce.two": (0, 2, 1),
}


Size = int | str
"""The value of a size on the example batch, or its expression where no value is known."""


@dataclass(frozen=True)
class Words:
    """Words for sizes.

    Attributes:
        of: size -> word.
        values: a size's expression -> its value on the example batch.
        places: word -> the input that has this size.
    """

    of: Mapping[Size, str]
    values: Mapping[str, int] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def word(self, size: str) -> str | None:
        """``"atom"``, ``"edge"``, ...; None for a size that is none of these."""
        return self.of.get(self.values.get(size, size))

    def plural(self, size: str) -> str:
        """``"atoms"``, ``"edges"``, ...; the expression where there is no word."""
        word = self.word(size)
        return size if word is None else f"{word}s"

    def per(self, spec: TensorSpec) -> str:
        """What a tensor has an entry for: ``"atom"``, ..., ``"batch"`` where its sizes are constants."""
        sizes = [s for s in spec.shape if isinstance(s, str)]
        return " x ".join(self.word(s) or s for s in sizes) or "batch"

    def defined(self) -> dict[str, str]:
        """Which input has the number of edges, of angles, ... as its size."""
        return dict(self.places)


def words_of(potential: StagedPotential) -> Words:
    """Words for the sizes of a potential's tensors.

    The number of atoms is the first size of the positions that the energy is differentiated by, that of structures the
    first size of the strain, or of the energies. What is looked up from atoms with indices are edges, what is looked up
    from edges with two or more are angles, and half as many as edges are undirected edges.
    """
    if isinstance(potential, ExplicitPotential):
        return _of_parts(potential)
    assert isinstance(potential, CapturedPotential)
    return _of_program(potential)


def _of_parts(potential: ExplicitPotential) -> Words:
    coordinates = [potential.inputs_by_name[n] for n in potential.coordinates]
    words, places = _of_coordinates(coordinates, {}), {}
    names = list(potential.inputs_by_name)
    for symbol, (position, _) in potential.symbols.items():
        spec = potential.inputs_by_name[names[position]]
        if symbol not in words:
            word = "edge" if _is_pairs(spec) and "edge" not in words.values() else f"row of {names[position]}"
            words[symbol] = word
            places[word] = names[position]
    return Words(words, {}, places)


def _is_pairs(spec: TensorSpec) -> bool:
    return not spec.dtype.is_floating_point and len(spec.shape) == 2 and 2 in spec.shape


def _of_program(captured: CapturedPotential) -> Words:
    program, values = captured.program, captured.cut.sizes
    specs = [s for s in (program.by_name[n].spec for n in program.coordinates) if s is not None]
    words = _of_coordinates(specs, values)
    observed = [program.by_name[n].spec for n in captured.regions.observables]
    flat = [s.shape[0] for s in observed if s is not None and len(s.shape) == 1 and isinstance(s.shape[0], str)]
    targets = _looked_up(program, values)
    _correct_edge_vectors(words, targets)
    if "structure" not in words.values() and any(s in values for s in flat):
        words.setdefault(min(values[s] for s in flat if s in values), "structure")
    atoms = {size for size, word in words.items() if word == "atom"}
    edges = {length for length, sources in targets.items() if length not in words and atoms & set(sources)}
    known = edges | {size for size, word in words.items() if word == "edge"}
    angles = {a for a in edges if sum(len(targets[a][b]) for b in known & set(targets[a]) if b != a) > 1}
    of_edges = {a for a, sources in targets.items() if a not in words and a not in edges and known & set(sources)}
    undirected = {a for a in of_edges if isinstance(a, int) and 2 * a in known}
    words.update(dict.fromkeys(undirected, "undirected edge"))
    angles |= of_edges - undirected
    places: dict[str, str] = {}
    for word, sizes in (("edge", sorted(known - angles, key=str)), ("angle", sorted(angles, key=str))):
        for number, size in enumerate(sizes):
            place = _place(captured, size)
            name = word if number == 0 else f"{word} of {place}"
            words[size] = name
            if place:
                places[name] = place
    return Words(words, values, places)


def _correct_edge_vectors(words: dict[Size, str], targets: Mapping[Size, Mapping[Size, set[str]]]) -> None:
    """Where the energy is differentiated by edge vectors, atoms are what their indices point to."""
    sources = {size for of_length in targets.values() for size in of_length}
    for size in [size for size, word in words.items() if word == "atom" and size not in sources]:
        atoms = {s: len(names) for s, names in targets.get(size, {}).items() if s not in words}
        if atoms:
            words[size] = "edge"
            words[max(atoms, key=atoms.__getitem__)] = "atom"


def _of_coordinates(specs: list[TensorSpec], values: Mapping[str, int]) -> dict[Size, str]:
    words: dict[Size, str] = {}
    for spec in specs:
        first = spec.shape[0] if spec.shape else 1
        if isinstance(first, str):
            words.setdefault(values.get(first, first), "atom" if len(spec.shape) == 2 else "structure")
    return words


def _looked_up(program: Program, values: Mapping[str, int]) -> dict[Size, dict[Size, set[str]]]:
    """Number of indices -> size of what they index -> the indices."""
    found: dict[Size, dict[Size, set[str]]] = {}
    for node in program.nodes:
        if node.target not in _INDEXING:
            continue
        source, index, dim = (_argument(node, place) for place in _INDEXING[node.target])
        if isinstance(index, (list, tuple)):
            index = index[0] if len(index) == 1 else None
        if not isinstance(source, Ref) or not isinstance(index, Ref):
            continue
        size = _size(program.by_name[source.name], dim if isinstance(dim, int) else 0, values)
        length = _size(program.by_name[index.name], 0, values)
        if size is not None and length is not None and size != length:
            found.setdefault(length, {}).setdefault(size, set()).add(index.name)
    return found


def _argument(node: Node, place: int | None) -> object:
    return node.args[place] if place is not None and place < len(node.args) else None


def _size(node: Node, dim: int, values: Mapping[str, int]) -> int | None:
    size = node.spec.shape[dim] if node.spec is not None and -len(node.spec.shape) <= dim < len(node.spec.shape) else 0
    return values.get(size) if isinstance(size, str) else None


def _place(captured: CapturedPotential, size: Size) -> str:
    """The input with this size, pairs of integers first, then other integers."""
    program, values = captured.program, captured.cut.sizes
    found = []
    for position, place in enumerate([*captured.call.tensors, *captured.call.sizes]):
        spec = program.by_name[program.inputs[position]].spec
        if spec is not None and size in [values.get(s) for s in spec.shape if isinstance(s, str)]:
            found.append((not _is_pairs(spec), spec.dtype.is_floating_point, position, place))
    return min(found)[-1] if found else ""
