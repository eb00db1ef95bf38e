"""Defines the interaction layer of the equivariant potential: one round of messages between neighbouring atoms."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_januspipe.models.e3nn_compat import second_moment_gain
from lightning_januspipe.models.radial import RadialNetwork
from lightning_januspipe.models.spherical import degree_of_component, num_components


def _draw(weight: Tensor) -> None:
    """Draws a weight (…, inputs, outputs) such that outputs have the variance of inputs."""
    nn.init.normal_(weight, std=weight.shape[-2] ** -0.5)


class EquivariantLinear(nn.Module):
    """Applies a linear map to the channels, with one weight matrix for each degree.

    Args:
        l_max: Highest degree.
        num_features: Number of channels.
    """

    def __init__(self, l_max: int, num_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(l_max + 1, num_features, num_features))
        self.register_buffer("degrees", degree_of_component(l_max), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight."""
        _draw(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (N, I, F) features to (N, I, F)."""
        return torch.bmm(features.transpose(0, 1), self.weight[self.get_buffer("degrees")]).transpose(0, 1)


class Gate(nn.Module):
    """Applies SiLU to scalars, and multiplies every higher degree by a sigmoid of the scalars.

    Args:
        l_max: Highest degree.
        num_features: Number of channels.
    """

    def __init__(self, l_max: int, num_features: int) -> None:
        super().__init__()
        self.l_max = l_max
        self.num_features = num_features
        self.scalar_gain = second_moment_gain(F.silu)
        self.gate_gain = second_moment_gain(torch.sigmoid)
        if l_max:
            self.weight = nn.Parameter(torch.empty(num_features, l_max * num_features))
            self.register_buffer("degrees", degree_of_component(l_max)[1:] - 1, persistent=False)
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the weight, if there are higher degrees."""
        if self.l_max:
            _draw(self.weight)

    def forward(self, features: Tensor) -> Tensor:
        """Maps (N, I, F) features to (N, I, F)."""
        if not self.l_max:
            return self.scalar_gain * F.silu(features)
        scalars, others = features.split([1, num_components(self.l_max) - 1], dim=1)
        gates = self.gate_gain * torch.sigmoid(scalars.squeeze(1) @ self.weight)
        gates = gates.unflatten(-1, (self.l_max, self.num_features))
        return torch.cat([self.scalar_gain * F.silu(scalars), others * gates[:, self.get_buffer("degrees")]], dim=1)


class Interaction(nn.Module):
    """Exchanges one round of messages between neighbours, in the manner of NequIP (arXiv 2101.03164).

    The layer mixes the features, couples them with the spherical harmonics of each edge under weights from the radial
    network, sums over the neighbours and divides by their average number, mixes again, adds a species-dependent
    self-connection, applies the gate, and adds the input.

    Args:
        l_in: Highest degree of the input features.
        l_out: Highest degree of the output features.
        paths_per_degree: Number of coupling paths that lead to each output degree.
        num_features: Number of channels F.
        num_species: Number of species.
        num_bessel: Number of radial basis functions.
        radial_hidden: Widths of the radial network's hidden layers.
        avg_num_neighbors: Average number of neighbours of an atom.
    """

    def __init__(
        self,
        l_in: int,
        l_out: int,
        paths_per_degree: Sequence[int],
        num_features: int,
        num_species: int,
        num_bessel: int,
        radial_hidden: Sequence[int],
        avg_num_neighbors: float,
    ) -> None:
        super().__init__()
        assert len(paths_per_degree) == l_out + 1
        self.paths_per_degree = list(paths_per_degree)
        self.num_features = num_features
        self.message_scale = 1.0 / avg_num_neighbors
        # The self-connection and the residual act on the degrees that input and output share.
        self.num_shared = num_components(min(l_in, l_out))
        self.num_padded = num_components(l_out) - self.num_shared

        self.linear_up = EquivariantLinear(l_in, num_features)
        self.radial_network = RadialNetwork(num_bessel, radial_hidden, sum(paths_per_degree) * num_features)
        self.linear_down = nn.ParameterList(
            [torch.empty(num_paths * num_features, num_features) for num_paths in paths_per_degree]
        )
        self.species_scale = nn.Parameter(torch.empty(num_species, min(l_in, l_out) + 1, num_features))
        self.reset_parameters()
        self.register_buffer("degrees", degree_of_component(min(l_in, l_out)), persistent=False)
        self.self_connection = EquivariantLinear(min(l_in, l_out), num_features)
        self.gate = Gate(l_out, num_features)

    def reset_parameters(self) -> None:
        """Draws the weights that the layer itself has; its parts draw their own."""
        for weight in self.linear_down:
            _draw(weight)
        nn.init.ones_(self.species_scale)

    def forward(
        self, features: Tensor, species: Tensor, source: Tensor, target: Tensor, coupling: Tensor, radial_basis: Tensor
    ) -> Tensor:
        """Updates the features of all atoms.

        Args:
            features: (N, I_in, F) features.
            species: (N,) species index.
            source: (E,) index of the atom that sends along each edge.
            target: (E,) index of the atom that receives.
            coupling: (E, rows, I_in) coupling matrices.
            radial_basis: (E, num_bessel) radial basis.

        Returns:
            (N, I_out, F) features.
        """
        shared = features[:, : self.num_shared]
        scale = self.species_scale[species][:, self.get_buffer("degrees")]
        connection = self.pad(self.self_connection(shared * scale))
        updated = self.gate(self.messages(features, source, target, coupling, radial_basis) + connection)
        return updated + self.pad(shared)

    def pad(self, shared: Tensor) -> Tensor:
        """Adds zeros for the degrees that only the output has."""
        return F.pad(shared, (0, 0, 0, self.num_padded)) if self.num_padded else shared

    def messages(
        self, features: Tensor, source: Tensor, target: Tensor, coupling: Tensor, radial_basis: Tensor
    ) -> Tensor:
        """Sums the messages that arrive at each atom, (N, I_out, F)."""
        num_atoms = features.shape[0]
        coupled = torch.bmm(coupling, self.linear_up(features)[source])
        weights = self.radial_network(radial_basis).unflatten(-1, (-1, self.num_features))
        rows = [(2 * degree + 1) * paths for degree, paths in enumerate(self.paths_per_degree)]
        blocks = zip(coupled.split(rows, dim=1), weights.split(self.paths_per_degree, dim=1), strict=True)
        sums = []
        for degree, (block, weight) in enumerate(blocks):
            message = block.unflatten(1, (2 * degree + 1, -1)) * weight.unsqueeze(1)  # (E, 2 l + 1, paths, F)
            total = message.new_zeros(num_atoms, *message.shape[1:]).index_add(0, target, message)
            sums.append(total.flatten(2) @ self.linear_down[degree])
        return self.message_scale * torch.cat(sums, dim=1)
