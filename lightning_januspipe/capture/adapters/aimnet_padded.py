"""Turns padded batches of AIMNet2, (B, N, ...), into packed ones, (B * N + 1, ...), and what is returned back again.

Graph ranks share rows of atoms, which padded batches do not have. A packed batch has a matrix of neighbours: here all
other atoms of the same molecule, as in a padded batch. Its last row is padding, as AIMNet2 asks for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PADDING = "is_padding"
"""The entry of a packed batch that was padded: (B * N + 1,) tells which rows are padding."""

_LAST = "is_last"
"""The entry that tells which row is the last one."""

_NOT_PADDED = ("nbmat", "mol_idx", "_num_mol", PADDING, _LAST)
_COUNTS = ("_natom", "mol_sizes")


def is_padded(data: Any) -> bool:
    """Tells whether the argument of AIMNet2 is a padded batch without matrices of neighbours."""
    return isinstance(data, dict) and "nbmat" not in data and "coord" in data and data["coord"].dim() == 3


def packed(data: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a padded batch of B molecules of N atoms as a packed batch.

    Args:
        data: ``coord`` (B, N, 3), ``numbers`` (B, N) with 0 for padding, and entries of the molecules.
    """
    numbers = data["numbers"]
    (num, size), device = numbers.shape, numbers.device
    last, is_padding = num * size, numbers == 0
    rows = torch.arange(last, device=device).reshape(num, 1, size).expand(-1, size, -1)
    is_itself = torch.eye(size, dtype=torch.bool, device=device)
    neighbors = rows.masked_fill(is_itself | is_padding[:, None] | is_padding[:, :, None], last)
    molecules = torch.arange(num, device=device).repeat_interleave(size)
    added = {
        "nbmat": torch.cat([neighbors.flatten(0, 1), neighbors.new_full((1, size), last)]),
        "mol_idx": torch.cat([molecules, molecules[-1:]]),
        PADDING: torch.cat([is_padding.flatten(), is_padding.new_ones(1)]),
        _LAST: torch.arange(last + 1, device=device) == last,
    }
    return {name: _flat(value, num, size) for name, value in data.items()} | added


def with_masks(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns a packed batch with the masks, and the numbers of atoms, that it has as a padded one."""
    sizes = torch.zeros_like(data["charge"], dtype=torch.int64)
    sizes = sizes.scatter_add(0, data["mol_idx"].long(), (~data[PADDING]).long())
    return data | {"mask_i": data[PADDING], "mask_ij_lr": data["mask_ij"], **dict.fromkeys(_COUNTS, sizes)}


def joined(returned: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what AIMNet2 returned for a padded batch, or for the packed batch made of it, in the order of names.

    Values of atoms, and of pairs of atoms, have (B * N + 1, ...) rows; the last one is zero. Numbers of atoms
    are given for each molecule.
    """
    if PADDING in returned:
        is_last = returned[_LAST]
        found = {name: _without(value, is_last) for name, value in returned.items() if name not in _NOT_PADDED}
        found["_nb_mode"] = torch.tensor(0)
    else:
        num, size = returned["coord"].shape[:2]
        found = {name: _flat(value, num, size) for name, value in returned.items()}
        found |= {name: found[name].expand(num) for name in _COUNTS}
        found["_input_padded"] = torch.tensor(True)
    return dict(sorted(found.items()))


def separated(data: Mapping[str, Tensor], returned: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what AIMNet2 returns for a padded batch; the inverse of :func:`joined`.

    Args:
        data: the padded batch.
        returned: what :func:`joined` returned; a value that the step does not read is no tensor.
    """
    num, size = data["numbers"].shape
    found = {name: _padded(value, num, size) for name, value in returned.items()}
    has_padding = (data["numbers"] == 0).any()
    found["_input_padded"] = has_padding
    if not has_padding:
        found |= {name: torch.tensor(size, device=has_padding.device) for name in _COUNTS}
    return found


def _flat(value: Any, num: int, size: int) -> Any:
    if not isinstance(value, Tensor) or value.shape[:2] != (num, size):
        return value
    return torch.cat([value.flatten(0, 1), value.new_zeros(1, *value.shape[2:])])


def _without(value: Any, is_last: Tensor) -> Any:
    if not isinstance(value, Tensor) or value.shape[:1] != is_last.shape:
        return value
    return value.masked_fill(is_last.view(-1, *[1] * (value.dim() - 1)), 0)


def _padded(value: Any, num: int, size: int) -> Any:
    if not isinstance(value, Tensor) or value.shape[:1] != (num * size + 1,):
        return value
    return value[:-1].unflatten(0, (num, size))
