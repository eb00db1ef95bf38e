"""Potentials that join atoms in other ways than one sum over edges, for the tests of graph ranks."""

from __future__ import annotations

import math
from typing import Any

import torch
from capture_models import DTYPE, Batch, Layer, Potential, filter_of, make_batch
from plain_modules import Base, collate, losses
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_januspipe.experts import ElementExperts

SIZES = (9, 4, 12, 1, 7, 2, 11, 3)


class Data:
    """Structures of which one is most of a micro-batch: no division deals them whole."""

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None: ...

    def train_dataloader(self) -> Any:
        samples: Any = [make_batch((size,), seed) for seed, size in enumerate(SIZES)]
        return DataLoader(samples, batch_size=4, collate_fn=collate)


class _BothWays(Layer):
    def aggregate(self, h: Tensor, target: Tensor, messages: Tensor) -> Tensor:
        return torch.zeros_like(h).index_add(0, target, messages)

    def forward(self, h: Tensor, radial: Tensor, edges: Tensor) -> Tensor:
        there, back = self.filter(radial) * h[edges[0]], self.filter(radial) * h[edges[1]]
        summed = self.aggregate(h, edges[1], there).index_add(0, edges[0], back)
        return h + torch.tanh(self.mix(summed))


class BothWays(Potential):
    """Pairs that are summed into both of their atoms: what belongs to another rank's atom goes there."""

    layer = _BothWays


class States(Potential):
    """Each structure has features that its atoms read and write, and the energy's scale and shift are trained."""

    def __init__(self, num_layers: int = 3, width: int = 6) -> None:
        super().__init__(num_layers, width)
        self.states = nn.ModuleList(nn.Linear(width, width, dtype=DTYPE) for _ in range(num_layers))
        self.first = nn.Parameter(torch.linspace(-0.5, 0.5, width, dtype=DTYPE))
        self.scale = nn.Parameter(torch.tensor(1.3, dtype=DTYPE))
        self.shift = nn.Parameter(torch.tensor(-0.2, dtype=DTYPE))

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))
        h = self.embedding(batch["species"])
        state = self.first.expand(batch["cell"].shape[0], -1) + batch["cell"].sum((1, 2))[:, None] / 9
        for layer, mix in zip(self.layers, self.states, strict=True):
            h = layer(h + state[batch["index"]], radial, batch["edges"])
            state = torch.tanh(mix(state + torch.zeros_like(state).index_add(0, batch["index"], h)))
        return h + state[batch["index"]]

    def energy(self, batch: Batch, positions: Tensor, strain: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        energy, extra = super().energy(batch, positions, strain)
        return self.scale * energy.square() + self.shift, extra


class Angles(Potential):
    """Edges read the other edges into the atom that they come from: rows of edges are exchanged too."""

    def __init__(self, num_layers: int = 2, width: int = 6) -> None:
        super().__init__(num_layers, width)
        self.turn = nn.Linear(width, width, dtype=DTYPE)

    def forward(self, batch: Batch) -> Any:
        return super().forward({**batch, "angles": batch["angles"]})

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))
        h, (here, other) = self.embedding(batch["species"]), batch["angles"]
        along = (vectors[here] * vectors[other]).sum(-1, keepdim=True) / (1 + distance[here] * distance[other])
        e = self.layers[0].filter(radial)
        for layer in self.layers:
            e = e + torch.zeros_like(e).index_add(0, here, along * torch.tanh(self.turn(e))[other])
            messages = h[batch["edges"][0]] * e
            h = h + torch.tanh(layer.mix(torch.zeros_like(h).index_add(0, batch["edges"][1], messages)))
        return h


def angles_of(batch: Batch) -> Batch:
    """Returns the same with pairs of edges, the second of which ends where the first begins."""
    edges = batch["edges"]
    here, other = (edges[0][:, None] == edges[1][None, :]).nonzero().T
    return {**batch, "angles": torch.stack([here, other])}


