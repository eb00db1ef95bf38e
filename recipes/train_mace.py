"""MACE in a pipeline: energies, forces and stresses of alloys labelled with ASE's EMT, with no data to fetch.

    pip install mace-torch==0.3.16
    python recipes/train_mace.py                      # two processes on the CPU, about a minute
    python recipes/train_mace.py --accelerator gpu --devices 4 --layers 4 --channels 128 --max-ell 3 --epochs 20

Data, model and losses are MACE's own, in the LightningModule that one would write for them without a pipeline.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from mace import data, modules, tools
from mace.tools.torch_geometric.dataloader import DataLoader

import lightning_januspipe
from lightning_januspipe.data import emt_structures

CUTOFF = 4.5
KEYS = data.KeySpecification({"energy": "REF_energy", "stress": "REF_stress"}, {"forces": "REF_forces"})


def labelled(num_structures: int, stream: int) -> list[data.Configuration]:
    """Structures with their labels under the keys of MACE's files."""
    structures = emt_structures(num_structures, sizes=(4, 8), stream=stream)
    for atoms in structures:
        atoms.info["REF_energy"] = atoms.get_potential_energy()
        atoms.info["REF_stress"] = atoms.get_stress(voigt=False)
        atoms.arrays["REF_forces"] = atoms.get_forces()
    return [data.config_from_atoms(atoms, KEYS) for atoms in structures]


def build_model(
    table: tools.AtomicNumberTable, configs: list[data.Configuration], loader: DataLoader, args: argparse.Namespace
) -> modules.ScaleShiftMACE:
    """The model that MACE's own command line would build."""
    from e3nn import o3

    of_species = data.compute_average_E0s(configs, table)
    energies = torch.tensor([of_species[z] for z in table.zs]).numpy()
    shift, scale = modules.compute_mean_rms_energy_forces(loader, energies)
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    return modules.ScaleShiftMACE(
        r_max=CUTOFF,
        num_bessel=8,
        num_polynomial_cutoff=5,
        max_ell=args.max_ell,
        interaction_cls=block,
        interaction_cls_first=block,
        num_interactions=args.layers,
        num_elements=len(table),
        hidden_irreps=o3.Irreps(f"{args.channels}x0e + {args.channels}x1o"),
        MLP_irreps=o3.Irreps("16x0e"),
        gate=torch.nn.functional.silu,
        correlation=args.correlation,
        atomic_energies=energies,
        atomic_numbers=table.zs,
        avg_num_neighbors=modules.compute_avg_num_neighbors(loader),
        atomic_inter_scale=scale,
        atomic_inter_shift=shift,
    )


class Potential(lightning.LightningModule):
    """A MACE model with MACE's loss."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model
        self.loss = modules.WeightedEnergyForcesStressLoss(energy_weight=1.0, forces_weight=10.0, stress_weight=100.0)

    def predict(self, batch: Any) -> dict[str, torch.Tensor]:
        """Returns energy, forces and stress."""
        return self.model(batch.to_dict(), training=self.training, compute_force=True, compute_stress=True)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Returns the loss."""
        loss = self.loss(pred=self.predict(batch), ref=batch)
        self.log("loss", loss, prog_bar=True, batch_size=batch.num_graphs)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the mean absolute error of the forces."""
        with torch.enable_grad():
            predicted = self.predict(batch)
        error = (predicted["forces"] - batch.forces).detach().abs().mean()
        self.log("val_forces_mae", error, prog_bar=True, batch_size=batch.num_graphs, sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        return torch.optim.Adam(self.parameters(), lr=0.01, amsgrad=True)


def main() -> None:
    """Trains MACE with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--max-ell", type=int, default=2)
    parser.add_argument("--correlation", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()

    lightning.seed_everything(0)
    torch.set_default_dtype(torch.float64)
    configs = labelled(80, stream=0), labelled(10, stream=1)
    table = tools.get_atomic_number_table_from_zs(z for c in configs[0] for z in c.atomic_numbers)
    train, val = (
        DataLoader(
            [data.AtomicData.from_config(c, z_table=table, cutoff=CUTOFF) for c in group],
            batch_size=8,
            shuffle=group is configs[0],
        )
        for group in configs
    )
    trainer = lightning.Trainer(
        accelerator=args.accelerator,
        devices=args.devices,
        strategy=lightning_januspipe.JanusPipeStrategy(num_microbatches=4),
        max_epochs=args.epochs,
        gradient_clip_val=10.0,
        log_every_n_steps=5,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(Potential(build_model(table, configs[0], train, args)), train, val)


if __name__ == "__main__":
    main()
