"""Train SchNetPack's own task on its own data module, and save losses, metrics and trained parameters.

python schnetpack_program.py --out plain.pt
python schnetpack_program.py --devices 2 --janus '{"num_microbatches": 4}' --out pipeline.pt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.utils.data.dataloader as dataloader
from structures import CUTOFF, KINDS, labelled

if not hasattr(dataloader, "T_co"):  # SchNetPack 2.1 imports a name that torch no longer has
    dataloader.T_co = TypeVar("T_co", covariant=True)

import pytorch_lightning
import schnetpack as spk
import torchmetrics
from ase.db import connect
from pytorch_lightning.callbacks import Callback
from schnetpack.data import AtomsDataModule, AtomsLoader

from lightning_januspipe.testing import quiet_trainer

UNITS = {"energy": "eV", "forces": "eV/Ang", "stress": "eV/Ang/Ang/Ang"}


class InOrder(AtomsDataModule):
    """Structures in their order, as two runs with different batch sizes have to see the same ones."""

    def train_dataloader(self) -> AtomsLoader:
        return AtomsLoader(self.train_dataset, batch_size=self.batch_size)


class Losses(Callback):
    """Loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))


def make_data(args: argparse.Namespace) -> AtomsDataModule:
    """Makes a database, its split and its transforms."""
    rank = pytorch_lightning.utilities.rank_zero.rank_zero_only.rank
    database, split = (args.out.with_suffix(f".{rank}.{end}") for end in ("db", "npz"))
    database.unlink(missing_ok=True)
    with connect(database, use_lock_file=False) as file:
        properties = {k: UNITS[k] for k in properties_of(args)}
        file.metadata = {"_property_unit_dict": properties, "_distance_unit": "Ang", "atomrefs": {}}
        for atoms in labelled(args.structures, args.num_structures):
            values = {"energy": np.array([atoms.get_potential_energy()]), "forces": atoms.get_forces()}
            if "stress" in properties:
                values["stress"] = atoms.get_stress(voigt=False)[None]
            file.write(atoms, data=values)
    indices = np.arange(args.num_structures)
    np.savez(split, train_idx=indices, val_idx=indices[::3], test_idx=indices[:2])
    transforms = [spk.transform.MatScipyNeighborList(cutoff=CUTOFF), spk.transform.CastTo64()]
    arguments = {"split_file": str(split), "transforms": transforms, "num_workers": 0}
    return InOrder(str(database), args.batch_size, args.num_structures, len(indices[::3]), **arguments)


def properties_of(args: argparse.Namespace) -> list[str]:
    return ["energy", "forces", *(["stress"] if args.structures == "crystals" else [])]


def make_module(args: argparse.Namespace) -> Any:
    """Makes the task, with metrics of each of its outputs."""
    pytorch_lightning.seed_everything(7)
    torch.set_default_dtype(torch.float32)
    representation = {"painn": spk.representation.PaiNN, "schnet": spk.representation.SchNet}[args.model](
        n_atom_basis=16,
        n_interactions=args.layers,
        radial_basis=spk.nn.GaussianRBF(8, CUTOFF),
        cutoff_fn=spk.nn.CosineCutoff(CUTOFF),
        **args.options,
    )
    stress = "stress" in properties_of(args)
    model = spk.model.NeuralNetworkPotential(
        representation=representation,
        input_modules=[*([spk.atomistic.Strain()] if stress else []), spk.atomistic.PairwiseDistances()],
        output_modules=[spk.atomistic.Atomwise(n_in=16, output_key="energy"), spk.atomistic.Forces(calc_stress=stress)],
        input_dtype_str="float64",
    )
    outputs = []
    for name, weight in (("energy", 0.1), ("forces", 1.0), *([("stress", 10.0)] if stress else [])):
        # torchmetrics cannot take the stress that SchNetPack returns, which is not contiguous.
        metrics = {} if name == "stress" else {"MAE": torchmetrics.MeanAbsoluteError()}
        outputs.append(spk.task.ModelOutput(name, torch.nn.MSELoss(), weight, metrics))
    made = spk.task.AtomisticTask(
        model,
        outputs,
        optimizer_cls=torch.optim.AdamW,
        optimizer_args={"lr": 1e-3, "weight_decay": 0.01},
        warmup_steps=3,
    )
    # PaiNN makes its vectors with the default type, which GaussianRBF would not survive when it is made.
    torch.set_default_dtype(torch.float64)
    return made.double()


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=["painn", "schnet"], default="painn")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--options", type=json.loads, default={}, help="JSON of other arguments of the representation")
    parser.add_argument("--ema", action="store_true", help="with SchNetPack's moving average")
    parser.add_argument("--structures", choices=list(KINDS), default="crystals")
    parser.add_argument("--num-structures", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1, help="accumulate_grad_batches")
    parser.add_argument("--epochs", type=int, default=1, help="of num-structures / batch-size steps")
    parser.add_argument("--validate", action="store_true", help="after every epoch, and save the best model")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--janus", type=json.loads, help="JSON of the arguments of JanusPipeStrategy")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    pytorch_lightning.seed_everything(7)
    strategy: Any = "auto"
    if args.janus is not None:
        from lightning_januspipe.pytorch_lightning import JanusPipeStrategy

        strategy = JanusPipeStrategy(**args.janus)
    losses = Losses()
    files = {"dirpath": args.out.parent, "filename": f"{args.out.stem}-{{epoch}}", "save_top_k": -1}
    best = args.out.with_suffix(".model")
    if args.validate:
        saving = spk.train.ModelCheckpoint(best, **files, monitor="val_loss")
    else:
        saving = pytorch_lightning.callbacks.ModelCheckpoint(**files)
    average = [spk.train.ExponentialMovingAverage(decay=0.9)] if args.ema else []
    trainer = quiet_trainer(
        strategy,
        namespace="pytorch_lightning",
        devices=args.devices,
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        callbacks=[losses, *average, saving],
        limit_val_batches=1.0 if args.validate else 0,
        inference_mode=False,
        enable_checkpointing=True,
    )
    module, data = make_module(args), make_data(args)
    trainer.fit(module, datamodule=data, ckpt_path=args.resume, weights_only=False)
    metrics = {f"metric {k}": v for k, v in trainer.callback_metrics.items() if not k.startswith("train")}
    if trainer.is_global_zero:
        saved = torch.load(args.out.parent / f"{args.out.stem}-epoch={args.epochs - 1}.ckpt", weights_only=False)
        state = {**saved["state_dict"], **metrics, **averages(saved)}
        if args.validate:
            model = torch.load(best, weights_only=False)
            state.update({f"best {n}": p for n, p in model.state_dict().items()})
        torch.save({"losses": losses.values, "state": state}, args.out)


def averages(checkpoint: Any) -> dict[str, Any]:
    """Returns what SchNetPack's moving average saved."""
    lists = checkpoint["callbacks"].get("ExponentialMovingAverage", {}).get("ema", {})
    kept = {name: lists.get(name) or [] for name in ("shadow_params", "collected_params")}
    return {f"{name} {i}": value for name, values in kept.items() for i, value in enumerate(values)}


if __name__ == "__main__":
    main()
