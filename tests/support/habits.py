"""Small potentials with the habits of widely used packages: one for each thing that a forward does there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from batch_kinds import Batch, Graphs
from torch import Tensor, nn

DTYPE = torch.float64


def sample(seed: int, num_atoms: int | None = None) -> Batch:
    """Returns one structure of three to six atoms, with an edge for each pair of atoms."""
    generator = torch.Generator().manual_seed(seed)
    n = 3 + seed % 4 if num_atoms is None else num_atoms
    source, target = torch.where(~torch.eye(n, dtype=torch.bool))
    return {
        "pos": 2.0 * torch.rand(n, 3, generator=generator, dtype=DTYPE),
        "z": torch.randint(0, 4, (n,), generator=generator),
        "edge_index": torch.stack([source, target]),
        "n": torch.tensor([n]),
        "n_edge": torch.tensor([len(source)]),
        "energy": torch.randn(1, generator=generator, dtype=DTYPE),
        "forces": torch.randn(n, 3, generator=generator, dtype=DTYPE),
    }


def collate(samples: Sequence[Batch]) -> Batch:
    """Returns the structures as one graph."""
    starts = [0]
    for s in samples:
        starts.append(starts[-1] + len(s["pos"]))
    batch = {k: torch.cat([s[k] for s in samples]) for k in ("pos", "z", "n", "n_edge", "energy", "forces")}
    batch["edge_index"] = torch.cat([s["edge_index"] + start for s, start in zip(samples, starts, strict=False)], 1)
    batch["batch"] = torch.repeat_interleave(torch.arange(len(samples)), batch["n"])
    return batch


class Layer(nn.Module):
    """One message-passing layer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a = nn.Linear(2 * width + 1, width, dtype=DTYPE)
        self.b = nn.Linear(width, width, dtype=DTYPE)

    def messages(self, h: Tensor, r: Tensor, edges: Tensor) -> Tensor:
        """(E, width) hidden features of edges."""
        return torch.tanh(self.a(torch.cat([h[edges[0]], h[edges[1]], r[:, None]], 1)))

    def forward(self, h: Tensor, r: Tensor, edges: Tensor) -> Tensor:
        return h + torch.zeros_like(h).index_add(0, edges[1], self.b(self.messages(h, r, edges)))


