"""Trains a small MatGL potential as MatGL's documentation shows, by an ordinary lightning.Trainer, in float64.

python matgl_program.py --model tensornet --steps 5 --out plain.pt
python matgl_program.py --model tensornet --steps 5 --out januspipe.pt --strategy januspipe --devices 2
"""

from __future__ import annotations

import argparse
import importlib
import json
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import matgl
import numpy as np
import torch
from ase import Atoms
from factories import Loader
from matgl.ext.ase import Atoms2Graph
from matgl.graph.data import MGLDataset, collate_fn_pes
from matgl.models import CHGNet, M3GNet, TensorNet
from matgl.utils.constants import EV_PER_ANG3_TO_GPA
from matgl.utils.training import PotentialLightningModule
from structures import CUTOFF, SYMBOLS, labelled
from torch.utils.data import DataLoader

from lightning_januspipe.testing import quiet_trainer

THREEBODY_CUTOFF = 3.2


def frames(kind: str, number: int, lone_atom: bool) -> list[Atoms]:
    """Returns labelled structures.

    Args:
        kind: ``periodic``, ``molecules`` or ``mixed``.
        number: how many.
        lone_atom: the fourth of them is an atom by itself.
    """
    crystals, molecules = labelled("crystals", number), labelled("molecules", number)
    mixed = [both[i % 2] for i, both in enumerate(zip(crystals, molecules, strict=True))]
    found = {"periodic": crystals, "molecules": molecules, "mixed": mixed}[kind]
    if lone_atom:
        found[3] = labelled("lone", 2)[1]
    return found


def labels(structures: list[Atoms]) -> dict[str, list[Any]]:
    """Returns labels in MatGL's units: eV, eV/Å, GPa (zero without a cell); magnetic moments are made up."""
    rng = np.random.default_rng(1)
    stresses = [a.get_stress(voigt=False) * EV_PER_ANG3_TO_GPA if a.pbc.all() else np.zeros((3, 3)) for a in structures]
    return {
        "energies": [float(a.get_potential_energy()) for a in structures],
        "forces": [a.get_forces().tolist() for a in structures],
        "stresses": [s.tolist() for s in stresses],
        "magmoms": [rng.uniform(0.0, 2.0, len(a)).tolist() for a in structures],
    }


def build_model(name: str, layers: int) -> torch.nn.Module:
    """Returns one of MatGL's potentials, with few features."""
    torch.manual_seed(7)
    if name == "tensornet":
        return TensorNet(
            SYMBOLS, units=8, nblocks=layers, num_rbf=8, cutoff=CUTOFF, is_intensive=False, dtype=torch.float64
        )
    if name == "m3gnet":
        width = {"dim_node_embedding": 8, "dim_edge_embedding": 8, "units": 8}
        return M3GNet(
            SYMBOLS, nblocks=layers, cutoff=CUTOFF, threebody_cutoff=THREEBODY_CUTOFF, is_intensive=False, **width
        )
    width = {f"dim_{part}_embedding": 8 for part in ("atom", "bond", "angle")}
    hidden = {"atom_conv_hidden_dims": (8,), "bond_conv_hidden_dims": (8,), "final_hidden_dims": (8, 8)}
    return CHGNet(SYMBOLS, num_blocks=layers, cutoff=CUTOFF, threebody_cutoff=THREEBODY_CUTOFF, **width, **hidden)


def make_data(args: argparse.Namespace) -> Loader:
    """Makes the data that the options ask for; magnetic moments for ``chgnet``."""
    matgl.set_default_dtype("float", 64)
    structures = frames(args.structures, args.frames, args.lone_atom)
    dataset = MGLDataset(
        structures=structures,
        converter=Atoms2Graph(SYMBOLS, CUTOFF),
        labels=labels(structures),
        root=tempfile.mkdtemp(),
        save_cache=False,
    )
    collate = partial(collate_fn_pes, include_stress=True, include_magmom=args.model == "chgnet")
    return Loader(DataLoader(dataset, batch_size=args.batch_size, collate_fn=collate))


def make_module(args: argparse.Namespace) -> PotentialLightningModule:
    """Makes the module that the options ask for; ``chgnet`` learns magnetic moments too."""
    matgl.set_default_dtype("float", 64)
    return PotentialLightningModule(
        build_model(args.model, args.layers),
        element_refs=np.array([-0.1, 0.2, 0.3]),
        stress_weight=0.1,
        magmom_weight=0.1 if args.model == "chgnet" else 0.0,
        data_std=1.5,
        loss=args.loss,
        lr=1e-3,
    )


def strategy(args: argparse.Namespace) -> Any:
    """Returns the registered name, or the strategy with the arguments of ``--janus``."""
    januspipe = importlib.import_module("lightning_januspipe") if args.strategy == "januspipe" else None
    if januspipe is not None and args.janus:
        return januspipe.JanusPipeStrategy(**json.loads(args.janus))
    return args.strategy


class Losses(lightning.Callback):
    """The loss of every batch."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(outputs["loss"]))


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["tensornet", "m3gnet", "chgnet"], default="tensornet")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--structures", choices=["periodic", "molecules", "mixed"], default="periodic")
    parser.add_argument("--frames", type=int, default=24)
    parser.add_argument("--lone-atom", action="store_true", help="one structure is a single atom without neighbors")
    parser.add_argument("--validate", action="store_true", help="on the first two training batches")
    parser.add_argument("--loss", default="mse_loss", help="one of MatGL's")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--janus", default="", help="JSON of JanusPipeStrategy's arguments")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    loader, module = make_data(args).train_dataloader(), make_module(args)
    losses = Losses()
    trainer = quiet_trainer(
        strategy(args),
        devices=args.devices,
        max_steps=args.steps,
        accumulate_grad_batches=args.accumulate,
        callbacks=[losses],
        inference_mode=False,
        limit_val_batches=2,
        num_sanity_val_steps=1,
    )
    trainer.fit(module, loader, loader if args.validate else None)
    checkpoint = args.out.with_suffix(".ckpt")
    trainer.save_checkpoint(checkpoint, weights_only=True)
    if trainer.is_global_zero:
        state = torch.load(checkpoint, weights_only=False)["state_dict"]
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        torch.save({"losses": losses.values, "state": state, "metrics": metrics}, args.out)


if __name__ == "__main__":
    main()
