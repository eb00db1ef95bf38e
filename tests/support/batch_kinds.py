"""Batches of the kinds that packages have: with entries, attributes, slots, tuples or stores."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

Batch = dict[str, Tensor]


class CallableBatch:
    """Has a ``__call__`` that iterates over entries, as old PyTorch Geometric and fairchem have."""

    def __init__(self, entries: Batch) -> None:
        self.__dict__.update(entries)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def __call__(self, *keys: str) -> Iterator[tuple[str, Any]]:
        yield from ((k, self[k]) for k in keys)


class RegistryBatch:
    """Keeps a set of its keys."""

    def __init__(self, entries: Batch) -> None:
        self.__keys__ = set(entries)
        self.__dict__.update(entries)

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)

    def __setitem__(self, key: str, value: Any) -> None:
        setattr(self, key, value)
        self.__keys__.add(key)

    def __contains__(self, key: str) -> bool:
        return key in self.__keys__


class SlottedBatch:
    """Has no ``__dict__``."""

    __slots__ = ("entries", "extra")

    def __init__(self, entries: Batch) -> None:
        self.entries, self.extra = entries, {"edges": entries.pop("edge_index")}

    def __getitem__(self, key: str) -> Any:
        return self.extra["edges"] if key == "edge_index" else self.entries[key]


class Graphs(NamedTuple):
    """Entries of nodes, and of edges, which the forward writes to."""

    nodes: Batch
    edges: Batch


class Store(UserDict[str, Any]):
    """Entries of a graph; numbers that describe a batch are attributes of it."""


class GraphBatch:
    """A batch as PyTorch Geometric has it, with its number of graphs as an attribute of its store."""

    edge_stores: tuple[Store, ...] = ()

    def __init__(self, entries: Batch) -> None:
        self._store = Store(entries)
        self._store._num_graphs = len(entries["energy"])

    @property
    def stores(self) -> list[Store]:
        """The only store."""
        return [self._store]

    @property
    def num_graphs(self) -> Any:
        """The number of structures."""
        return self._store._num_graphs

    def to_dict(self) -> Batch:
        """The entries."""
        return dict(self._store)

    def __getitem__(self, key: str) -> Any:
        return self._store[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._store[key] = value

    def __copy__(self) -> GraphBatch:
        changed = GraphBatch(dict(self._store))
        changed._store._num_graphs = self._store._num_graphs
        return changed