class Potential(nn.Module):
    """A message-passing energy; subclasses override :meth:`total` or :meth:`forward`."""

    def __init__(self, width: int = 6, num_layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(4, width, dtype=DTYPE)
        self.layers = nn.ModuleList(Layer(width) for _ in range(num_layers))
        self.readout = nn.Linear(width, 1, dtype=DTYPE)

    def energies(self, b: Any, pos: Tensor) -> Tensor:
        """(N,) energies of atoms."""
        r = (pos[b["edge_index"][0]] - pos[b["edge_index"][1]]).pow(2).sum(1).add(1e-6).sqrt()
        h = self.embedding(b["z"])
        for layer in self.layers:
            h = layer(h, r, b["edge_index"])
        energies: Tensor = self.readout(h)[:, 0]
        return energies

    def energy(self, b: Any, pos: Tensor) -> Tensor:
        """(B,) energies."""
        return per_structure(b, self.energies(b, pos))

    def total(self, b: Any, pos: Tensor) -> Tensor:
        """(B,) energies with what the habit adds."""
        return self.energy(b, pos)

    def forward(self, b: Any) -> Any:
        pos = b["pos"].requires_grad_()
        energy = self.total(b, pos)
        return {"energy": energy, "forces": -torch.autograd.grad(energy.sum(), pos, create_graph=True)[0]}


def per_structure(b: Any, of_atoms: Tensor) -> Tensor:
    """Sums over the atoms of each structure."""
    return torch.zeros_like(b["energy"]).index_add(0, b["batch"], of_atoms)


def of_edges(b: Any, values: Tensor) -> Tensor:
    """Sums over the edges of each structure."""
    return torch.zeros_like(b["energy"]).index_add(0, b["batch"][b["edge_index"][1]], values)


def squares(b: Any, pos: Tensor) -> Tensor:
    """(E,) squared lengths of the edges."""
    return (pos[b["edge_index"][0]] - pos[b["edge_index"][1]]).pow(2).sum(1)


class Step(nn.Module):
    """Stands for a LightningModule.

    Args:
        potential: the potential.
        labels: from a batch to its labels.
    """

    def __init__(self, potential: nn.Module, labels: Callable[[Any], Any] = lambda b: b) -> None:
        super().__init__()
        self.potential = potential
        self.labels = labels

    def log(self, name: str, value: Any) -> None:
        """Does nothing."""

    def training_step(self, batch: Any) -> Any:
        out, b = self.potential(batch), self.labels(batch)
        loss = (out["energy"] - b["energy"]).pow(2).mean() + (out["forces"] - b["forces"]).pow(2).mean()
        return loss + 0.01 * out["stress"].pow(2).mean() if "stress" in out else loss


class ReturnsBatch(Potential):
    """Writes its results into its batch, and returns that."""

    def forward(self, b: Any) -> Any:
        pos = b["pos"].requires_grad_()
        total = torch.zeros(b.num_graphs, dtype=DTYPE).index_add(0, b["batch"], self.energies(b, pos))
        b["predicted_energy"] = total
        b["predicted_forces"] = -torch.autograd.grad(total.sum(), pos, create_graph=True)[0]
        return b


class WritesOnce(Potential):
    """Writes an entry to its batch unless it is there."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        if "target" not in b:
            b["target"] = b["edge_index"][1]
        return self.energy(b, pos) + 0.001 * b["target"].sum()


class WritesVectors(Potential):
    """Writes vectors of edges to a dict inside of a named tuple."""

    def forward(self, g: Graphs) -> Any:
        b = g.nodes
        pos = b["pos"].requires_grad_()
        assert "vectors" not in g.edges
        g.edges["vectors"] = pos[b["edge_index"][0]] - pos[b["edge_index"][1]]
        energy = self.energy(b, pos) + of_edges(b, 1e-3 * g.edges["vectors"].pow(2).sum(1))
        return {"energy": energy, "forces": -torch.autograd.grad(energy.sum(), pos, create_graph=True)[0]}


# -- values that are read ----------------------------------------------------------------------------------------------


class ReturnsSizes(Potential):
    """Returns numbers that follow from sizes beside its tensors."""

    def forward(self, b: Any) -> Any:
        count = b["pos"].shape[0]
        return {**super().forward(b), "num_atoms": count, "mean": count / b["n"].shape[0], "many": count > 11}


class ChecksMask(Potential):
    """Drops edges from an atom to itself, if there are any."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        edges = b["edge_index"]
        mask = edges[0] != edges[1]
        if not mask.all():
            edges = edges[:, mask]
        return self.energy({**b, "edge_index": edges}, pos)


class Asserts(Potential):
    """Compares tensors and reads a truth value by ``item`` before it computes."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        assert torch.equal(b["batch"], b["batch"].sort().values) and (b["n"] > 0).all().item()
        assert torch.allclose(b["n_edge"].double(), (b["n"] * (b["n"] - 1)).double())
        return self.energy(b, pos)


class BranchesOnEnergy(Potential):
    """Branches on a value that depends on parameters."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        energy = self.energy(b, pos)
        return energy if energy.sum() > -1e9 else 2 * energy


class ReadsBuffer(Potential):
    """Has numbers in buffers that it reads: an exponent, a cutoff, a flag, a table."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("p", torch.tensor(6))
        self.register_buffer("cutoff", torch.tensor(3.5, dtype=DTYPE))
        self.register_buffer("flag", torch.tensor(True))
        self.register_buffer("table", torch.tensor([2, 3]))

    def total(self, b: Any, pos: Tensor) -> Tensor:
        scale = 1.0 + 1.0 / float(self.p) + float(self.cutoff) ** int(self.p) * 1e-6 + sum(self.table.tolist()) * 0.1
        return self.energy(b, pos) * (scale if self.flag else 1.0)


class ReadsConstants(Potential):
    """Reads numbers that are the same for every batch, of tensors that it makes, of a buffer, of a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.5, dtype=DTYPE), requires_grad=False)
        self.register_buffer("widths", torch.tensor([2, 3]))

    def total(self, b: Any, pos: Tensor) -> Tensor:
        kind, largest = torch.tensor(0), self.widths.max()
        h = self.embedding(b["z"])[:, : largest.item()] if kind.item() == 0 else self.embedding(b["z"])
        folded = torch.zeros(len(h), int(self.widths.sum()) - 2, dtype=DTYPE) + h[:, : self.widths[1]]
        return self.energy(b, pos) + per_structure(b, self.factor.item() * (folded * pos).sum(1))


