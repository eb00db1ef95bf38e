"""What the models take from e3nn, for every e3nn from 0.4.4 on.

Only constants are taken: Wigner 3j symbols, reference spherical harmonics and activation norms. e3nn's own modules are
generated code: e3nn 0.4 compiles them with TorchScript, does so again whenever a module is copied or pickled, and
always for the spherical harmonics. A traced TorchScript function has the sizes of the traced batch baked in, so a graph
captured from it computes wrong energies on other batches without an error.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# e3nn 0.4 stores slices in its constants file, which torch >= 2.6 refuses to load by default.
with torch.serialization.safe_globals([slice]):
    from e3nn import math, o3  # type: ignore[import-untyped]


def wigner_3j(l1: int, l2: int, l3: int) -> Tensor:
    """Real Wigner 3j symbols in e3nn's convention, Frobenius norm 1.

    Returns:
        (2 l1 + 1, 2 l2 + 1, 2 l3 + 1) tensor of the default dtype.
    """
    return o3.wigner_3j(l1, l2, l3, dtype=torch.float64).to(torch.get_default_dtype())


def spherical_harmonics(degree: int, vectors: Tensor) -> Tensor:
    """Real spherical harmonics of one degree l in e3nn's basis, squared norm 2 l + 1. Not for use in a traced forward.

    Args:
        degree: The degree l.
        vectors: (..., 3) vectors of any non-zero length.

    Returns:
        (..., 2 l + 1) tensor.
    """
    return o3.spherical_harmonics(degree, vectors, normalize=True, normalization="component")


@cache
def second_moment_gain(activation: Callable[[Tensor], Tensor]) -> float:
    """The factor that gives ``activation`` of a standard normal variable a second moment of 1."""
    return float(math.normalize2mom(activation).cst)
