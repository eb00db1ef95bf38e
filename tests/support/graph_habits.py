"""Holds potentials whose habits matter to graph ranks: look-ups and sums across structures, and stacked structures."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from batch_kinds import Batch
from habits import DTYPE, Potential, of_edges, per_structure, sample, squares
from torch import Tensor, nn

from lightning_januspipe.capture.adapters import Adapter
from lightning_januspipe.experts.grouped import grouped_linear


class Stacked(Potential):
    """Takes structures of one size, stacked to (B, N, 3), and sums over all pairs of atoms."""

    def forward(self, b: Any) -> Any:
        pos = b["pos"].requires_grad_()
        closeness = torch.exp(-(pos[:, :, None] - pos[:, None]).pow(2).sum(-1).add(1e-6).sqrt())
        h = self.embedding(b["z"])
        for layer in self.layers:
            h = h + layer.b(torch.tanh((closeness[..., None] * h[:, None]).sum(2)))
        energy = self.readout(h).sum((1, 2))
        return {"energy": energy, "forces": -torch.autograd.grad(energy.sum(), pos, create_graph=True)[0]}


def stacked(b: Batch) -> Batch:
    """Returns as many structures as a batch has, each with so many and three more atoms."""
    num = len(b["n"])
    samples = [sample(seed, num + 3) for seed in range(num)]
    found = {name: torch.stack([s[name] for s in samples]) for name in ("pos", "z", "forces")}
    return found | {"energy": b["energy"]}


@torch.library.custom_op("habits::pairs", mutates_args=())
def pairs(pos: Tensor, batch: Tensor) -> Tensor:
    """Finds the pairs of atoms (2, 8 N), padded with -1, in another order at every second call."""
    near = (batch[:, None] == batch[None]) & (torch.cdist(pos, pos) < 1.8)
    found = near.fill_diagonal_(False).nonzero().T
    CALLS.append(len(CALLS))
    padded = torch.full((2, 8 * len(pos)), -1)
    padded[:, : found.shape[1]] = found.flip(1) if CALLS[-1] % 2 else found
    return padded


@pairs.register_fake
def _(pos: Tensor, batch: Tensor) -> Tensor:
    return batch.new_empty(2, 8 * pos.shape[0])


CALLS: list[int] = []


class FindsPairs(Potential):
    """Finds edges by an operation of the package's own, and gives edges features that stages send."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        edges = torch.ops.habits.pairs(pos.detach(), b["batch"])
        edges = edges[:, edges[0] != -1]
        r = (pos[edges[0]] - pos[edges[1]]).pow(2).sum(1).add(1e-6).sqrt()
        h = self.embedding(b["z"])
        e = torch.zeros(edges.shape[1], h.shape[1], dtype=DTYPE)
        for layer in self.layers:
            e = e + layer.messages(h, r, edges)
            h = h + torch.zeros_like(h).index_add(0, edges[1], layer.b(e))
        return per_structure(b, self.readout(h)[:, 0])


class Repeats(Potential):
    """Repeats values of structures for their edges, with and without the number of edges."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        s = b["edge_index"][0]
        scale = (1.0 + 0.1 * b["n"]).repeat_interleave(b["n_edge"])
        bias = (0.1 * b["n"]).repeat_interleave(b["n_edge"], output_size=s.shape[0])
        r = squares(b, pos).add(1e-6).sqrt() * scale + bias
        h, m = self.embedding(b["z"]), torch.zeros(1, dtype=DTYPE)
        for layer in self.layers:
            m = layer.messages(h, r, b["edge_index"]) * scale[:, None] + m
            h = h + torch.zeros_like(h).index_add(0, b["edge_index"][1], layer.b(m))
        return per_structure(b, self.readout(h)[:, 0])


class LooksUpPairs(Potential):
    """Looks up the types of both ends of edges at once."""

    def __init__(self) -> None:
        super().__init__()
        self.of_source, self.of_target = (nn.Embedding(4, 1, dtype=DTYPE) for _ in range(2))

    def total(self, b: Any, pos: Tensor) -> Tensor:
        types = torch.index_select(b["z"].reshape(-1), 0, b["edge_index"].reshape(-1)).view(b["edge_index"].shape)
        w = (self.of_source(types[0]) + self.of_target(types[1]))[:, 0]
        return self.energy(b, pos) + of_edges(b, 1e-2 * w * squares(b, pos))


class StacksPairs(Potential):
    """Takes structures of one size, stacked to (B, N, 3), and sums over the pairs of a triangle of indices."""

    def forward(self, b: Any) -> Any:
        pos = b["pos"].requires_grad_()
        first, second = torch.triu_indices(pos.shape[1], pos.shape[1], 1)
        distances = (pos[:, first] - pos[:, second]).pow(2).sum(-1).add(1e-6).sqrt()
        h = self.embedding(b["z"])
        for layer in self.layers:
            pairs = torch.tanh(layer.a(torch.cat([h[:, first], h[:, second], distances[..., None]], -1)))
            h = h.index_add(1, first, layer.b(pairs)).index_add(1, second, layer.b(pairs))
        energy = self.readout(h).sum((1, 2))
        return {"energy": energy, "forces": -torch.autograd.grad(energy.sum(), pos, create_graph=True)[0]}


class ReadsBothEnds(Potential):
    """Reads the features of both ends of edges by (2, E) indices, and sums messages by indices that ones widen."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        r = squares(b, pos).add(1e-6).sqrt()
        h = self.embedding(b["z"])
        for layer in self.layers:
            source, target = h[b["edge_index"]]
            m = layer.b(torch.tanh(layer.a(torch.cat([source, target, r[:, None]], 1))))
            messages = torch.stack([m, m * r[:, None]], 1)
            widened = (torch.ones_like(messages).transpose(0, -1) * b["edge_index"][1]).transpose(0, -1).long()
            sums = torch.zeros(len(h), *messages.shape[1:], dtype=DTYPE).scatter_add(0, widened, messages)
            h = h + sums[:, 0] - 0.1 * sums[:, 1]
        return per_structure(b, self.readout(h)[:, 0])


