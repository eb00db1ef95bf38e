"""Takes constants from e3nn (0.4.4 or newer): Wigner 3j symbols, spherical harmonics and activation norms.

The models use none of e3nn's modules, because these are generated code: e3nn 0.4 compiles them with TorchScript, again
whenever a module is copied or pickled, and always for the spherical harmonics. A traced TorchScript function contains
the sizes of the traced batch, so a graph captured from it computes wrong energies on other batches without an error.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

# e3nn 0.4 stores slices in its constants file, which torch >= 2.6 refuses to load by default.
with torch.serialization.safe_globals([slice]):
    from e3nn import math, o3


def wigner_3j(l1: int, l2: int, l3: int) -> Tensor:
    """Returns real Wigner 3j symbols in e3nn's convention, with Frobenius norm 1.

    Returns:
        (2 l1 + 1, 2 l2 + 1, 2 l3 + 1) tensor of the default dtype.
    """
    return o3.wigner_3j(l1, l2, l3, dtype=torch.float64).to(torch.get_default_dtype())


def spherical_harmonics(degree: int, vectors: Tensor) -> Tensor:
    """Evaluates real spherical harmonics of one degree l in e3nn's basis, with squared norm 2 l + 1.

    It must not be called in a traced forward.

    Args:
        degree: The degree l.
        vectors: (..., 3) vectors of any non-zero length.

    Returns:
        (..., 2 l + 1) tensor.
    """
    return o3.spherical_harmonics(degree, vectors, normalize=True, normalization="component")


@cache
def second_moment_gain(activation: Callable[[Tensor], Tensor]) -> float:
    """Returns the factor that gives ``activation`` of a standard normal variable a second moment of 1."""
    return float(math.normalize2mom(activation).cst)
