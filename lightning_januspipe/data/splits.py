"""Splits the structures of one file into training, validation and test data."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val", "test", "predict"]


def split_indices(
    num_structures: int,
    *,
    train: int | float | None = None,
    val: int | float | None = None,
    test: int | float | None = None,
    seed: int = 0,
    kinds: Sequence[Hashable] | None = None,
) -> dict[Split, list[int]]:
    """Splits structures at random into disjoint sets; the same arguments give the same split in every process.

    Args:
        num_structures: Number of structures to split.
        train: Number (int) or fraction (float, rounded to the nearest number) for training; None for the rest.
        val: Number or fraction for validation; None for none.
        test: Number or fraction for testing; None for none.
        seed: Seed of the permutation.
        kinds: Kind of each structure. Every split gets its share of each kind, and a single structure of a kind is
            trained on. None: structures are chosen at random.

    Returns:
        Sorted indices of ``"train"``, ``"val"`` and ``"test"``.

    Raises:
        ValueError: A size is neither a number nor a fraction, a fraction is no whole structure, the sizes exceed the
            number of structures, or nothing is left to train on.
    """
    for name, size in (("train", train), ("val", val), ("test", test)):
        check_size(name, size)
    num_val, num_test = _count("val", val, num_structures), _count("test", test, num_structures)
    num_train = num_structures - num_val - num_test if train is None else _count("train", train, num_structures)
    if num_train < 1 or num_train + num_val + num_test > num_structures:
        raise ValueError(
            f"cannot split {num_structures} structures into train={train}, val={val}, test={test}: "
            f"{max(num_train, 0)} + {num_val} + {num_test} must not be more than {num_structures}, with at least one "
            "to train on"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(num_structures)
    if kinds is not None:
        order = _spread_evenly(order, kinds, rng)
    # Validation and test come first, so that a smaller training set keeps them.
    parts = np.split(order, np.cumsum([num_val, num_test, num_train]))
    val_part, test_part, train_part = (sorted(part.tolist()) for part in parts[:3])
    return {"train": train_part, "val": val_part, "test": test_part}


def check_size(name: str, size: int | float | None) -> None:
    """Refuses the size of a split that is neither a number of structures nor a fraction.

    Raises:
        ValueError: ``size`` is not None, an int of at least 0, or a float of at least 0 and below 1.
    """
    is_count = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    is_fraction = isinstance(size, float) and 0 <= size < 1
    if name == "train_size" and isinstance(size, float) and size == 1:
        raise ValueError(
            f"{name}=1.0 may be one structure or all of them: leave it out (null in a recipe) for all that the other "
            "splits leave; a command line reads 1 as 1.0, so that one structure is for Python only"
        )
    if size is not None and not is_count and not is_fraction:
        raise ValueError(f"{name}={size!r}; expected a number of structures (int) or a fraction below 1 (float)")


def as_count(name: str, size: int | float | None) -> int | float | None:
    """Returns the size of a split, as an int where it is a whole float.

    Command lines may read ``2`` as a float, as ``typing`` keeps unions in the order in which they were first written.
    ``train_size=1.0`` stays, because it may be meant as all structures.
    """
    least = 2 if name == "train_size" else 1
    return int(size) if isinstance(size, float) and size.is_integer() and size >= least else size


def _count(name: str, size: int | float | None, total: int) -> int:
    if size is None:
        return 0
    count = round(size * total) if isinstance(size, float) else size
    if size and not count:
        raise ValueError(f"{name}={size} of {total} structures is less than one; give a larger fraction or a number")
    return count


def _spread_evenly(order: NDArray[np.int64], kinds: Sequence[Hashable], rng: np.random.Generator) -> NDArray[np.int64]:
    """Sorts structures so that every beginning of the list has about its share of each kind."""
    groups: dict[Hashable, list[int]] = {}
    for index in order.tolist():
        groups.setdefault(kinds[index], []).append(index)
    places = np.empty(len(order))
    for group in groups.values():
        places[group] = 2.0 if len(group) == 1 else (np.arange(len(group)) + rng.random()) / len(group)
    return np.argsort(places, kind="stable")
