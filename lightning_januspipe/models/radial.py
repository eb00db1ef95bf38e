"""Defines the radial part of messages: a Bessel basis with a smooth cutoff, and a network from it to weights."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PolynomialCutoff(nn.Module):
    """Evaluates the polynomial envelope of DimeNet (arXiv 2003.03123, eq. 8): 1 at r = 0, and 0 from the cutoff on.

    It is ``exponent - 1`` times continuously differentiable at zero and twice at the cutoff.

    Args:
        cutoff: Cutoff radius in Å.
        exponent: The exponent p; larger values decay later.

    Raises:
        ValueError: ``cutoff`` is not positive or ``exponent`` is below 2.
    """

    def __init__(self, cutoff: float, exponent: int = 6) -> None:
        super().__init__()
        if cutoff <= 0:
            raise ValueError(f"cutoff must be a positive length in Å, got {cutoff}")
        if exponent < 2:
            raise ValueError(f"the exponent of the cutoff must be at least 2 for smooth forces, got {exponent}")
        self.cutoff = float(cutoff)
        self.exponent = exponent

    def forward(self, lengths: Tensor) -> Tensor:
        """Evaluates the envelope at ``lengths`` (...) in Å."""
        p = self.exponent
        x = (lengths / self.cutoff).clamp(max=1.0)
        polynomial = (p + 1) * (p + 2) / 2 - p * (p + 2) * x + p * (p + 1) / 2 * x * x
        return 1.0 - x.pow(p) * polynomial


class BesselBasis(nn.Module):
    """Evaluates radial Bessel functions under a polynomial cutoff (DimeNet, arXiv 2003.03123, eq. 7).

    Args:
        num_bessel: Number of functions n = 1 … num_bessel.
        cutoff: Cutoff radius in Å.
        exponent: Exponent of the :class:`PolynomialCutoff`.
        trainable: Train the frequencies, whose initial values are n π.

    Raises:
        ValueError: ``num_bessel`` is not positive, or the cutoff is not valid.

    Example:
        >>> basis = BesselBasis(num_bessel=8, cutoff=5.0)
        >>> basis(torch.tensor([1.0, 2.5, 5.0])).shape
        torch.Size([3, 8])
    """

    def __init__(self, num_bessel: int, cutoff: float, exponent: int = 6, trainable: bool = False) -> None:
        super().__init__()
        if num_bessel < 1:
            raise ValueError(f"num_bessel must be at least 1, got {num_bessel}")
        self.envelope = PolynomialCutoff(cutoff, exponent)
        frequencies = torch.empty(num_bessel, dtype=torch.get_default_dtype())
        self.frequencies: Tensor
        if trainable:
            self.frequencies = nn.Parameter(frequencies)
        else:
            self.register_buffer("frequencies", frequencies)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the frequencies to n π."""
        with torch.no_grad():
            n = torch.arange(1, len(self.frequencies) + 1, dtype=self.frequencies.dtype, device=self.frequencies.device)
            self.frequencies.copy_(torch.pi * n)

    def forward(self, lengths: Tensor) -> Tensor:
        """Evaluates the basis.

        Args:
            lengths: (E,) edge lengths in Å, none of them zero.

        Returns:
            (E, num_bessel) values, dimensionless.
        """
        x = (lengths / self.envelope.cutoff).unsqueeze(-1)
        # sqrt(2/3) sin(n π x) / x has a mean square of 1 over the cutoff sphere.
        return (2 / 3) ** 0.5 * torch.sin(self.frequencies * x) * (self.envelope(lengths).unsqueeze(-1) / x)


class RadialNetwork(nn.Module):
    """Maps the radial basis to the weights of messages by a perceptron without biases.

    Without biases the weights vanish at the cutoff, as the basis does.

    Args:
        num_inputs: Number of radial basis functions.
        hidden: Widths of the hidden layers.
        num_outputs: Number of weights per edge.

    Raises:
        ValueError: A width is not positive.
    """

    def __init__(self, num_inputs: int, hidden: Sequence[int], num_outputs: int) -> None:
        super().__init__()
        widths = [num_inputs, *hidden, num_outputs]
        if min(widths) < 1:
            raise ValueError(f"the radial network needs positive widths, got {widths}; check radial_hidden")
        self.linears = nn.ModuleList([nn.Linear(i, o, bias=False) for i, o in pairwise(widths)])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weights of all layers."""
        from lightning_januspipe.models.e3nn_compat import second_moment_gain

        gain = second_moment_gain(F.silu)
        for index, linear in enumerate(self.linears):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=(gain if index else 1.0) * linear.in_features**-0.5)

    def forward(self, basis: Tensor) -> Tensor:
        """Maps the (E, num_inputs) basis to (E, num_outputs) weights."""
        first, *others = self.linears
        weights = first(basis)
        for linear in others:
            weights = linear(F.silu(weights))
        return weights
