"""eSEN or UMA in a pipeline: energies, forces and stresses of alloys labelled with ASE's EMT, with no data to fetch.

    pip install fairchem-core==2.24.0
    python recipes/train_esen.py                      # two processes on the CPU, about a minute
    python recipes/train_esen.py --experts 4          # UMA: eSEN with mixtures of linear experts
    python recipes/train_esen.py --accelerator gpu --devices 4 --layers 8 --channels 128 --epochs 20

Data, backbone and head are fairchem's own, in the LightningModule that one would write for them without a pipeline. The
backbone makes the edges in its forward, as in fairchem's own configurations.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from fairchem.core.datasets.atomic_data import AtomicData, atomicdata_list_to_batch
from fairchem.core.models.base import HydraModelV2
from fairchem.core.models.uma.escn_md import MLP_EFS_Head, eSCNMDBackbone
from fairchem.core.models.uma.escn_moe import eSCNMDMoeBackbone
from torch import Tensor
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader

import lightning_januspipe
from lightning_januspipe.data import emt_structures

CUTOFF = 4.5


def samples(num_structures: int, stream: int) -> list[AtomicData]:
    """Returns neutral structures without spin, with energies (eV), forces (eV/Å) and stresses (eV/Å³)."""
    found = []
    for atoms in emt_structures(num_structures, sizes=(4, 8), stream=stream):
        data = AtomicData.from_ase(atoms, target_dtype=torch.float64)
        data.charge, data.spin, data.dataset = torch.zeros(1).long(), torch.zeros(1).long(), ["omat"]
        found.append(data)
    return found


def build_model(args: argparse.Namespace) -> HydraModelV2:
    """Returns eSEN, or UMA if there are experts, with a head for energies, forces and stresses."""
    settings: dict[str, Any] = {
        "sphere_channels": args.channels,
        "hidden_channels": args.channels,
        "edge_channels": args.channels,
        "num_distance_basis": 4 * args.channels,
        "num_layers": args.layers,
        "lmax": args.lmax,
        "mmax": args.lmax,
        "cutoff": CUTOFF,
        "otf_graph": True,
        "direct_forces": False,
        "regress_forces": True,
        "regress_stress": True,
        "use_dataset_embedding": False,
    }
    if args.experts:
        backbone = eSCNMDMoeBackbone(**settings, num_experts=args.experts, use_composition_embedding=True)
    else:
        backbone = eSCNMDBackbone(**settings)
    return HydraModelV2(backbone, {"efs": MLP_EFS_Head(backbone, wrap_property=False)}).double()


class Potential(lightning.LightningModule):
    """Trains a model of fairchem on energies per atom, forces and stresses, after the mean energy is taken off.

    Args:
        model: the model.
        mean_energy: eV for an atom.
    """

    def __init__(self, model: HydraModelV2, mean_energy: float) -> None:
        super().__init__()
        self.model = model
        self.mean_energy = mean_energy

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss."""
        out = self.model(batch)["efs"]
        loss = mse_loss(out["energy"] / batch.natoms, batch.energy / batch.natoms - self.mean_energy)
        loss = loss + 10 * mse_loss(out["forces"], batch.forces)
        loss = loss + 100 * mse_loss(out["stress"].reshape(batch.stress.shape), batch.stress)
        self.log("loss", loss, prog_bar=True, batch_size=len(batch.natoms))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the mean absolute error of the forces."""
        with torch.enable_grad():
            out = self.model(batch)["efs"]
        error = (out["forces"] - batch.forces).detach().abs().mean()
        self.log("val_forces_mae", error, prog_bar=True, batch_size=len(batch.natoms), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    """Trains eSEN or UMA with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--channels", type=int, default=16)
    parser.add_argument("--lmax", type=int, default=2)
    parser.add_argument("--experts", type=int, default=0, help="linear experts of UMA; 0 for eSEN")
    parser.add_argument("--epochs", type=int, default=4)
    args = parser.parse_args()

    lightning.seed_everything(0)
    train, val = samples(80, stream=0), samples(10, stream=1)
    mean_energy = sum(float(d.energy) for d in train) / sum(len(d.pos) for d in train)
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
    trainer.fit(
        Potential(build_model(args), mean_energy),
        DataLoader(train, batch_size=8, shuffle=True, collate_fn=atomicdata_list_to_batch),
        DataLoader(val, batch_size=8, collate_fn=atomicdata_list_to_batch),
    )


if __name__ == "__main__":
    main()
