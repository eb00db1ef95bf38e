"""Writes products of many small matrices as sums of pointwise products, which inductor fuses with what is around them.

Tensor products and rotations of equivariant potentials multiply a few numbers with a few numbers, for each edge.
Libraries of matrix products are slow at this, and write every result to memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MOST_TERMS = 9
"""The longest sum that is written out: over the components of a feature of degrees up to 2."""
LARGEST = 2048
"""The most numbers of one resulting matrix."""
_HALF = (torch.float16, torch.bfloat16)  # libraries add these up in float32


def products_of_small_matrices(first: Tensor, second: Tensor) -> Any:
    """Decomposes ``aten.bmm`` where the matrices are small.

    Args:
        first: matrices, shape ``[n, a, b]``.
        second: matrices, shape ``[n, b, c]``.

    Returns:
        The products, shape ``[n, a, c]``, contiguous; ``NotImplemented`` for larger matrices and for those of symbolic
        size.
    """
    num_rows, num_terms = first.shape[1:]
    num_columns = second.shape[2]
    if not all(isinstance(size, int) for size in (num_rows, num_terms, num_columns)):
        return NotImplemented
    if not 0 < num_terms <= MOST_TERMS or num_rows * num_columns > LARGEST or first.dtype in _HALF:
        return NotImplemented
    result = first[:, :, :1] * second[:, :1]
    for i in range(1, num_terms):
        result = torch.addcmul(result, first[:, :, i : i + 1], second[:, i : i + 1])
    return result.contiguous()  # as the result of aten.bmm is, of which programs take views
