"""Defines the angular part of messages: spherical harmonics and their Clebsch-Gordan coupling to features.

Features of degree up to l_max are (N, I, F) tensors of I = (l_max + 1)² components, ordered by degree, and F channels.
All features of degree l have the parity (-1)^l of the spherical harmonics.
"""

from itertools import product

import torch
from torch import Tensor, nn

from lightning_januspipe.models import e3nn_compat


def num_components(l_max: int) -> int:
    """Returns the number of components (l_max + 1)² of the degrees 0 … l_max."""
    return (l_max + 1) ** 2


def degree_of_component(l_max: int) -> Tensor:
    """Returns the degree of each component, (I,) int64: 0, 1, 1, 1, 2, …."""
    return torch.repeat_interleave(torch.arange(l_max + 1), 2 * torch.arange(l_max + 1) + 1)


class SphericalHarmonics(nn.Module):
    """Evaluates real spherical harmonics of degree 0 … l_max in e3nn's basis, with squared norm 2 l + 1 per degree.

    Degree l + 1 is the coupling of degree l with the direction, which takes two operations per degree.

    Args:
        l_max: Highest degree.

    Example:
        >>> SphericalHarmonics(l_max=2)(torch.tensor([[0.0, 1.0, 0.0]])).shape
        torch.Size([1, 9])
    """

    def __init__(self, l_max: int) -> None:
        super().__init__()
        self.l_max = l_max
        reference = torch.tensor([0.48, 0.60, 0.64])  # a unit vector on no nodal plane of low degree
        for degree in range(2, l_max + 1):
            coupling = e3nn_compat.wigner_3j(degree - 1, 1, degree).flatten(0, 1)
            lower = e3nn_compat.spherical_harmonics(degree - 1, reference)
            raw = torch.outer(lower, reference).flatten() @ coupling
            exact = e3nn_compat.spherical_harmonics(degree, reference)
            self.register_buffer(f"coupling_{degree}", coupling * (raw @ exact / (raw @ raw)), persistent=False)

    def forward(self, directions: Tensor) -> Tensor:
        """Evaluates all degrees.

        Args:
            directions: (E, 3) unit vectors. A zero vector gives zeros from degree 1 on.

        Returns:
            (E, I) harmonics.
        """
        degrees = [torch.ones_like(directions[:, :1])]
        if self.l_max >= 1:
            degrees.append(3**0.5 * directions)
        for degree in range(2, self.l_max + 1):
            pairs = degrees[-1].unsqueeze(-1) * directions.unsqueeze(-2)
            degrees.append(pairs.flatten(1) @ self.get_buffer(f"coupling_{degree}"))
        return torch.cat(degrees, dim=-1)


class Coupling(nn.Module):
    """Computes the Clebsch-Gordan coupling of spherical harmonics with features, as one matrix per edge.

    A path (l1, l2, l) couples features of degree l1 with harmonics of degree l2 to degree l. The matrix has one row for
    each output component of each path, ordered by degree l, component m and path, so that the coupled features of one
    degree are a (2 l + 1, paths) block. It depends on geometry only, and all layers of the same degrees share it.

    Args:
        l_in: Highest degree of the features.
        l_edge: Highest degree of the spherical harmonics.
        l_out: Highest degree of the result.
    """

    def __init__(self, l_in: int, l_edge: int, l_out: int) -> None:
        super().__init__()
        self.num_inputs = num_components(l_in)
        self.paths_per_degree: list[int] = []
        blocks = []
        for degree in range(l_out + 1):
            paths = [
                (l1, l2)
                for l1, l2 in product(range(l_in + 1), range(l_edge + 1))
                if abs(l1 - l2) <= degree <= l1 + l2 and (l1 + l2 + degree) % 2 == 0
            ]
            self.paths_per_degree.append(len(paths))
            assert paths, "harmonics must reach every output degree"
            block = torch.zeros(2 * degree + 1, len(paths), self.num_inputs, num_components(l_edge))
            for index, (l1, l2) in enumerate(paths):
                symbols = (2 * degree + 1) ** 0.5 * e3nn_compat.wigner_3j(l1, l2, degree)
                block[:, index, l1**2 : (l1 + 1) ** 2, l2**2 : (l2 + 1) ** 2] = symbols.permute(2, 0, 1)
            blocks.append(block.flatten(0, 1))
        # (harmonics, rows * inputs)
        self.register_buffer("symbols", torch.cat(blocks).flatten(0, 1).T.contiguous(), persistent=False)

    def forward(self, harmonics: Tensor) -> Tensor:
        """Contracts the (E, I_edge) harmonics to (E, rows, I_in) matrices."""
        return (harmonics @ self.get_buffer("symbols")).unflatten(-1, (-1, self.num_inputs))