class ReadsOwnSizes(Potential):
    """Reads integers that it has put into tensors itself, and that change from batch to batch."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        atoms, written = torch.tensor(len(pos)), torch.zeros(2, dtype=torch.int64)
        written[0] = b["n_edge"].sum()
        lengths = torch.zeros(int(written.sum()), dtype=DTYPE) + squares(b, pos)
        return self.energy(b, pos) + of_edges(b, lengths) + per_structure(b, torch.ones(atoms.item(), dtype=DTYPE))


class AsksForCompiler(Potential):
    """Counts structures only where nothing compiles."""

    num = 0

    def total(self, b: Any, pos: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            self.num = int(b["batch"].max().item() + 1)
        return torch.zeros(self.num, dtype=DTYPE).index_add(0, b["batch"], 0 * pos[:, 0]) + self.energy(b, pos)


class BroadcastsOne(Potential):
    """Adds an input (E, 1) to one of (E, 2), and one of one number to those."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        pairs = (b["edge_index"].t().double() + b["bias"]).sum(1) * b["factor"]
        return self.energy(b, pos) + of_edges(b, 1e-3 * pairs * squares(b, pos))


def with_ones(b: Batch) -> Batch:
    """Returns the batch with what :class:`BroadcastsOne` reads."""
    return {**b, "bias": torch.ones(b["edge_index"].shape[1], 1, dtype=DTYPE), "factor": torch.full((1,), 2.0)}


class HasReference(Potential):
    """Has frozen energies of isolated atoms, which the step reads too."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = nn.Linear(4, 1, bias=False, dtype=DTYPE).requires_grad_(False)

    def isolated(self, b: Any) -> Tensor:
        """(B,) energies."""
        return per_structure(b, self.reference(nn.functional.one_hot(b["z"], 4).to(DTYPE))[:, 0])

    def total(self, b: Any, pos: Tensor) -> Tensor:
        return self.energy(b, pos) + self.isolated(b)


class ReferenceStep(Step):
    """Trains the energies without those of isolated atoms."""

    def training_step(self, batch: Any) -> Any:
        out = self.potential(batch)
        loss = (out["energy"] - self.potential.isolated(batch) - batch["energy"]).pow(2).mean()
        return loss + (out["forces"] - batch["forces"]).pow(2).mean()


class TwoDerivatives(Potential):
    """Asks for forces and stress one after the other."""

    def forward(self, b: Any) -> Any:
        pos = b["pos"].requires_grad_()
        strain = torch.zeros(b["n"].shape[0], 3, 3, dtype=DTYPE, requires_grad=True)
        strained = pos + (pos[:, None] @ strain[b["batch"]])[:, 0]
        return self.derivatives(self.energy(b, strained), pos, strain)

    def derivatives(self, energy: Tensor, pos: Tensor, strain: Tensor) -> Any:
        """Energies, forces and stress."""
        forces = -torch.autograd.grad(energy.sum(), pos, create_graph=True, retain_graph=True)[0]
        stress = torch.autograd.grad(energy.sum(), strain, create_graph=True, retain_graph=True)[0]
        return {"energy": energy, "forces": forces, "stress": stress}


class TwoEnergies(TwoDerivatives):
    """Differentiates two different energies."""

    def derivatives(self, energy: Tensor, pos: Tensor, strain: Tensor) -> Any:
        forces = -torch.autograd.grad(energy.sum(), pos, create_graph=True, retain_graph=True)[0]
        stress = torch.autograd.grad((2 * energy).sum(), strain, create_graph=True, retain_graph=True)[0]
        return {"energy": energy, "forces": forces, "stress": stress}


class Hessian(TwoDerivatives):
    """Differentiates its forces."""

    def derivatives(self, energy: Tensor, pos: Tensor, strain: Tensor) -> Any:
        forces = -torch.autograd.grad(energy.sum(), pos, create_graph=True, retain_graph=True)[0]
        stress = torch.autograd.grad(forces.square().sum(), strain, create_graph=True, retain_graph=True)[0]
        return {"energy": energy, "forces": forces, "stress": stress}


class LoopsOverStructures(Potential):
    """Has a matrix for each structure, and multiplies with it in a loop over structures."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        ends = torch.cumsum(b["n"], 0).tolist()
        h = self.embedding(b["z"])
        scaled = torch.cat([h[a:z] * (i + 1) for i, (a, z) in enumerate(zip([0, *ends], ends, strict=False))])
        return self.energy(b, pos) + per_structure(b, scaled.sum(1) * pos.square().sum(1))


