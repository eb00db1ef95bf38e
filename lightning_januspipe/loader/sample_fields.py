"""Finds the fields of samples and batches of any format. Their names stand here and nowhere else."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from lightning_januspipe import keys
from lightning_januspipe.loader.packing import work

# Formats put underscores around these names, and write some in capitals.
POSITIONS = (keys.POSITIONS, "pos", "coords", "coordinates", "cart_coords", "r", "xyz")
"""Names of the positions of atoms, (N, 3)."""

ATOM_FIELDS = (*POSITIONS, "z", keys.ATOMIC_NUMBERS, "x")
"""Names of fields with a row for each atom."""

EDGE_LISTS = (keys.EDGE_INDEX, "nbr_list", "neighbor_list")
"""Names, or parts of names, of edge lists, (2, E) or (E, 2)."""

EDGE_ENDS = (("idx_i", "idx_j"), ("edge_dst", "edge_src"), ("receivers", "senders"))
"""Names of the targets and the sources of edges, where each has a field of its own, (E,)."""

EDGE_FIELDS = (*EDGE_LISTS, *(targets for targets, _ in EDGE_ENDS))
"""Names, or parts of names, of fields that tell the number of edges; a format has one of them."""

STRUCTURE_INDICES = (keys.BATCH, "idx_m")
"""Names of the index of the structure that each atom belongs to, (N,)."""

_MAX_DEPTH = 5  # containers inside containers of a sample that are searched


def is_named(name: str, names: Collection[str]) -> bool:
    """Tells whether a field has one of some names."""
    return name.strip("_").lower() in names


def find_field(fields: Iterable[tuple[str, Tensor]], names: Collection[str], dim: int) -> Tensor | None:
    """Returns the first tensor with one of some names and a number of dimensions; None where there is none."""
    return next((tensor for name, tensor in fields if is_named(name, names) and tensor.dim() == dim), None)


def sample_cost(sample: Any) -> float:
    """Returns an estimate of the work of a sample (see :func:`~lightning_januspipe.loader.packing.work`).

    If neither edges nor atoms are found by their names, it is the number of numbers that the sample holds.

    Args:
        sample: A dict, a tuple, PyG data, an ``ase.Atoms``, or any object with attributes, also nested.
    """
    edges, atoms, numbers = _counts("", sample, 0)
    found = work(atoms, edges)
    return float(max(numbers if found is None else found, 1))


def _counts(name: str, value: Any, depth: int) -> tuple[int | None, int | None, int]:
    """Returns the numbers of edges and of atoms, None if no field is named so, and the number of all numbers."""
    if isinstance(value, Tensor) or hasattr(value, "__array_interface__"):
        shape = tuple(value.shape)
        numbers = value.numel() if isinstance(value, Tensor) else int(value.size)
        if any(n in name for n in EDGE_FIELDS):
            return numbers // 2 if len(shape) == 2 else numbers, None, numbers
        if is_named(name, POSITIONS) and len(shape) == 2:
            return None, shape[0], numbers
        return None, None, numbers
    if depth > _MAX_DEPTH or value is None or isinstance(value, (str, bytes, int, float)):
        return None, None, 0
    found = [_counts(n, v, depth + 1) for n, v in _parts(value)]
    edges = [e for e, _, _ in found if e is not None]
    atoms = [a for _, a, _ in found if a is not None]
    return sum(edges) if edges else None, max(atoms) if atoms else None, sum(n for _, _, n in found)


def named_tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Yields the names and the tensors of all fields of a sample or batch of any format.

    Args:
        value: A tensor, a dict, a list or tuple, PyG data, or any object with attributes, also nested.
        name: The name of the value.
        depth: How deep the value is nested.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif depth <= _MAX_DEPTH and value is not None and not isinstance(value, (str, bytes, int, float)):
        for inner, part in _parts(value):
            yield from named_tensors(part, inner, depth + 1)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """Returns the parts of an object with their names."""
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return [("", v) for v in value]
    named: Any = value
    if isinstance(value, tuple):
        named = named._asdict()
    if not isinstance(value, type) and hasattr(value, "to_dict"):  # PyG data
        with suppress(Exception):  # the method may be another one of this name
            named = value.to_dict()
    if not isinstance(named, Mapping):
        named = getattr(value, "__dict__", {})
    return [(str(k), v) for k, v in named.items()]
