"""Keeps the size of a triangle of indices symbolic, which torch's own functions would make a constant."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_OF = {torch.triu_indices: torch.triu, torch.tril_indices: torch.tril}


class SymbolicTriangles(TorchFunctionMode):
    """Replaces ``torch.triu_indices`` and ``torch.tril_indices`` of symbolic sizes while a forward is traced."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _OF and any(isinstance(x, torch.SymInt) for x in (*args, *kwargs.values())):
            return _indices(_OF[func], *args, **kwargs)
        return func(*args, **kwargs)


def _indices(part: Any, row: int, col: int, offset: int = 0, device: Any = None, dtype: Any = None, **_: Any) -> Tensor:
    """Returns (2, n) rows and columns, sorted by rows and then by columns, as torch does."""
    found = part(torch.ones(row, col, dtype=torch.bool, device=device), offset).nonzero().mT
    return found if dtype is None else found.to(dtype)