class NetworkOfEachElement(Potential):
    """Has a network for each element, and calls those of the elements that a batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList(nn.Linear(6, 1, dtype=DTYPE) for _ in range(4))

    def total(self, b: Any, pos: Tensor) -> Tensor:
        h = self.embedding(b["z"]).index_add(0, b["edge_index"][1], squares(b, pos)[:, None].expand(-1, 6).cos())
        energies = h.new_zeros(len(h))
        for element, network in enumerate(self.networks):
            atoms = (b["z"] == element).nonzero().flatten()
            if atoms.shape[0] > 0:
                energies = energies.index_add(0, atoms, network(h[atoms]).tanh()[:, 0])
        return per_structure(b, energies)


class ReducesByScatter(Potential):
    """Sums messages, and forces of edge vectors, by scatter_reduce_ with an expanded index."""

    def forward(self, b: Any) -> Any:
        pos = b["pos"].requires_grad_()
        s, t = b["edge_index"]
        vectors = pos[s] - pos[t]
        r = vectors.pow(2).sum(1).add(1e-6).sqrt()
        h = self.embedding(b["z"])
        for layer in self.layers:
            m = layer.b(layer.messages(h, r, b["edge_index"]))
            zeros = torch.zeros(len(h), m.shape[1], dtype=DTYPE)
            h = h + zeros.scatter_reduce_(0, t[:, None].expand_as(m), m, reduce="sum")
        energy = per_structure(b, self.readout(h)[:, 0])
        f = torch.autograd.grad([energy.sum()], [vectors], create_graph=True)[0]
        total = torch.sum(b["n"])
        indices = [i[:, None].expand_as(f) for i in (s, t)]
        parts = [torch.zeros(total, 3, dtype=DTYPE).scatter_reduce_(0, i, f, "sum") for i in indices]
        return {"energy": energy, "forces": parts[1] - parts[0]}


class RotatesAll(Potential):
    """Differentiates with respect to a strain, and a rotation that it makes as zeros of the shape of strained cells."""

    def forward(self, b: Any) -> Any:
        pos = b["pos"].requires_grad_()
        strain = torch.zeros_like(b["n"].double()[:, None, None].expand(-1, 3, 3), requires_grad=True)
        generator = torch.zeros_like(torch.eye(3, dtype=DTYPE) + strain, requires_grad=True)
        rotation = torch.linalg.matrix_exp(generator - generator.transpose(1, 2))
        strained = pos + torch.bmm(pos[:, None], strain[b["batch"]])[:, 0]
        energy = self.energy(b, torch.bmm(strained[:, None], rotation[b["batch"]])[:, 0])
        f, v, g = torch.autograd.grad([energy], [pos, strain, generator], [torch.ones_like(energy)], create_graph=True)
        return {"energy": energy, "forces": -f, "stress": v + g}


class Experts(Potential):
    """Mixes matrices for each structure, and multiplies the edges of each with its own, in a loop over structures."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Parameter(0.1 * torch.randn(3, 6, 6, dtype=DTYPE))
        self.route = nn.Embedding(4, 3, dtype=DTYPE)

    def total(self, b: Any, pos: Tensor) -> Tensor:
        means = self.route.weight.new_zeros(b["n"].shape[0], 3)
        means = means.index_reduce_(0, b["batch"], self.route(b["z"]), "mean", include_self=False)
        weights = torch.einsum("eio,be->bio", self.experts, means.softmax(1))
        edges = b["edge_index"]
        r = squares(b, pos).add(1e-6).sqrt()
        m = self.multiplied(b, self.layers[0].messages(self.embedding(b["z"]), r, edges), weights)
        return self.energy(b, pos) + of_edges(b, m.sum(1) * squares(b, pos))

    def multiplied(self, b: Any, rows: Tensor, weights: Tensor) -> Tensor:
        """(E, width) products."""
        ends = torch.cumsum(b["n_edge"], 0).tolist()
        return torch.cat([rows[a:z] @ weights[i].T for i, (a, z) in enumerate(zip([0, *ends], ends, strict=False))])