class _Attention(Layer):
    def forward(self, h: Tensor, radial: Tensor, edges: Tensor) -> Tensor:
        values = h[edges[0]] * self.filter(radial)
        weights = 0.5 * (soft(values, edges[0], h) + soft(values, edges[1], h))
        return h + torch.tanh(self.mix(self.aggregate(h, edges[1], weights * values)))


def soft(values: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """Returns the softmax over the edges of each atom."""
    index = index[:, None].expand_as(values)
    largest = like.new_full(like.shape, -math.inf).scatter_reduce(0, index, values, "amax")
    powers = torch.exp(values - largest.gather(0, index))
    return powers / like.new_zeros(like.shape).scatter_reduce(0, index, powers, "sum").gather(0, index)


class Attention(Potential):
    """Weights over the edges out of an atom, which are not all on its rank, and over those into it."""

    layer = _Attention


class _DegreeLayer(Layer):
    """Sums messages of two parts over neighbours, of slices of the features, and mixes the parts of the sums."""

    def forward(self, h: Tensor, radial: Tensor, edges: Tensor) -> Tensor:
        weights = self.filter(radial)
        senders = h[edges[0]]
        low, high = senders[:, :2] * weights[:, :2], senders[:, 2:] * weights[:, 2:]
        messages = torch.cat([low * high[:, :2].tanh(), high * weights[:, 2:]], 1)
        sums = h.new_zeros(h.shape).index_add(0, edges[1], messages)
        return h + (torch.cat([sums[:, :2].tanh(), sums[:, 2:] * h[:, 2:]], 1) + self.mix.bias)


class Degrees(Potential):
    """Has features of two degrees, which are slices of one tensor."""

    layer = _DegreeLayer


class _Peaks(Layer):
    def forward(self, h: Tensor, radial: Tensor, edges: Tensor) -> Tensor:
        values = h[edges[0]] * self.filter(radial)
        lowest = values.new_full(h.shape, -1.0)
        largest = lowest.scatter_reduce(0, edges[0][:, None].expand_as(values), values, "amax")
        return h + torch.tanh(self.mix(self.aggregate(h, edges[1], largest[edges[0]] * values)))


class Peaks(Potential):
    """The largest of what leaves an atom is a factor, whose derivative does not cancel as in a softmax."""

    layer = _Peaks


class _Mixture(Layer):
    """Makes the messages by the experts of the receiving atom, and updates atoms by their own."""

    def __init__(self, width: int, filter_network: nn.Module | None = None) -> None:
        super().__init__(width, filter_network)
        sizes = {"num_elements": 3, "num_experts": 5, "in_features": width, "out_features": width}
        self.messages = ElementExperts(**sizes, top_k=2).to(DTYPE)
        self.updates = ElementExperts(**sizes, top_k=3, has_shared=True).to(DTYPE)

    def mixed(self, h: Tensor, radial: Tensor, edges: Tensor, species: Tensor) -> Tensor:
        messages = self.messages(h[edges[0]] * self.filter(radial), species[edges[1]])
        return h + self.updates(self.aggregate(h, edges[1], messages), species)


class Mixture(Potential):
    """Mixtures of experts by element in messages and updates."""

    layer = _Mixture

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))
        h = self.embedding(batch["species"])
        for layer in self.layers:
            h = layer.mixed(h, radial, batch["edges"], batch["species"])
        return h


class Composed(Angles):
    """The atom that two edges share is looked up by the number of one of them."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        shared = batch["edges"][0][batch["angles"][0]]
        return h + 0.1 * torch.zeros_like(h).index_add(0, shared, torch.tanh(h[shared]))


class MeanField(Potential):
    """Atoms see the mean over all atoms of the batch: not a sum that ranks could share."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        return h - h.mean(0, keepdim=True)


