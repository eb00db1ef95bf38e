"""Finds words for symbolic sizes: which size is the number of atoms, of edges, of angles, of structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_januspipe.capture.trace.operators import index_arguments, indices
from lightning_januspipe.capture.trace.program import Node, Program, Ref
from lightning_januspipe.engine.specs import TensorSpec

Size = int | str
"""The value of a size on the example batch, or its expression where no value is known."""


@dataclass(frozen=True)
class SizeWords:
    """Holds the field's words for the sizes of a potential's tensors.

    Attributes:
        of: size -> word.
        values: a size's expression -> its value on the example batch.
        defined_by: word -> the input that has this size.
    """

    of: Mapping[Size, str]
    values: Mapping[str, int] = field(default_factory=dict)
    defined_by: Mapping[str, str] = field(default_factory=dict)

    def word(self, size: str) -> str | None:
        """Returns ``"atom"``, ``"edge"``, ...; None for a size without a word."""
        return self.of.get(self.values.get(size, size))

    def shape(self, spec: TensorSpec) -> tuple[int | str, ...]:
        """Returns a shape with ``"atoms"``, ``"edges"``, ... for sizes; expressions stay where there is no word."""
        words = [None if isinstance(s, int) else self.word(s) for s in spec.shape]
        return tuple(s if word is None else f"{word}s" for s, word in zip(spec.shape, words, strict=True))

    def per(self, spec: TensorSpec) -> str:
        """Returns what a tensor has an entry for: ``"atom"``, ...; ``"batch"`` where all its sizes are constants."""
        sizes = [s for s in spec.shape if isinstance(s, str)]
        return " x ".join(self.word(s) or "other row" for s in sizes) or "batch"


def words_of_inputs(
    inputs: Mapping[str, TensorSpec], symbols: Mapping[str, tuple[int, int]], coordinates: Sequence[str]
) -> SizeWords:
    """Returns words for the sizes of a potential with stages of its own.

    The first size of the positions is the number of atoms, the first size of the strain that of structures, the length
    of a tensor with pairs of integers that of edges.

    Args:
        inputs: names and specs of its inputs, in order.
        symbols: size symbol -> (input position, dimension) that defines it.
        coordinates: names of the differentiation inputs.
    """
    words, defined_by = _of_coordinates([inputs[n] for n in coordinates], {}), {}
    names = list(inputs)
    for symbol, (position, _) in symbols.items():
        if symbol not in words:
            is_edge = _is_pairs(inputs[names[position]]) and "edge" not in words.values()
            words[symbol] = word = "edge" if is_edge else f"row of {names[position]}"
            defined_by[word] = names[position]
    return SizeWords(words, {}, defined_by)


def words_of_program(
    program: Program, values: Mapping[str, int], observables: Sequence[str], places: Sequence[str]
) -> SizeWords:
    """Returns words for the sizes of a captured program.

    The first size of the positions that the energy is differentiated by is the number of atoms, the first size of the
    strain, or of the energies, that of structures. What is looked up from atoms with indices are edges, what is looked
    up from edges with two or more are angles, and half as many as edges are undirected edges.

    Args:
        program: the captured program.
        values: values of the size expressions on the example batch.
        observables: values that the loss reads.
        places: where each input stands in a call; the last inputs, integers read from tensors, have no place.
    """
    specs = [s for s in (program.by_name[n].spec for n in program.coordinates) if s is not None]
    words = _of_coordinates(specs, values)
    observed = [program.by_name[n].spec for n in observables]
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
    defined_by: dict[str, str] = {}
    for word, sizes in (("edge", sorted(known - angles, key=str)), ("angle", sorted(angles, key=str))):
        for number, size in enumerate(sizes):
            place = _place(program, values, places, size)
            another = f"{word} of {place}" if place else f"{word} (kind {number + 1})"
            name = word if number == 0 else another
            words[size] = name
            if place:
                defined_by[name] = place
    return SizeWords(words, values, defined_by)


def _is_pairs(spec: TensorSpec) -> bool:
    return not spec.dtype.is_floating_point and len(spec.shape) == 2 and 2 in spec.shape


def _correct_edge_vectors(words: dict[Size, str], targets: Mapping[Size, Mapping[Size, set[str]]]) -> None:
    """Corrects the words of a potential that differentiates by edge vectors: atoms are what their indices point to."""
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
    """Returns for each number of indices and each size of what they index the names of the indices."""
    found: dict[Size, dict[Size, set[str]]] = {}
    for node in program.operations:
        if index_arguments(node) is None or len(indices(node)) != 1 or not isinstance(node.args[0], Ref):
            continue
        ((dim, index),) = indices(node)
        size = _size(program.by_name[node.args[0].name], dim, values)
        length = _size(program.by_name[index], 0, values)
        if size is not None and length is not None and size != length:
            found.setdefault(length, {}).setdefault(size, set()).add(index)
    return found


def _size(node: Node, dim: int, values: Mapping[str, int]) -> int | None:
    size = node.spec.shape[dim] if node.spec is not None and -len(node.spec.shape) <= dim < len(node.spec.shape) else 0
    return values.get(size) if isinstance(size, str) else None


def _place(program: Program, values: Mapping[str, int], places: Sequence[str], size: Size) -> str:
    """Returns where the input with a size stands in a call: pairs of integers first, then other integers."""
    found = []
    for position, (name, place) in enumerate(zip(program.inputs, places, strict=False)):
        spec = program.by_name[name].spec
        if spec is not None and size in [values.get(s) for s in spec.shape if isinstance(s, str)]:
            found.append((not _is_pairs(spec), spec.dtype.is_floating_point, position, place))
    return min(found)[-1] if found else ""
