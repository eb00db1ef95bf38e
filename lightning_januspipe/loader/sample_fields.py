"""The fields of samples and batches of any format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from torch import Tensor

from lightning_januspipe.loader.packing import work

_MAX_DEPTH = 5


EDGES = ("edge_index", "idx_i", "edge_src", "senders", "nbr_list", "neighbor_list")
"""In the names under which samples keep their edges: two rows or columns of E indices, or one."""


ATOMS = ("pos", "positions", "coords", "coordinates", "cart_coords", "r", "xyz")
"""Names under which samples keep their atoms' positions, without underscores around them: N rows."""


def sample_cost(sample: Any) -> float:
    """How much work a sample is, about: edges and atoms (see :func:`~lightning_januspipe.loader.packing.work`).

    Where only one of these is found, that; without both, the numbers that the sample holds.

    Args:
        sample: a dict, a tuple, PyG data, an ``ase.Atoms``, or any object with attributes, also nested.
    """
    edges, atoms, numbers = _counts("", sample, 0)
    found = work(atoms, edges)
    return float(max(numbers if found is None else found, 1))


def _counts(name: str, value: Any, depth: int) -> tuple[int | None, int | None, int]:
    """Edges and atoms, where there are any by name, and all numbers."""
    if isinstance(value, Tensor) or hasattr(value, "__array_interface__"):
        shape = tuple(value.shape)
        numbers = value.numel() if isinstance(value, Tensor) else int(value.size)
        if any(n in name for n in EDGES):
            return numbers // 2 if len(shape) == 2 else numbers, None, numbers
        if name.strip("_").lower() in ATOMS and len(shape) == 2:
            return None, shape[0], numbers
        return None, None, numbers
    if depth > _MAX_DEPTH or value is None or isinstance(value, (str, bytes, int, float)):
        return None, None, 0
    found = [_counts(n, v, depth + 1) for n, v in _parts(value)]
    edges = [e for e, _, _ in found if e is not None]
    atoms = [a for _, a, _ in found if a is not None]
    return sum(edges) if edges else None, max(atoms) if atoms else None, sum(n for _, _, n in found)


def named_tensors(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Tensor]]:
    """The tensors in a sample or batch of any form, with the names under which they are found.

    Args:
        value: a tensor, a dict, a list or tuple, PyG data, or any object with attributes, also nested.
        name: the name of a value that is a tensor itself.
        depth: how deep it lies.
    """
    if isinstance(value, Tensor):
        yield name, value
    elif depth <= _MAX_DEPTH and value is not None and not isinstance(value, (str, bytes, int, float)):
        for inner, part in _parts(value):
            yield from named_tensors(part, inner, depth + 1)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What an object holds, by name."""
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return [("", v) for v in value]
    named: Any = value
    if isinstance(value, tuple):
        named = named._asdict()
    if not isinstance(value, type) and hasattr(value, "to_dict"):  # PyG data
        with suppress(Exception):  # another method of this name
            named = value.to_dict()
    if not isinstance(named, Mapping):
        named = getattr(value, "__dict__", {})
    return [(str(k), v) for k, v in named.items()]
