"""Train a small MatRIS in an ordinary LightningModule, in float64, and save losses and trained parameters.

python matris_program.py --out plain.pt
python matris_program.py --strategy januspipe --devices 2 --janus '{"num_microbatches": 4}' --out pipeline.pt
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
import matris.graph.converter
import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.units import GPa
from factories import Loader
from matris.model.model import MatRIS
from pymatgen.io.ase import AseAtomsAdaptor
from structures import CUTOFF, labelled
from torch.nn.functional import huber_loss
from torch.utils.data import DataLoader

from lightning_januspipe.testing import quiet_trainer

THREE_BODY_CUTOFF = 3.2
Sample = tuple[Any, dict[str, torch.Tensor]]


def crystal(index: int) -> Atoms:
    """Returns a rattled alloy."""
    return labelled("crystals", index + 1)[index]


def molecule(index: int) -> Atoms:
    """Returns a cluster in a large cell."""
    atoms = labelled("molecules", index + 1)[index]
    atoms.set_cell(14.0 * np.eye(3))
    atoms.pbc = True
    return atoms


def sparse(index: int) -> Atoms:
    """Returns an alloy of so large a lattice constant that no two edges are short enough for an angle."""
    atoms = crystal(index)
    atoms.set_cell(1.35 * atoms.cell, scale_atoms=True)
    return atoms


def single(index: int) -> Atoms:
    """Returns a cell with one atom."""
    return bulk("Cu", a=3.7 + 0.02 * index)


def mixed(index: int) -> Atoms:
    """Returns one of the kinds above, by turns."""
    return [crystal, molecule, sparse, single][index % 4](index)


STRUCTURES: dict[str, Callable[[int], Atoms]] = {
    "periodic": crystal,
    "molecules": molecule,
    "single": single,
    "mixed": mixed,
}


def sample(index: int, kind: str, converter: Callable[..., Any]) -> Sample:
    """A graph as MatRIS makes it, and labels: energy per atom (eV), forces (eV/Å), stress (GPa), magnetic moments."""
    atoms = STRUCTURES[kind](index)
    atoms.calc = EMT()
    labels = {
        "energy": [atoms.get_potential_energy() / len(atoms)],
        "forces": atoms.get_forces(),
        "stress": atoms.get_stress(voigt=False)[None] / GPa,
        "magmoms": np.random.default_rng(index).uniform(0.0, 2.0, len(atoms)),
    }
    graph = converter(AseAtomsAdaptor.get_structure(atoms))
    return graph, {name: torch.as_tensor(value, dtype=torch.float64) for name, value in labels.items()}


def collate(samples: list[Sample]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """Returns graphs in a list, as MatRIS takes them, and labels of all structures."""
    graphs, labels = zip(*samples, strict=True)
    return list(graphs), {name: torch.cat([of[name] for of in labels]) for name in labels[0]}


class Training(lightning.LightningModule):
    """Huber losses of all that MatRIS predicts."""

    def __init__(self, layers: int, task: str) -> None:
        super().__init__()
        torch.manual_seed(7)
        width: dict[str, Any] = {f"{part}_feat_dim": 8 for part in ("node", "edge", "three_body")}
        cutoffs = {"pairwise_cutoff": CUTOFF, "three_body_cutoff": THREE_BODY_CUTOFF}
        self.model = MatRIS(num_layers=layers, mlp_hidden_dims=(8, 8), **width, **cutoffs).double()
        self.task = task

    def loss(self, batch: Any, is_training: bool) -> torch.Tensor:
        graphs, labels = batch
        out = self.model(graphs, task=self.task, is_training=is_training)
        loss = huber_loss(out["e"], labels["energy"]) + huber_loss(torch.cat(out["f"]), labels["forces"])
        if "s" in self.task:
            loss = loss + 0.1 * huber_loss(torch.stack(out["s"]), labels["stress"])
        if "m" in self.task:
            loss = loss + 0.1 * huber_loss(torch.cat(out["m"]), labels["magmoms"])
        return loss

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(batch, is_training=True)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        with torch.enable_grad():
            self.log("val_loss", self.loss(batch, is_training=False), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def make_module(args: argparse.Namespace) -> Training:
    """Makes the module that the options ask for."""
    torch.set_default_dtype(torch.float64)
    return Training(args.layers, args.task)


def make_data(args: argparse.Namespace) -> Loader:
    """Makes the data that the options ask for."""
    torch.set_default_dtype(torch.float64)
    matris.graph.converter.datatype = torch.float64
    convert = make_module(args).model.graph_converter
    number = args.batch_size * args.accumulate * args.steps
    samples = [sample(i, args.structures, convert) for i in range(number)]
    return Loader(DataLoader(samples, batch_size=args.batch_size, collate_fn=collate))  # type: ignore[arg-type]


class Losses(lightning.Callback):
    """The loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--task", default="efsm", help="what MatRIS predicts")
    parser.add_argument("--structures", choices=list(STRUCTURES), default="periodic")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1, help="accumulate_grad_batches")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--strategy", choices=["auto", "januspipe"], default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--janus", type=json.loads, default={}, help="JSON of the arguments of JanusPipeStrategy")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="pymatgen")
    strategy: Any = args.strategy
    if strategy == "januspipe":
        import lightning_januspipe

        strategy = lightning_januspipe.JanusPipeStrategy(**args.janus)
    module, loader = make_module(args), make_data(args).train_dataloader()
    losses = Losses()
    trainer = quiet_trainer(
        strategy,
        devices=args.devices,
        max_epochs=1,
        accumulate_grad_batches=args.accumulate,
        callbacks=[losses],
        limit_val_batches=2,
        inference_mode=False,
    )
    trainer.fit(module, loader, DataLoader(loader.dataset, batch_size=4, collate_fn=collate))  # type: ignore[arg-type]
    checkpoint = args.out.with_suffix(".ckpt")
    trainer.save_checkpoint(checkpoint, weights_only=True)
    if trainer.is_global_zero:
        state = torch.load(checkpoint, weights_only=False)["state_dict"]
        metrics = {f"metric {name}": value for name, value in trainer.callback_metrics.items()}
        torch.save({"losses": losses.values, "state": {**state, **metrics}}, args.out)


if __name__ == "__main__":
    main()
