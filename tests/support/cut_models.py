"""Hand-written potentials that a cut has to get right: shared filters, trainable bases, edge features, readouts."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from capture_models import DTYPE, Batch, Layer, Potential, Step, Traced, make_batch
from torch import Tensor, nn

# Several edges for each atom, so that what belongs to edges is much larger than what belongs to atoms.
BATCH = (8, 7)


def traced(potential: nn.Module) -> Traced:
    """Returns a traced potential, with sizes of :data:`BATCH`."""
    return Traced(Step(potential), make_batch(BATCH))


class EdgeNetworkLayer(Layer):
    """Most of its work is a network on each edge."""

    def __init__(self, width: int, filter_network: nn.Module | None = None) -> None:
        super().__init__(width, filter_network)
        sizes = [2 * width, 30, 30, width]
        layers = [module for a, b in pairwise(sizes) for module in (nn.Linear(a, b, dtype=DTYPE), nn.Tanh())]
        self.network = nn.Sequential(*layers)

    def forward(self, h: Tensor, radial: Tensor, edges: Tensor) -> Tensor:
        messages = self.network(torch.cat([h[edges[0]], h[edges[1]]], -1)) * self.filter(radial)
        return h + torch.tanh(self.mix(self.aggregate(h, edges[1], messages)))


class SharedFilters(Potential):
    """One network computes the filters of all layers, as in SchNetPack's PaiNN; each layer reads its columns.

    Args:
        num_layers: layers.
        hidden: whether the network has a hidden layer.
        how: ``split``, ``slice`` or ``chunk``.
    """

    layer = EdgeNetworkLayer

    def __init__(self, num_layers: int = 3, hidden: bool = True, how: str = "split") -> None:
        super().__init__(num_layers)
        width, self.how = 6, how
        for layer in self.layers:
            layer.filter = nn.Identity()
        outer = nn.Linear(width if hidden else 4, num_layers * width, dtype=DTYPE)
        inner = [nn.Linear(4, width, dtype=DTYPE), nn.SiLU()] if hidden else []
        self.filters = nn.Sequential(*inner, outer)

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))
        filters = self.filters(radial) * torch.exp(-distance)
        num = len(self.layers)
        if self.how == "split":
            parts = torch.split(filters, 6, -1)
        elif self.how == "chunk":
            parts = torch.chunk(filters, num, 1)
        else:
            parts = tuple(filters[:, 6 * i : 6 * i + 6] for i in range(num))
        h = self.embedding(batch["species"])
        for layer, part in zip(self.layers, parts, strict=True):
            h = layer(h, part, batch["edges"])
        return h


class WholeFilter(SharedFilters):
    """One filter for all layers: each reads all of it."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__(num_layers)
        self.filters = nn.Sequential(nn.Linear(4, 6, dtype=DTYPE), nn.SiLU(), nn.Linear(6, 6, dtype=DTYPE))

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))
        part = self.filters(radial)
        h = self.embedding(batch["species"])
        for layer in self.layers:
            h = layer(h, part, batch["edges"])
        return h


class LearnableBasis(Potential):
    """Trainable frequencies of the radial functions, which every layer reads."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__(num_layers)
        self.frequencies = nn.Parameter(torch.arange(1, 5, dtype=DTYPE))

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.sin(distance * self.frequencies) / (1.0 + distance)
        h = self.embedding(batch["species"])
        for layer in self.layers:
            h = layer(h, radial, batch["edges"])
        return h


class EdgeLayer(nn.Module):
    """Updates atoms and edges from each other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.of_edges = nn.Linear(3 * width, width, dtype=DTYPE)
        self.of_atoms = nn.Linear(width, width, dtype=DTYPE)

    def forward(self, h: Tensor, e: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        e = e + torch.tanh(self.of_edges(torch.cat([h[edges[0]], h[edges[1]], e], -1)))
        messages = torch.zeros_like(h).index_add(0, edges[1], e)
        return h + torch.tanh(self.of_atoms(messages)), e


class EdgeFeatures(Potential):
    """Features of edges go from layer to layer, as in MatRIS and CHGNet: they have to be sent."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__(num_layers)
        self.layers = nn.ModuleList(EdgeLayer(6) for _ in range(num_layers))
        self.basis = nn.Linear(4, 6, dtype=DTYPE)

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        e = self.basis(torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2)))
        h = self.embedding(batch["species"])
        for layer in self.layers:
            h, e = layer(h, e, batch["edges"])
        return h


class LongReadout(Potential):
    """A readout of many operations on one number for each atom."""

    def energy(self, batch: Any, positions: Tensor, strain: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        deformation = strain[batch["index"]]
        strained = positions + torch.einsum("ni,nij->nj", positions, 0.5 * (deformation + deformation.mT))
        h = self.features(batch, strained[batch["edges"][1]] - strained[batch["edges"][0]])
        value = self.readout(h)[:, 0]
        for _ in range(30):
            value = value + 0.01 * torch.tanh(value)
        return self.pool(value, batch), {"charges": self.charge(h)[:, 0]}


class DenseLayer(Layer):
    """Reads the features of all layers before it."""

    def forward(self, h: Tensor, radial: Tensor, edges: Tensor) -> Tensor:
        width = self.mix.out_features
        last = h[:, -width:]
        messages = (h.reshape(h.shape[0], -1, width).mean(1))[edges[0]] * self.filter(radial)
        return torch.cat([h, last + torch.tanh(self.mix(self.aggregate(last, edges[1], messages)))], 1)


class Dense(Potential):
    """Every layer reads the features of all layers before it, and the readout the last: boundaries grow."""

    layer = DenseLayer

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        return super().features(batch, vectors)[:, -6:]


class LateReadouts(Potential):
    """A readout of each layer, evaluated after all layers, as in MACE."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__(num_layers)
        self.readouts = nn.ModuleList(nn.Linear(6, 1, dtype=DTYPE) for _ in range(num_layers))

    def energy(self, batch: Any, positions: Tensor, strain: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        deformation = strain[batch["index"]]
        strained = positions + torch.einsum("ni,nij->nj", positions, 0.5 * (deformation + deformation.mT))
        vectors = strained[batch["edges"][1]] - strained[batch["edges"][0]]
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))
        h = self.embedding(batch["species"])
        found = []
        for layer in self.layers:
            h = layer(h, radial, batch["edges"])
            found.append(h)
        values = [readout(f)[:, 0] for readout, f in zip(self.readouts, found, strict=True)]
        return self.pool(torch.stack(values).sum(0), batch), {"charges": self.charge(h)[:, 0]}


class AtomNetwork(Potential):
    """Fixed descriptors of atoms and a deep network on them: no messages, so all of it is local."""

    def __init__(self, num_layers: int = 8) -> None:
        super().__init__(0)
        sizes = [4, *(num_layers * [12])]
        layers = [nn.Linear(a, b, dtype=DTYPE) for a, b in pairwise(sizes)]
        hidden = [module for layer in layers for module in (layer, nn.Tanh())]
        self.network = nn.Sequential(*hidden, nn.Linear(12, 6, dtype=DTYPE))

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))
        descriptors = radial.new_zeros(batch["species"].shape[0], 4).index_add(0, batch["edges"][1], radial)
        return self.network(descriptors)
