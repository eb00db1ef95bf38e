"""Writes the gradient of a slice that takes everything as a copy of the incoming gradient.

Indexing such as ``features[:, :1]`` slices the first dimension from 0 to the largest integer if its size is symbolic.
As the gradient of that slice, torch copies into a tensor of zeros, up to that same end. Inductor refuses the end with
:func:`~.torch_internals.any_size`, as no symbolic size is known to be smaller, unless one of its passes has removed the
copy; and these leave copies alone that change strides.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor
from torch._decomp.decompositions import slice_backward


def gradient_of_slice(gradient: Tensor, sizes: list[Any], dim: int, start: Any, end: Any, step: Any) -> Any:
    """Decomposes ``aten.slice_backward``.

    Args:
        gradient: gradient of the slice.
        sizes: sizes of the tensor that was sliced, whose gradient is returned.
        dim: the dimension that was sliced.
        start: the first row of the slice.
        end: the row after its last; :data:`sys.maxsize` for all rows.
        step: distance of its rows.
    """
    if all(isinstance(value, int) for value in (start, end, step)) and (start, end, step) == (0, sys.maxsize, 1):
        return gradient.clone()  # not the gradient itself, to which autograd gives a history of its own
    return slice_backward(gradient, sizes, dim, start, end, step)