class ExpertsAdapter(Adapter):
    """Multiplies the edges of all structures together."""

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        def multiplied(b: Any, rows: Tensor, weights: Tensor) -> Tensor:
            return grouped_linear(rows, weights.transpose(1, 2), b["batch"][b["edge_index"][1]])

        return mock.patch.object(potential, "multiplied", multiplied)


class FillsGrid(Potential):
    """Sorts edges into a grid, (N, most edges of an atom), and reads each edge's reverse by its place in the grid."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        edges, mask, reverse = grid_of(b["edge_index"], pos.shape[0])
        r = torch.where(mask, squares(b, pos).add(1e-6).sqrt()[edges], 1.0)
        h = self.embedding(b["z"])
        e = self.embedding(b["z"][b["edge_index"][1]][edges])
        for layer in self.layers:
            here = h[:, None].expand_as(e)
            m = torch.tanh(layer.a(torch.cat([here, e, r[..., None]], 2))) * mask[..., None]
            e = e + m.reshape(-1, m.shape[2])[reverse].reshape(m.shape)
            h = h + layer.b(m.sum(1))
        return per_structure(b, self.readout(h)[:, 0])


def grid_of(edge_index: Tensor, num_atoms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sorts edges into a grid with a row for each atom.

    Returns:
        (N, M) edges of each atom, (N, M) which of these there are, and (N, M) the places of their reverses in the
        flattened grid; places that have no edge get one each too, which no other has.
    """
    centers, neighbors = edge_index
    count = torch.zeros(num_atoms, dtype=torch.int64).scatter_add_(0, centers, torch.ones_like(centers))
    most: Any = count.max().item()
    mask = torch.arange(most).view(1, -1).expand(num_atoms, -1) < count.view(-1, 1)
    order = torch.argsort(centers, stable=True)
    place = torch.arange(centers.shape[0]) - (torch.cumsum(count, 0) - count)[centers[order]]
    edges = torch.zeros(num_atoms * most, dtype=torch.int64)
    edges[centers[order] * most + place] = order
    edges = edges.view(num_atoms, most)
    places, of_reverse = torch.empty_like(centers), torch.empty_like(centers)
    places[order] = place
    of_reverse[(centers * num_atoms + neighbors).argsort()] = (neighbors * num_atoms + centers).argsort()
    found = neighbors[edges] * most + places[of_reverse[edges]].masked_fill(~mask, 0)
    unused = torch.cumsum((~mask.reshape(-1)).long(), 0) - 1
    return edges, mask, torch.where(mask.reshape(-1), found.reshape(-1), unused).reshape(edges.shape)


class CountsWithin(Potential):
    """Weights energies by the place of each atom in its structure, and by how many atoms of a type come before it."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        place = torch.arange(len(pos)) - (torch.cumsum(b["n"], 0) - b["n"])[b["batch"]]
        before = torch.cumsum((b["z"] == 1).long(), 0)
        return per_structure(b, self.energies(b, pos) * (1.0 + 0.1 * place + 0.01 * before))


class MasksLast(Potential):
    """Takes the last atom for padding: masks it by its number, and adds it to the structure before it."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        last = pos.shape[0] - 1
        is_padding = torch.arange(pos.shape[0]) == last
        index = torch.cat([b["batch"][:-1], b["batch"][-1:].clamp(max=b["n"].shape[0] - 1)])
        r = squares(b, pos).add(1e-6).sqrt().masked_fill((b["edge_index"] == last).any(0), 3.0)
        h = self.embedding(b["z"])
        for layer in self.layers:
            h = layer(h, r, b["edge_index"]).masked_fill(is_padding[:, None], 0.0)
        return torch.zeros_like(b["energy"]).index_add(0, index, self.readout(h)[:, 0])
