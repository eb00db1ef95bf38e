"""MatRIS in a pipeline: energies, forces and stresses of alloys labelled with ASE's EMT, with no data to fetch.

    pip install matris==0.1.0
    python recipes/train_matris.py                    # two processes on the CPU, about a minute
    python recipes/train_matris.py --accelerator gpu --devices 4 --layers 6 --width 128 --epochs 20

The model, its graphs and the LightningModule are what they are without a pipeline; only the strategy is another one.
"""

from __future__ import annotations

import argparse
from typing import Any

import lightning
import torch
from ase.units import GPa
from matris.model.model import MatRIS
from pymatgen.io.ase import AseAtomsAdaptor
from torch import Tensor
from torch.nn.functional import huber_loss, l1_loss
from torch.utils.data import DataLoader

import lightning_januspipe
from lightning_januspipe.data import emt_structures


class MatRISModule(lightning.LightningModule):
    """Trains a MatRIS on energies per atom (eV), forces (eV/Å) and stresses (GPa)."""

    def __init__(self, layers: int, width: int, learning_rate: float = 2e-3) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.model = MatRIS(
            num_layers=layers,
            node_feat_dim=width,
            edge_feat_dim=width,
            three_body_feat_dim=width,
            mlp_hidden_dims=(width, width),
            pairwise_cutoff=4.5,
            three_body_cutoff=3.2,
        )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the loss."""
        graphs, labels = batch
        out = self.model(graphs, task="efs", is_training=self.training)
        loss = huber_loss(out["e"], labels["energy"]) + huber_loss(torch.cat(out["f"]), labels["forces"])
        loss = loss + 0.1 * huber_loss(torch.stack(out["s"]), labels["stress"])
        self.log("train_loss", loss, batch_size=len(graphs))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Logs the mean absolute error of the forces."""
        graphs, labels = batch
        with torch.enable_grad():
            out = self.model(graphs, task="efs", is_training=self.training)
        error = l1_loss(torch.cat(out["f"]).detach(), labels["forces"])
        self.log("val_forces_mae", error, batch_size=len(graphs), sync_dist=True, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def samples(module: MatRISModule, num: int, stream: int) -> list[Any]:
    """Graphs made by MatRIS, with labels."""
    found = []
    for atoms in emt_structures(num, sizes=(4, 8), stream=stream):
        labels = {
            "energy": [atoms.get_potential_energy() / len(atoms)],
            "forces": atoms.get_forces(),
            "stress": atoms.get_stress(voigt=False)[None] / GPa,
        }
        graph = module.model.graph_converter(AseAtomsAdaptor.get_structure(atoms))
        found.append((graph, {name: torch.as_tensor(value).float() for name, value in labels.items()}))
    return found


def collate(samples: list[Any]) -> tuple[list[Any], dict[str, Tensor]]:
    """Graphs in a list, labels of all structures one after the other."""
    graphs, labels = zip(*samples, strict=True)
    return list(graphs), {name: torch.cat([of[name] for of in labels]) for name in labels[0]}


def main() -> None:
    """Trains MatRIS with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()

    lightning.seed_everything(0)
    module = MatRISModule(arguments.layers, arguments.width)
    loaders = [
        DataLoader(samples(module, num, stream), batch_size=8, shuffle=stream == 0, collate_fn=collate)
        for stream, num in enumerate((64, 16))
    ]
    trainer = lightning.Trainer(
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        strategy=lightning_januspipe.JanusPipeStrategy(num_microbatches=4),
        max_epochs=arguments.epochs,
        log_every_n_steps=4,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        inference_mode=False,
    )
    trainer.fit(module, *loaders)
    trainer.validate(module, loaders[1])


if __name__ == "__main__":
    main()
