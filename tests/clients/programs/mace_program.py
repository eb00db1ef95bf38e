"""Train a small MACE model in an ordinary LightningModule, and save losses and trained parameters.

python mace_program.py --out plain.pt
python mace_program.py --strategy januspipe --devices 2 --janus '{"num_microbatches": 4}' --out pipeline.pt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from factories import Loader
from mace import data, modules, tools
from mace.tools.torch_geometric.dataloader import DataLoader

import lightning_januspipe
from lightning_januspipe.testing import quiet_trainer

NUMBERS = (13, 28, 29)
CUTOFF = 4.0


def crystal(index: int, rng: np.random.Generator) -> Atoms:
    """Returns a rattled, strained fcc cell of 4, 8 or 16 atoms of three elements."""
    atoms = bulk("Cu", "fcc", a=3.75, cubic=True) * [(1, 1, 1), (2, 1, 1), (2, 2, 1)][index % 3]
    atoms.set_atomic_numbers(rng.choice(NUMBERS, len(atoms)))
    strain = 0.02 * rng.standard_normal((3, 3))
    atoms.set_cell(atoms.cell @ (np.eye(3) + strain + strain.T), scale_atoms=True)
    atoms.positions += 0.08 * rng.standard_normal(atoms.positions.shape)
    return atoms


def molecule(index: int, rng: np.random.Generator) -> Atoms:
    """Returns a rattled cluster of 3 to 7 atoms without a cell."""
    atoms = bulk("Cu", "fcc", a=3.75, cubic=True) * (2, 1, 1)
    atoms = atoms[: 3 + index % 5]
    atoms.set_atomic_numbers(rng.choice(NUMBERS, len(atoms)))
    atoms.positions += 0.08 * rng.standard_normal(atoms.positions.shape)
    return Atoms(atoms.numbers, atoms.positions)


def lone(index: int, rng: np.random.Generator) -> Atoms:
    """Returns one atom, which has no edges, for every second index, and a molecule for the others."""
    return Atoms([NUMBERS[index % 3]], [[0.0, 0.0, 0.0]]) if index % 2 else molecule(index, rng)


def mixed(index: int, rng: np.random.Generator) -> Atoms:
    """Returns a crystal or a molecule, by turns."""
    return molecule(index, rng) if index % 2 else crystal(index, rng)


STRUCTURES = {"periodic": crystal, "molecules": molecule, "mixed": mixed, "lone": lone}


def dataset(kind: str, num_structures: int) -> list[Any]:
    """Returns structures labelled with ASE's EMT as MACE's data (energies in eV, forces in eV/Å, stress in eV/Å³)."""
    rng = np.random.default_rng(0)
    table = tools.AtomicNumberTable(list(NUMBERS))
    made = []
    for index in range(num_structures):
        atoms = STRUCTURES[kind](index, rng)
        atoms.calc = EMT()
        labels = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
        weights = {"energy": 1.0, "forces": 1.0, "stress": 0.0}
        if atoms.pbc.all():
            labels["stress"] = atoms.get_stress(voigt=False)
            weights["stress"] = 1.0
        config = data.Configuration(
            atomic_numbers=atoms.numbers,
            positions=atoms.positions.copy(),
            properties=labels,
            property_weights=weights,
            cell=np.array(atoms.cell),
            pbc=tuple(map(bool, atoms.pbc)),
        )
        made.append(data.AtomicData.from_config(config, z_table=table, cutoff=CUTOFF))
    return made


def model(kind: str, num_layers: int, correlation: int, **arguments: Any) -> torch.nn.Module:
    """Returns a small model of MACE's, built as MACE builds it: with e3nn's compiled modules."""
    from e3nn import o3  # which this torch can import after mace only

    torch.manual_seed(0)
    common: dict[str, Any] = {
        "r_max": CUTOFF,
        "num_bessel": 6,
        "num_polynomial_cutoff": 5,
        "max_ell": 2,
        "interaction_cls": modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        "interaction_cls_first": modules.interaction_classes["RealAgnosticResidualInteractionBlock"],
        "num_interactions": num_layers,
        "num_elements": len(NUMBERS),
        "hidden_irreps": o3.Irreps("8x0e + 8x1o"),
        "MLP_irreps": o3.Irreps("8x0e"),
        "atomic_energies": np.array([3.2, 4.7, 3.5]),
        "avg_num_neighbors": 18.0,
        "atomic_numbers": list(NUMBERS),
        "correlation": correlation,
        "gate": torch.nn.functional.silu,
        "radial_MLP": [16, 16],
    }
    if kind == "mace":
        return modules.MACE(**{**common, **arguments})
    return modules.ScaleShiftMACE(**{**common, "atomic_inter_scale": 0.8, "atomic_inter_shift": 0.1, **arguments})


class Potential(lightning.LightningModule):
    """What a user of MACE writes to train it with Lightning."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = modules.WeightedEnergyForcesStressLoss(energy_weight=1.0, forces_weight=10.0, stress_weight=10.0)

    def predict(self, batch: Any) -> dict[str, Any]:
        return self.model(batch.to_dict(), training=self.training, compute_force=True, compute_stress=True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = self.loss(pred=self.predict(batch), ref=batch)
        self.log("loss", loss, batch_size=batch.num_graphs)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            predicted = self.predict(batch)
        self.log("val_loss", self.loss(pred=predicted, ref=batch).detach(), batch_size=batch.num_graphs)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        decayed = [p for n, p in self.named_parameters() if "linear.weight" in n or "products" in n]
        others = [p for p in self.parameters() if all(p is not q for q in decayed)]
        groups = [{"params": decayed, "weight_decay": 5e-7}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.Adam(groups, lr=0.01, amsgrad=True)


def make_module(args: argparse.Namespace) -> Potential:
    """Makes the module that the options ask for."""
    torch.set_default_dtype(torch.float64)
    return Potential(model(args.model, args.layers, args.correlation, **args.options))


def make_data(args: argparse.Namespace) -> Loader:
    """Makes the data that the options ask for."""
    torch.set_default_dtype(torch.float64)
    return Loader(DataLoader(dataset(args.structures, args.num_structures), batch_size=args.batch_size, shuffle=False))


class Losses(lightning.Callback):
    """Loss of every step; of the validation, if there is one, after it."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))

    def on_validation_epoch_end(self, trainer: Any, module: Any) -> None:
        self.values.append(float(trainer.callback_metrics["val_loss"]))


class Average(lightning.Callback):
    """The exponential moving average that MACE's training keeps, by the same library.

    A rank of a pipeline keeps that of its own parameters; a checkpoint takes each from its own rank.
    """

    def on_train_start(self, trainer: Any, module: Any) -> None:
        from torch_ema import ExponentialMovingAverage

        self.average = ExponentialMovingAverage(module.parameters(), decay=0.9)

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            self.average.update()

    def on_train_end(self, trainer: Any, module: Any) -> None:
        self.average.copy_to()


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["mace", "scaleshift"], default="scaleshift")
    parser.add_argument("--layers", type=int, default=2, help="num_interactions")
    parser.add_argument("--correlation", type=int, default=2)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of other arguments of the model")
    parser.add_argument("--structures", choices=list(STRUCTURES), default="periodic")
    parser.add_argument("--num-structures", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1, help="accumulate_grad_batches")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--validate", action="store_true", help="validate after training, too")
    parser.add_argument("--clip", type=float, help="gradient_clip_val")
    parser.add_argument("--ema", action="store_true", help="train with an exponential moving average, and save that")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--janus", type=json.loads, help="JSON of the arguments of JanusPipeStrategy")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    module, loader = make_module(args), make_data(args).train_dataloader()
    losses = Losses()
    trainer = quiet_trainer(
        args.strategy if args.janus is None else lightning_januspipe.JanusPipeStrategy(**args.janus),
        devices=args.devices,
        max_steps=args.steps,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=args.clip,
        callbacks=[losses, *([Average()] if args.ema else [])],
        val_check_interval=args.steps * args.accumulate if args.validate else None,
        limit_val_batches=1.0 if args.validate else 0,
    )
    trainer.fit(module, loader, loader if args.validate else None)
    checkpoint = args.out.with_suffix(".ckpt")
    trainer.save_checkpoint(checkpoint, weights_only=True)
    if trainer.is_global_zero:
        state = torch.load(checkpoint, weights_only=False)["state_dict"]
        torch.save({"losses": losses.values, "state": state}, args.out)


if __name__ == "__main__":
    main()
