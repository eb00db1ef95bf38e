"""Potentials and steps of many kinds, each to be compared with its plain double backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from capture_models import DTYPE, Batch, Potential, Step
from torch import Tensor, nn


class ChargeStep(Step):
    """The loss reads per-atom energies and charges too."""

    def training_step(self, batch: Batch) -> Any:
        out = self.potential(batch)
        terms = [(out[k] - batch[k]).square().mean() for k in ("energy", "forces", "stress")]
        terms += [out["charges"].square().mean(), (out["atomic"] - 1).abs().mean()]
        return {"loss": torch.stack(terms).sum(), "energy": out["energy"]}


class AtomicEnergies(Potential):
    def energy(self, batch: Batch, positions: Tensor, strain: Tensor) -> Any:
        strained = positions + torch.einsum("ni,nij->nj", positions, strain[batch["index"]])
        h = self.features(batch, strained[batch["edges"][1]] - strained[batch["edges"][0]])
        atomic = self.readout(h)[:, 0]
        return self.pool(atomic, batch), {"charges": self.charge(h)[:, 0], "atomic": atomic}


class Scaled(Potential):
    """One learnable scale for energy and forces, applied after the derivative."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.scale = nn.Parameter(torch.tensor(1.7, dtype=DTYPE))

    def forward(self, batch: Batch) -> Any:
        out = super().forward(batch)
        return {k: v * self.scale for k, v in out.items()}


class IsolatedAtoms(Potential):
    """Learnable energies of isolated atoms are added after the derivative; tuple instead of dict."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.isolated = nn.Parameter(torch.tensor([0.1, 0.2, 0.3], dtype=DTYPE))

    def forward(self, batch: Batch) -> Any:
        out = super().forward(batch)
        isolated = torch.zeros_like(out["energy"]).index_add(0, batch["index"], self.isolated[batch["species"]])
        return out["energy"] + isolated, (out["forces"], out["stress"]), "eV", None


class TupleStep(Step):
    def training_step(self, batch: Batch) -> Any:
        energy, (forces, stress), unit, nothing = self.potential(batch)
        assert unit == "eV" and nothing is None
        loss = (energy - batch["energy"]).square().mean() + (forces - batch["forces"]).square().mean()
        return loss + stress.square().mean()


class LearnableWeight(Step):
    """The weights of the losses are trained as well, outside the potential."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__(potential)
        self.log_weights = nn.Parameter(torch.tensor([0.3, -0.2], dtype=DTYPE))

    def training_step(self, batch: Batch) -> Any:
        out = self.potential(batch)
        errors = torch.stack([(out[k] - batch[k]).square().mean() for k in ("energy", "forces")])
        return (errors * torch.exp(-self.log_weights) + self.log_weights).sum()


class EdgeForces(Potential):
    """Derivative with respect to edge vectors; forces and virial are assembled from it."""

    def forward(self, batch: Batch) -> Any:
        source, target = batch["edges"]
        vectors = (batch["positions"][target] - batch["positions"][source]).requires_grad_()
        h = self.features(batch, vectors)
        energy = self.pool(self.readout(h)[:, 0], batch)
        (pair,) = self.differentiate(energy, [vectors])
        forces = torch.zeros_like(batch["positions"]).index_add(0, source, pair).index_add(0, target, -pair)
        outer = vectors[:, :, None] * pair[:, None, :]
        stress = torch.zeros_like(batch["cell"]).index_add(0, batch["index"][source], outer)
        return {"energy": energy, "forces": forces, "stress": stress / 100, "charges": self.charge(h)[:, 0]}


class Strained(Potential):
    """Strained positions, which are no leaf, and the strain they depend on are both differentiated."""

    def forward(self, batch: Batch) -> Any:
        strain = torch.zeros_like(batch["cell"]).requires_grad_()
        positions = batch["positions"].detach().requires_grad_()
        strained = positions + torch.einsum("ni,nij->nj", positions, strain[batch["index"]])
        vectors = strained[batch["edges"][1]] - strained[batch["edges"][0]]
        energy = self.pool(self.readout(self.features(batch, vectors))[:, 0], batch)
        forces, virial = self.differentiate(energy, [strained, strain])
        return {"energy": energy, "forces": -forces, "stress": virial / 700}


class Norms(Potential):
    """Distances are norms, whose derivative torch computes in a tensor that it then changes."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        return super().features(batch, vectors) * (1 + 0.1 * self.pool_edges(batch, torch.linalg.norm(vectors, dim=-1)))

    def pool_edges(self, batch: Batch, values: Tensor) -> Tensor:
        """Sums values (E,) over the edges that reach each atom; shape (N, 1)."""
        return values.new_zeros(batch["positions"].shape[0], 1).index_add(0, batch["edges"][1], values[:, None])


class GradOutputs(Potential):
    """Differentiates the vector of energies, weighted by grad_outputs."""

    def differentiate(self, energy: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
        weights = [1 + torch.arange(energy.shape[0], dtype=energy.dtype)]
        return torch.autograd.grad(outputs=[energy], inputs=inputs, grad_outputs=weights, create_graph=True)


def frozen(num_layers: int) -> nn.Module:
    potential = Potential(num_layers)
    potential.embedding.requires_grad_(False)
    potential.layers[0].requires_grad_(False)
    return potential


CASES: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: Step(Potential(3)),
    "auxiliary": lambda: ChargeStep(AtomicEnergies(3)),
    "scaled": lambda: Step(Scaled(3)),
    "isolated": lambda: TupleStep(IsolatedAtoms(3)),
    "learnable-weight": lambda: LearnableWeight(Potential(3)),
    "edge-forces": lambda: Step(EdgeForces(3)),
    "strained": lambda: Step(Strained(3)),
    "norms": lambda: Step(Norms(3)),
    "grad-outputs": lambda: Step(GradOutputs(3)),
    "frozen": lambda: Step(frozen(3)),
    "shared-filter": lambda: Step(Potential(3, share_filter=True)),
}
