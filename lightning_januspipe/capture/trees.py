"""Treats batches of any project as trees: dicts, lists, tuples, dataclasses, PyTorch Geometric data, plain objects.

No class is registered and no package imported: the attributes of an object tell how to walk through it.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Children = list[tuple[str, Any]]

_DEEPEST = 8


def children(value: Any) -> Children | None:
    """Returns the parts of a container by their place in it; None for a leaf.

    An object without tensors inside is a leaf, whatever it is.
    """
    if isinstance(value, (Tensor, nn.Module, str, bytes, int, float, complex, type(None), type)):
        return None
    if isinstance(value, Mapping):
        return [(f"[{k!r}]", v) for k, v in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{n}", v) for n, v in zip(value._fields, value, strict=True)]
    if isinstance(value, (list, tuple)):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    if _is_graph_data(value):
        return _of_graph_data(value)
    if hasattr(value, "__dict__") and not callable(value) and _holds_tensors(value, 0):
        return [(f".{n}", vars(value)[n]) for n in _attributes(value)]
    return None


def leaves(value: Any, place: str = "") -> Children:
    """Returns the leaves of a tree by their place, such as ``[0]['positions']`` or ``[0].edge_index``."""
    parts = children(value)
    if parts is None:
        return [(place, value)]
    return [leaf for key, part in parts for leaf in leaves(part, place + key)]


def with_leaves(value: Any, replace: Callable[[str, Any], Any], place: str = "") -> Any:
    """Returns the tree with other leaves; containers are copied, so that writing to them does not reach the original.

    Args:
        value: the tree.
        replace: from a leaf's place and value to its new value.
        place: the place of the tree itself.
    """
    parts = children(value)
    if parts is None:
        return replace(place, value)
    return _rebuilt(value, [with_leaves(part, replace, place + key) for key, part in parts])


def shallow_copy(batch: Any) -> Any:
    """Returns a copy of a batch that a step can write new entries to; the tensors are the same."""
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "_fields"):
        return type(batch)(shallow_copy(b) for b in batch)
    return batch if isinstance(batch, Tensor) else copy.copy(batch)


def _rebuilt(value: Any, parts: list[Any]) -> Any:
    if isinstance(value, Mapping):
        written: Any = copy.copy(value)
        for key, part in zip(value, parts, strict=True):
            written[key] = part
        return written
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*parts)
    if isinstance(value, (list, tuple)):
        return type(value)(parts)
    changed: Any = copy.copy(value)
    given = iter(parts)
    if _is_graph_data(value):
        for store in changed.stores:
            for key in list(store):
                store[key] = next(given)
        for owner, name in _numbers(changed):
            owner[name] = next(given)
        return changed
    for name in _attributes(value):
        object.__setattr__(changed, name, next(given))
    return changed


def _attributes(value: Any) -> list[str]:
    """Returns the names of an object's attributes, without those that its class keeps for itself."""
    own = [n for n, v in vars(value).items() if n.startswith("__") and n.endswith("__") and not isinstance(v, int)]
    return [n for n in vars(value) if n not in own]


def _is_graph_data(value: Any) -> bool:
    """Tells whether a value is PyTorch Geometric's ``Data`` or ``HeteroData``, or a batch of them."""
    return hasattr(value, "stores") and hasattr(value, "to_dict") and hasattr(value, "edge_stores")


def _of_graph_data(value: Any) -> Children:
    found: Children = []
    for store in value.stores:
        key = getattr(store, "_key", None)
        found.extend((f".{n}" if key is None else f"[{key!r}].{n}", v) for n, v in store.items())
    return [*found, *((f".{n}", owner[n]) for owner, n in _numbers(value))]


def _numbers(value: Any) -> list[tuple[dict[str, Any], str]]:
    """Returns where a batch keeps its number of graphs: in its own attributes, or in its store without a key."""
    owners = [vars(value), *(vars(s) for s in value.stores if getattr(s, "_key", None) is None)]
    return [(owner, n) for owner in owners for n, v in owner.items() if isinstance(v, int)]


def _holds_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth > _DEEPEST or isinstance(value, (str, bytes, nn.Module, type)):
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensors(v, depth + 1) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(v, depth + 1) for v in value)
    if dataclasses.is_dataclass(value) or (hasattr(value, "__dict__") and not callable(value)):
        return any(_holds_tensors(v, depth + 1) for v in vars(value).values())
    return False
