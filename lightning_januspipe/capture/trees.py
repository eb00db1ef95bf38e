"""Treats batches of any project as trees: dicts, lists, tuples, dataclasses, PyTorch Geometric data, plain objects.

No class is registered and no package imported: the attributes of an object tell how to walk through it. Callable
objects are containers too, if they hold tensors; functions, classes and modules are always leaves.
"""

from __future__ import annotations

import copy
import functools
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Children = list[tuple[str, Any]]

_DEEPEST = 8  # objects inside objects that are searched for tensors
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType, functools.partial)
_NUMBERS = (int, float, complex, torch.SymInt, torch.SymFloat, torch.SymBool)
_LEAVES = (Tensor, nn.Module, str, bytes, type(None), type, *_NUMBERS, *_FUNCTIONS)
_MUTABLE_LEAVES = (set, bytearray)


def children(value: Any) -> Children | None:
    """Returns the parts of a container by their place in it; None for a leaf.

    An object without tensors inside is a leaf, whatever it is.
    """
    if isinstance(value, _LEAVES):
        return None
    if isinstance(value, Mapping):
        return [(f"[{k!r}]", v) for k, v in value.items()]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{n}", v) for n, v in zip(value._fields, value, strict=True)]
    if isinstance(value, (list, tuple)):
        return [(f"[{i}]", v) for i, v in enumerate(value)]
    if _is_graph_data(value):
        return _of_graph_data(value)
    if _is_object(value) and _holds_tensors(value, 0):
        held = _held(value)
        return [(f".{n}", held[n]) for n in _attributes(held)]
    return None


def leaves(value: Any, place: str = "", within: tuple[int, ...] = ()) -> Children:
    """Returns the leaves of a tree by their place, such as ``[0]['positions']`` or ``[0].edge_index``.

    Args:
        value: the tree.
        place: the place of the tree itself.
        within: ids of the containers around the tree; a container inside itself is a leaf.
    """
    parts = children(value) if id(value) not in within else None
    if parts is None:
        return [(place, value)]
    around = (*within, id(value))
    return [leaf for key, part in parts for leaf in leaves(part, place + key, around)]


def with_leaves(value: Any, replace: Callable[[str, Any], Any], place: str = "", within: tuple[int, ...] = ()) -> Any:
    """Returns the tree with other leaves; containers are copied, so that writing to them does not reach the original.

    Args:
        value: the tree.
        replace: from a leaf's place and value to its new value.
        place: the place of the tree itself.
        within: ids of the containers around the tree; a container inside itself is a leaf.
    """
    parts = children(value) if id(value) not in within else None
    if parts is None:
        leaf = replace(place, value)
        return copy.copy(leaf) if isinstance(leaf, _MUTABLE_LEAVES) else leaf
    around = (*within, id(value))
    return _rebuilt(value, [with_leaves(part, replace, place + key, around) for key, part in parts])


def copied(batch: Any) -> Any:
    """Returns a copy of a batch whose containers, at any depth, a step can write to; its leaves are shared.

    An object without tensors is copied only if it is the batch itself, or an entry of a list that is the batch.
    """
    outer = re.compile(r"(\[\d+\])*")

    def replace(place: str, leaf: Any) -> Any:
        return copy.copy(leaf) if _is_object(leaf) and outer.fullmatch(place) else leaf

    return with_leaves(batch, replace)


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
    held = _held(value)
    names = set(_attributes(held))
    for name, part in held.items():
        object.__setattr__(changed, name, next(given) if name in names else copied(part))
    return changed


def _is_object(value: Any) -> bool:
    has_attributes = hasattr(value, "__dict__") or any("__slots__" in vars(c) for c in type(value).__mro__)
    return has_attributes and not isinstance(value, _LEAVES)


def _held(value: Any) -> dict[str, Any]:
    """Returns the attributes of an object by name, from its ``__dict__`` and its slots."""
    slots = (c.__dict__.get("__slots__", ()) for c in reversed(type(value).__mro__))
    names = [n for of_class in slots for n in ([of_class] if isinstance(of_class, str) else of_class)]
    own = {n: getattr(value, n) for n in names if n not in ("__dict__", "__weakref__") and hasattr(value, n)}
    return {**own, **getattr(value, "__dict__", {})}


def _attributes(held: Mapping[str, Any]) -> list[str]:
    """Returns the names of attributes without those that a class keeps for itself, such as offsets of a batch."""
    own = [n for n, v in held.items() if n.startswith("__") and n.endswith("__") and not isinstance(v, int)]
    return [n for n in held if n not in own]


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
    return [(owner, n) for owner in owners for n, v in owner.items() if isinstance(v, (int, torch.SymInt))]


def _holds_tensors(value: Any, depth: int) -> bool:
    if isinstance(value, Tensor):
        return True
    if depth > _DEEPEST or isinstance(value, _LEAVES):
        return False
    if isinstance(value, Mapping):
        return any(_holds_tensors(v, depth + 1) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(_holds_tensors(v, depth + 1) for v in value)
    return _is_object(value) and any(_holds_tensors(v, depth + 1) for v in _held(value).values())
