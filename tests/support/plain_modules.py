"""LightningModules of the kinds that users write by themselves, and data for them."""

from __future__ import annotations

from typing import Any

import lightning
import torch
from capture_models import Batch, Potential, make_batch
from explicit_models import Branching, LooksUp, SelfDividing
from torch import Tensor
from torch.utils.data import DataLoader

_SIZES = (4, 3, 5, 2, 6, 1, 3, 4, 5, 2, 4, 3)


def collate(samples: list[Batch]) -> Batch:
    """Joins structures to a batch: indices are shifted by the atoms before."""
    joined = {k: torch.cat([s[k] for s in samples]) for k in samples[0] if k not in ("edges", "index")}
    first = torch.tensor([0, *(len(s["species"]) for s in samples)]).cumsum(0)
    joined["edges"] = torch.cat([s["edges"] + first[i] for i, s in enumerate(samples)], 1)
    joined["index"] = torch.cat([s["index"] + i for i, s in enumerate(samples)])
    return joined


class Data:
    """Twelve structures, one with a single atom, in batches of four; also as a loader for validation."""

    def prepare_data(self) -> None: ...

    def setup(self, stage: str) -> None: ...

    def train_dataloader(self) -> Any:
        samples: Any = [make_batch((size,), seed) for seed, size in enumerate(_SIZES)]
        return DataLoader(samples, batch_size=4, collate_fn=collate)


class Base(lightning.LightningModule):
    """What all of them share."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def losses(batch: Batch, energy: Tensor, forces: Tensor, virial: Tensor) -> Tensor:
    """Returns the sum of the mean squared errors; the virial is drawn to the labels of the stress."""
    energies = (energy - batch["energy"]).square().mean() + (forces - batch["forces"]).square().mean()
    return energies + 0.1 * (virial - batch["stress"]).square().mean()


class Explicit(Base):
    """Its potential cannot be traced, and divides itself."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = SelfDividing(num_layers=4)

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        out = self.potential(batch)
        self.log("charge", out["charges"].abs().mean())
        return losses(batch, out["energy"], out["forces"], out["stress"]) + out["charges"].square().mean()


class ExplicitTraceable(Explicit):
    """All stages of its potential can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = LooksUp()


class ExplicitBranching(Explicit):
    """Its potential does something else for a single atom."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = Branching()


class Energies(Potential):
    """Energies of strained positions; the derivative is the step's business."""

    def forward(self, batch: Batch, positions: Tensor) -> Any:
        h = self.features(batch, positions[batch["edges"][1]] - positions[batch["edges"][0]])
        return self.pool(self.readout(h)[:, 0], batch), self.charge(h)[:, 0]


class InStep(Base):
    """Strains, asks for energies, shifts them by its own parameters, and differentiates, all in its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Energies(4)
        self.shift = torch.nn.Parameter(torch.linspace(-0.2, 0.2, 3, dtype=torch.float64))

    def predicted(self, batch: Batch) -> tuple[Tensor, ...]:
        positions = batch["positions"].detach().requires_grad_()
        strain = torch.zeros_like(batch["cell"]).requires_grad_()
        strained = positions + torch.einsum("ni,nij->nj", positions, (strain + strain.mT)[batch["index"]] / 2)
        energy, charges = self.model(batch, strained)
        energy = energy + torch.zeros_like(energy).index_add(0, batch["index"], self.shift[batch["species"]])
        gradient, virial = torch.autograd.grad(energy.sum(), [positions, strain], create_graph=self.training)
        return energy, -gradient, virial, charges

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        energy, forces, virial, charges = self.predicted(batch)
        return losses(batch, energy, forces, virial) + 0.1 * charges.square().mean()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.enable_grad():
            energy, forces, virial, _ = self.predicted(batch)
        self.log("val_loss", losses(batch, energy, forces, virial).detach(), batch_size=len(energy))


class OtherEvaluation(InStep):
    """Validates another energy than it trains."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step({**batch, "positions": 1.1 * batch["positions"]}, batch_idx)


class ValidatesMore(InStep):
    """Predicts the virial in validation only."""

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        positions = batch["positions"].detach().requires_grad_()
        energy, charges = self.model(batch, positions)
        gradient = torch.autograd.grad(energy.sum(), positions, create_graph=True)[0]
        return losses(batch, energy, -gradient, batch["stress"]) + 0.1 * charges.square().mean()


class MadeLater(OtherEvaluation):
    """Makes its potential in ``configure_model``, so that parameters of other stages leave a rank."""

    def __init__(self) -> None:
        super().__init__()
        del self.model
        self.model: Any = None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = Energies(4)


class OwnForward(Base):
    """The LightningModule is the potential: ``self(batch)``."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = Energies(4)

    def forward(self, batch: Batch) -> tuple[Tensor, ...]:
        positions = batch["positions"].detach().requires_grad_()
        energy, _ = self.potential(batch, positions)
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=True)
        return energy, -gradient

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        energy, forces = self(batch)
        return losses(batch, energy, forces, torch.zeros_like(batch["stress"]))


class Flagged(Potential):
    """Told by its caller whether it trains; writes strained positions to its batch."""

    def forward(self, batch: Batch, training: bool = False) -> Any:
        positions = batch["positions"].requires_grad_()
        batch["positions"] = 1.01 * positions
        h = self.features(batch, batch["positions"][batch["edges"][1]] - batch["positions"][batch["edges"][0]])
        energy = self.pool(self.readout(h)[:, 0], batch)
        (gradient,) = torch.autograd.grad(energy.sum(), positions, create_graph=training, retain_graph=training)
        return {"energy": energy, "forces": -gradient}


class Reducing(Base):
    """Its loss is the mean over all processes, its validation leaves out an argument, as users of MACE have it."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = Flagged(4)

    def loss(self, batch: Batch, out: dict[str, Tensor]) -> Tensor:
        loss = losses(batch, out["energy"], out["forces"], torch.zeros_like(batch["stress"]))
        num = torch.ones_like(loss)
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(num)
            loss = loss * torch.distributed.get_world_size()
        return loss / num

    def training_step(self, batch: Batch, batch_idx: int) -> Any:
        return self.loss(batch, self.potential(dict(batch), training=True))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.enable_grad():
            out = self.potential(dict(batch))
        self.log("val_loss", self.loss(batch, out).detach(), batch_size=len(out["energy"]))


def with_validation(strategy: dict[str, Any] | None, kind: type[Base] = InStep) -> list[float]:
    """Returns validation losses of three epochs."""
    from lightning_januspipe.testing import quiet_trainer

    module, found = kind(), []

    class Keep(lightning.Callback):
        def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
            found.append(float(trainer.callback_metrics["val_loss"]))

    trainer = quiet_trainer(strategy, max_epochs=3)
    trainer.callbacks.append(Keep())
    trainer.fit(module, Data().train_dataloader(), Data().train_dataloader())
    return found