class Numbered(Potential):
    """Pairs count once, by a comparison of the numbers of their atoms."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        once = (batch["edges"][0] < batch["edges"][1]).to(vectors.dtype)
        return super().features(batch, vectors * once[:, None] + vectors)


class Masked(Potential):
    """Lengths and unit vectors are written for some of the edges, by a mask that compares the numbers of atoms."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        mask = batch["edges"][0] % 3 != batch["edges"][1] % 3
        lengths = torch.zeros(vectors.size(0), dtype=vectors.dtype)
        lengths[mask] = torch.norm(vectors[mask], dim=-1)
        units = vectors.clone()
        units[mask] = vectors[mask] / torch.norm(vectors[mask], dim=1).unsqueeze(1)
        lengths[~mask] = 0.5
        return super().features(batch, vectors + 0.3 * units * torch.cos(lengths)[:, None])


class Started(States):
    """Energies of atoms are summed into values that each structure starts with, one of them trained."""

    def energy(self, batch: Batch, positions: Tensor, strain: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        energy, extra = super().energy(batch, positions, strain)
        of_atoms = positions.square().sum(1) * self.scale
        start = self.shift.expand(len(energy)).index_add(0, batch["index"], of_atoms)
        return energy.index_add(0, batch["index"], of_atoms.sin()) + start, extra


class Sliced(Potential):
    """As many species are taken as there are positions, so that a package may append those of other atoms."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        species = batch["species"][: batch["positions"].shape[0]]
        return h * (1 + 0.1 * self.embedding(species))


class Weighted(Potential):
    """Vectors are weighted with the numbers of atoms."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        return super().features(batch, vectors * batch["edges"][0][:, None])


class Shifted(Potential):
    """The neighbor in the list, which is on another rank for the last atom of each."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        return h + torch.roll(h, 1, 0)


class Counted(Potential):
    """Divides by the number of atoms, which no rank knows."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        return super().features(batch, vectors) / batch["species"].shape[0]


class Pairs(Potential):
    """Reads rows of other ranks from inputs alone, by a derivative by the vectors of edges, so that none travel."""

    def __init__(self) -> None:
        super().__init__(num_layers=0)
        self.filter = filter_of(6)

    def forward(self, batch: Batch) -> Any:
        source, target = batch["edges"]
        vectors = (batch["positions"][target] - batch["positions"][source]).detach().requires_grad_()
        radial = torch.exp(-((vectors.square().sum(-1, keepdim=True).sqrt() / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))
        messages = (
            self.filter(radial) * self.embedding(batch["species"][source]) * self.embedding(batch["species"][target])
        )
        h = messages.new_zeros(len(batch["species"]), 6).index_add(0, target, messages)
        energy = self.pool(self.readout(h)[:, 0], batch)
        (derivative,) = self.differentiate(energy, [vectors])
        forces = torch.zeros_like(batch["positions"]).index_add(0, source, derivative).index_add(0, target, -derivative)
        virial = (vectors[:, :, None] * derivative[:, None, :]).sum() / torch.linalg.det(batch["cell"]).abs()
        stress = virial[:, None, None].expand_as(batch["cell"])
        return {"energy": energy, "forces": forces, "stress": stress, "charges": self.charge(h)[:, 0]}


class Looked(Potential):
    """Atoms are looked up by numbers that follow from features."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        return h + h[(0 * h[:, 0]).long()]


class Module(Base):
    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        self.potential = potential

    def prepared(self, batch: Batch) -> Batch:
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        out = self.potential(self.prepared(batch))
        loss = losses(batch, out["energy"], out["forces"], out["stress"])
        return loss + 0.1 * out["charges"].square().mean()


class _AnglesModule(Module):
    def prepared(self, batch: Batch) -> Batch:
        return angles_of(batch)


def both_ways() -> Base:
    return Module(BothWays())


def pairs() -> Base:
    return Module(Pairs())


def states() -> Base:
    return Module(States())


def angles() -> Base:
    return _AnglesModule(Angles())


def attention() -> Base:
    return Module(Attention())


def peaks() -> Base:
    return Module(Peaks())


def mixture() -> Base:
    return Module(Mixture())


def composed() -> Base:
    return _AnglesModule(Composed())
