"""Holds potentials whose habits matter to graph ranks: look-ups and sums across structures, and stacked structures."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import torch
from habits import DTYPE, Batch, Potential, of_edges, per_structure, sample, squares
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
