"""Reads the sizes and costs of samples from a dataset that knows them without making the samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from lightning_januspipe.loader.packing import ATOM_WEIGHT
from lightning_januspipe.loader.sample_fields import ATOM_FIELDS, EDGE_FIELDS

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class SampleSizes:
    """Holds the sizes of all samples of a dataset.

    Attributes:
        atoms: (n,) numbers of atoms; None if they are not known.
        edges: (n,) numbers of edges, which may be estimates; None if they are not known.

    Raises:
        ValueError: The two have different lengths.
    """

    atoms: Floats | None
    edges: Floats | None

    def __post_init__(self) -> None:
        if self.atoms is not None and self.edges is not None and len(self.atoms) != len(self.edges):
            raise ValueError(
                f"{len(self.atoms)} numbers of atoms, but {len(self.edges)} of edges; expected both for each sample"
            )

    def costs(self) -> Floats | None:
        """Returns the (n,) work of the samples (see :func:`~lightning_januspipe.loader.packing.work`)."""
        if self.atoms is None or self.edges is None:
            return self.atoms if self.edges is None else self.edges
        return self.edges + ATOM_WEIGHT * self.atoms


def sample_sizes(dataset: Any) -> SampleSizes | None:
    """Returns the sizes of all samples; None if the dataset does not know them.

    Args:
        dataset: A dataset with a method ``sample_sizes() -> (atoms, edges)``, which returns two sequences of n numbers
            or None for either; PyG's ``InMemoryDataset``; or a ``Subset`` or ``ConcatDataset`` of such.

    Raises:
        ValueError: The dataset returns another number of sizes than it has samples.
    """
    if callable(getattr(dataset, "sample_sizes", None)):
        found = SampleSizes(*(None if s is None else np.asarray(s, dtype=np.float64) for s in dataset.sample_sizes()))
    elif isinstance(dataset, Subset):
        inner = sample_sizes(dataset.dataset)
        chosen = np.asarray(dataset.indices, dtype=np.int64)
        found = SampleSizes(*_each(inner, lambda sizes: sizes[chosen]))
    elif isinstance(dataset, ConcatDataset):
        parts = [sample_sizes(d) or SampleSizes(None, None) for d in dataset.datasets]
        found = SampleSizes(_joined([p.atoms for p in parts]), _joined([p.edges for p in parts]))
    else:
        found = _from_slices(dataset)
    for sizes in (found.atoms, found.edges):
        _check_length(dataset, sizes, "sample_sizes")
    return None if found.atoms is None and found.edges is None else found


def sample_costs(dataset: Any) -> Floats | None:
    """Returns the (n,) work of the samples, in any unit; None if the dataset does not know it.

    Args:
        dataset: A dataset with a method ``sample_costs()`` that returns n numbers, or with sizes that
            :func:`sample_sizes` finds; or a ``Subset`` or ``ConcatDataset`` of such.

    Raises:
        ValueError: The dataset returns another number of costs than it has samples.
    """
    costs: Floats | None
    if callable(getattr(dataset, "sample_costs", None)):
        given = dataset.sample_costs()
        costs = None if given is None else np.asarray(given, dtype=np.float64)
        _check_length(dataset, costs, "sample_costs")
        return costs
    if isinstance(dataset, Subset):
        inner = sample_costs(dataset.dataset)
        return None if inner is None else inner[np.asarray(dataset.indices, dtype=np.int64)]
    sizes = sample_sizes(dataset)  # edges of a ConcatDataset count only if all parts know theirs
    if sizes is None and isinstance(dataset, ConcatDataset):
        return _joined([sample_costs(d) for d in dataset.datasets])
    return None if sizes is None else sizes.costs()


def _from_slices(dataset: Any) -> SampleSizes:
    """Returns the sizes of PyG's in-memory datasets: one large graph, and the rows where each sample begins."""
    slices = getattr(dataset, "slices", None)
    if not isinstance(slices, Mapping):
        return SampleSizes(None, None)
    indices = dataset.indices() if callable(getattr(dataset, "indices", None)) else None

    def first(names: tuple[str, ...]) -> Floats | None:
        for name in names:
            if name in slices and not isinstance(slices[name], Mapping):
                sizes = np.diff(np.asarray(slices[name], dtype=np.float64))
                return sizes if indices is None else sizes[np.asarray(list(indices), dtype=np.int64)]
        return None

    return SampleSizes(first(ATOM_FIELDS), first(EDGE_FIELDS))


def _each(sizes: SampleSizes | None, function: Callable[[Floats], Floats]) -> list[Floats | None]:
    found = (None, None) if sizes is None else (sizes.atoms, sizes.edges)
    return [None if s is None else function(s) for s in found]


def _joined(parts: list[Floats | None]) -> Floats | None:
    known = [p for p in parts if p is not None]
    return np.concatenate(known) if known and len(known) == len(parts) else None


def _check_length(dataset: Any, sizes: Floats | None, name: str) -> None:
    if sizes is not None and sizes.shape != (len(dataset),):
        raise ValueError(
            f"{type(dataset).__name__}.{name}() returned numbers of shape {sizes.shape}; expected ({len(dataset)},), "
            "one for each sample"
        )
