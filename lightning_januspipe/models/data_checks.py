"""Compares data with the potential and the loss: species, cutoff and labels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lightning_januspipe import keys

_OPTIONS = {keys.ENERGY: "energy_weight", keys.FORCES: "force_weight", keys.STRESS: "stress_weight"}


def check_data(potential: nn.Module, data: Any) -> None:
    """Refuses data whose species or task indices, or neighbour lists do not fit the potential.

    Args:
        potential: Its attributes ``species``, chemical symbols by species index, ``tasks``, names by task index, and
            ``cutoff`` in Å are compared, if they exist.
        data: A data module or dataset with the same attributes; a ``Subset`` or ``ConcatDataset`` of such datasets.

    Raises:
        ValueError: The species or tasks of the data are not the first ones of the potential, the data has no tasks
            where the potential has several, or its cutoff is smaller.
    """
    for part, _ in _parts(data):
        own, given = getattr(potential, "species", None), getattr(part, "species", None)
        if own is not None and given is not None and list(own)[: len(given)] != list(given):
            raise ValueError(
                f"the data has the species {list(given)} and the potential {list(own)}: a species must have the same "
                f"index in both. Give the data species={list(own)}, or train a potential for those of the data"
            )
        own, given = getattr(potential, "tasks", None), getattr(part, "tasks", None)
        if own is not None and given and list(own)[: len(given)] != list(given):
            raise ValueError(
                f"the data has the tasks {list(given)} and the potential {list(own)}: a task must have the same index "
                f"in both. Give the data tasks={list(own)}, or train a potential for those of the data"
            )
        if own is not None and len(own) > 1 and given is not None and not given:
            raise ValueError(
                f"the potential has the tasks {list(own)}, and the data none: give the data tasks={list(own)}, and "
                "each structure the name of its task as info['task']"
            )
        own, given = getattr(potential, "cutoff", None), getattr(part, "cutoff", None)
        if own is not None and given is not None and _as_number(given) < _as_number(own) * (1 - 1e-6):
            raise ValueError(
                f"the data has neighbour lists with cutoff={given} Å and the potential has cutoff={own} Å, so that "
                f"messages of neighbours would be missing. Give the data cutoff={own}"
            )


def check_labels(weights: Mapping[str, float], data: Any, what: str, *, required: bool) -> list[str]:
    """Compares the labels that a loss needs with those that a dataset has.

    Args:
        weights: Weight of the loss of each quantity.
        data: A dataset with ``count_labels(indices)``, as
            :class:`~lightning_januspipe.data.StructureDataset` has it, or a ``Subset`` or ``ConcatDataset`` of such
            datasets; nothing is known of others.
        what: Name of the data in messages, such as "training".
        required: Whether a quantity with a weight, but without any label, is an error.

    Returns:
        Warnings: quantities with a weight that some or all structures have no label of.

    Raises:
        ValueError: A quantity has a weight, and no structure has a label.
    """
    counts = [part.count_labels(indices) for part, indices in _parts(data) if hasattr(part, "count_labels")]
    warnings = []
    for quantity, option in _OPTIONS.items():
        if not counts or not weights.get(quantity, 0.0):
            continue
        total = sum(count.num_structures for count in counts)
        present, missing = (sum(getattr(c, s)[quantity] for c in counts) for s in ("present", "missing"))
        name = counts[0].names[quantity]
        if not present and required:
            possible = "" if missing else ", because none has a volume" if quantity == keys.STRESS else ""
            raise ValueError(
                f"{option}={weights[quantity]:g}, but none of the {total} {what} structures has a {quantity} label "
                f"{name!r}{possible}. Keys found: {counts[0].available}. Set {quantity}_key of the data to the one "
                f"that holds the {quantity}, or {option}=0"
            )
        if not present:
            warnings.append(f"no {what} structure has a {quantity} label {name!r}: losses there are without it")
        elif missing:
            warnings.append(
                f"{missing} of {total} {what} structures have no {quantity} label {name!r}: their {quantity} is left "
                "out of losses and errors"
            )
    return warnings


def describe_unused_labels(weights: Mapping[str, float], data: Any) -> list[str]:
    """Describes labels of training structures that the loss gives no weight; for the arguments see `check_labels`."""
    counts = [part.count_labels(indices) for part, indices in _parts(data) if hasattr(part, "count_labels")]
    total, lines = sum(count.num_structures for count in counts), []
    for quantity, option in _OPTIONS.items():
        present = sum(count.present[quantity] for count in counts)
        if present and not weights.get(quantity, 0.0):
            lines.append(
                f"{present} of {total} training structures have a {quantity} label, which the loss does not use with "
                f"{option}=0"
            )
    return lines


def _parts(data: Any) -> list[tuple[Any, Sequence[int] | None]]:
    """Returns the datasets that data consists of, and which of their samples it has; None for all."""
    if not hasattr(data, "species") and hasattr(data, "datasets"):
        return [part for one in data.datasets for part in _parts(one)]
    if hasattr(data, "species") or not hasattr(data, "dataset") or callable(data.dataset):
        return [(data, None)]
    indices: Sequence[int] | None = getattr(data, "indices", None)
    found = []
    for part, inner in _parts(data.dataset):
        chosen = inner if indices is None else list(indices) if inner is None else [inner[i] for i in indices]
        found.append((part, chosen))
    return found


def _as_number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float, Tensor)) else math.nan