# -- random numbers, lists of indices, graph ranks ---------------------------------------------------------------------


class DrawsAngles(Potential):
    """Draws an angle for each edge by which it rotates forth and back, and one that matters for each atom."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        d2 = squares(b, pos)
        angle = torch.rand_like(d2) * 6.283
        weight = 1 + 0.1 * torch.randn(pos.shape[0], dtype=DTYPE)
        pairs = (angle.cos().square() + angle.sin().square()) * d2
        return self.energy(b, pos) + of_edges(b, pairs) + per_structure(b, weight * pos.square().sum(1))


class HasDropout(Potential):
    """Drops features of atoms, and of edges, in training."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.3)

    def energy(self, b: Any, pos: Tensor) -> Tensor:
        r = squares(b, pos).add(1e-6).sqrt()
        h = self.embedding(b["z"])
        for layer in self.layers:
            m = nn.functional.dropout(layer.messages(h, r, b["edge_index"]), 0.2, self.training)
            h = self.dropout(h + torch.zeros_like(h).index_add(0, b["edge_index"][1], layer.b(m)))
        return per_structure(b, self.readout(h)[:, 0])


class SamplesByValue(Potential):
    """Draws numbers whose distribution depends on values."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        return self.energy(b, pos) * torch.bernoulli(torch.sigmoid(pos.detach().sum()))


def near(b: Any, pos: Tensor) -> Tensor:
    """(N, N) pairs of atoms of one structure that are close."""
    with torch.no_grad():
        same = b["batch"][:, None] == b["batch"][None]
        return (torch.cdist(pos, pos) < 1.4) & same & ~torch.eye(len(pos), dtype=torch.bool)


class MakesEdges(Potential):
    """Makes its own list of edges, and carries features of edges from layer to layer."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        s, t = near(b, pos).nonzero().t()
        r = (pos[s] - pos[t]).pow(2).sum(1).add(1e-6).sqrt()
        h = self.embedding(b["z"])
        m = torch.zeros(s.shape[0], h.shape[1], dtype=DTYPE)
        for layer in self.layers:
            m = m + layer.messages(h, r, torch.stack([s, t]))
            h = h + torch.zeros_like(h).index_add(0, t, layer.b(m))
        return per_structure(b, self.readout(h)[:, 0] + torch.zeros_like(h).index_add(0, t, m).sum(1))


class MasksEdges(Potential):
    """Keeps the edges that are short, by a mask as an index, once of indices and once of vectors."""

    def total(self, b: Any, pos: Tensor) -> Tensor:
        s, t = b["edge_index"]
        vectors = pos[s] - pos[t]
        mask = vectors.detach().square().sum(1) < 2.5
        r = vectors[mask].pow(2).sum(1).add(1e-6).sqrt()
        edges = b["edge_index"][:, mask]
        h = self.embedding(b["z"])
        for layer in self.layers:
            h = layer(h, r, edges)
        return per_structure(b, self.readout(h)[:, 0])
