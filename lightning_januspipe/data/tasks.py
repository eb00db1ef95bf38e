"""Reads task, charge and spin of structures, for potentials that are trained on several tasks at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_januspipe import keys

NAMES = (keys.TASK, keys.CHARGE, keys.SPIN)
"""Names in ``Atoms.info`` of what :func:`read_task` reads."""


def validate_tasks(tasks: Sequence[str] | None) -> list[str]:
    """Returns the names of tasks as a list, which is empty where there are none.

    Raises:
        ValueError: ``tasks`` is no list of distinct names.
    """
    if isinstance(tasks, str) or (tasks is not None and len(set(tasks)) != len(tasks)):
        raise ValueError(f"tasks={tasks!r}; expected a list of distinct names")
    return list(tasks or ())


def read_task(info: Mapping[str, Any], tasks: Sequence[str], source: str) -> dict[str, Tensor]:
    """Returns task index, charge and spin of a structure, each (1,).

    Args:
        info: ``Atoms.info`` of the structure: the name of its ``task``, which may be missing where there is only one;
            ``charge`` in elementary charges, and ``spin``, the number of unpaired electrons, which are 0 where they are
            missing.
        tasks: Names of tasks in the order of the task index.
        source: Name of the structure in error messages.

    Raises:
        ValueError: The task is missing or unknown, or charge or spin is no integer.
    """
    names = list(tasks)
    name = info.get(keys.TASK, names[0] if len(names) == 1 else None)
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"{source} has info['task']={name!r}; expected one of {names}")
    found = {keys.TASK: torch.tensor([names.index(name)])}
    for key in (keys.CHARGE, keys.SPIN):
        value = info.get(key, 0)
        if not isinstance(value, (int, float, np.number)) or value != int(value):
            raise ValueError(f"{source} has info[{key!r}]={value!r}; expected an integer")
        found[key] = torch.tensor([int(value)])
    return found
