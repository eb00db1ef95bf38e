"""MatGL in a pipeline: energies, forces and stresses of alloys labelled with ASE's EMT, with no data to fetch.

    pip install matgl==4.1.2
    python recipes/train_matgl.py                      # two processes on the CPU, about a minute
    python recipes/train_matgl.py --model CHGNet --accelerator gpu --devices 4 --layers 6 --width 128 --epochs 20

Dataset, model and trainer are MatGL's own, as without a pipeline; only the strategy is another one.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from ase.io import write
from matgl import MGLDatasetLoader, MGLPotentialTrainer, models
from matgl.utils.training import fit_element_refs

import lightning_januspipe
from lightning_januspipe.data import emt_structures

CUTOFF = 4.5


def build_model(name: str, elements: tuple[str, ...], layers: int, width: int) -> Any:
    """One of MatGL's potentials."""
    parts = {
        "TensorNet": {"nblocks": layers, "units": width},
        "M3GNet": {"nblocks": layers, **dict.fromkeys(("units", "dim_node_embedding", "dim_edge_embedding"), width)},
        "CHGNet": {
            "num_blocks": layers,
            **{f"dim_{part}_embedding": width for part in ("atom", "bond", "angle")},
            **{f"{part}_hidden_dims": (width,) for part in ("atom_conv", "bond_conv", "final")},
        },
    }
    return getattr(models, name)(element_types=elements, cutoff=CUTOFF, is_intensive=False, **parts[name])


def main() -> None:
    """Trains a model of MatGL with the options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", choices=["TensorNet", "M3GNet", "CHGNet"], default="TensorNet")
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "emt.extxyz"
        write(file, emt_structures(100, sizes=(4, 8)), format="extxyz")
        dataset = MGLDatasetLoader.from_extxyz(file, cutoff=CUTOFF, save_cache=False, root=folder)
    elements = dataset.element_types
    trainer = MGLPotentialTrainer(
        build_model(arguments.model, elements, arguments.layers, arguments.width),
        accelerator=arguments.accelerator,
        devices=arguments.devices,
        max_epochs=arguments.epochs,
        batch_size=8,
        lr=5e-3,
        loader_kwargs={"frac_list": (0.8, 0.1, 0.1), "num_workers": 0},
        trainer_kwargs={
            "strategy": lightning_januspipe.JanusPipeStrategy(num_microbatches=4),
            "log_every_n_steps": 5,
            "logger": False,
            "enable_checkpointing": False,
        },
    )
    trainer.fit(dataset, atomrefs=fit_element_refs(dataset.structures, dataset.labels["energies"], elements))


if __name__ == "__main__":
    main()
