"""Train NequIP's own LightningModule on its own data module, and save losses, metrics and trained parameters.

python nequip_program.py --out plain.pt
python nequip_program.py --devices 2 --janus '{"num_microbatches": 4}' --out pipeline.pt
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning
import torch
from ase.io import write
from hydra.utils import instantiate
from lightning.pytorch.callbacks import ModelCheckpoint
from nequip.utils.global_state import set_global_state
from structures import CUTOFF, KINDS, SYMBOLS, labelled
from torch.utils.data import DataLoader, DistributedSampler

from lightning_januspipe.testing import quiet_trainer


class Losses(lightning.Callback):
    """Loss of every step."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.values.append(float(trainer.strategy.reduce(outputs["loss"].detach().clone(), reduce_op="mean")))


def ordered_loader(dataset: Any, num_replicas: int, **arguments: Any) -> DataLoader[Any]:
    """Returns a loader in the dataset's order, whose samples replicas take in turns; Lightning's sampler shuffles."""
    arguments.pop("generator")
    replica = torch.distributed.get_rank() % num_replicas if num_replicas > 1 else 0
    sampler = DistributedSampler(dataset, num_replicas, replica, shuffle=False)
    return DataLoader(dataset, sampler=sampler, **arguments)


def _set_state() -> None:
    set_global_state()
    torch.set_default_dtype(torch.float64)  # which NequIP sets once in a process only


_COMMON = {
    "seed": 7,
    "model_dtype": "float64",
    "type_names": list(SYMBOLS),
    "r_max": CUTOFF,
    "avg_num_neighbors": 20.0,
    "per_type_energy_shifts": dict(zip(SYMBOLS, [0.5, 0.2, 0.3], strict=True)),
    "per_type_energy_scales": 1.0,
}


def _nequip(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "_target_": "nequip.model.NequIPGNNModel",
        "num_layers": args.layers,
        "l_max": args.l_max,
        "parity": True,
        "num_features": 8,
        "radial_mlp_depth": 1,
        "radial_mlp_width": 16,
    }


def _allegro(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "_target_": "allegro.model.AllegroModel",
        "num_layers": args.layers,
        "l_max": args.l_max,
        "num_scalar_features": 8,
        "num_tensor_features": 4,
        "radial_chemical_embed": {"_target_": "allegro.nn.TwoBodyBesselScalarEmbed", "num_bessels": 4},
        "scalar_embed_mlp_hidden_layers_depth": 1,
        "scalar_embed_mlp_hidden_layers_width": 8,
        "allegro_mlp_hidden_layers_depth": 1,
        "allegro_mlp_hidden_layers_width": 8,
        "readout_mlp_hidden_layers_depth": 1,
        "readout_mlp_hidden_layers_width": 8,
    }


_ARCHITECTURES = {"nequip": _nequip, "allegro": _allegro}


def make_data(args: argparse.Namespace) -> Any:
    """Makes the data module as ``nequip-train`` makes it from a configuration."""
    _set_state()
    file = args.out.with_suffix(f".{lightning.fabric.utilities.rank_zero.rank_zero_only.rank}.xyz")
    write(file, labelled(args.structures, args.num_structures), format="extxyz")
    loader = {"_target_": f"{__name__}.ordered_loader", "batch_size": args.batch_size, "num_replicas": args.replicas}
    return instantiate(
        {
            "_target_": "nequip.data.datamodule.ASEDataModule",
            "seed": 1,
            "train_file_path": str(file),
            "val_file_path": str(file),
            "transforms": [
                {
                    "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
                    "model_type_names": list(SYMBOLS),
                },
                {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": CUTOFF},
            ],
            "train_dataloader": loader,
            "val_dataloader": loader,
        },
        _recursive_=False,
    )


def make_module(args: argparse.Namespace) -> Any:
    """Makes the training module so too, with metrics that reduce in every step and at the end of an epoch."""
    _set_state()
    kind, coefficients = "EnergyForce", {"total_energy": 1.0, "forces": 1.0}
    if args.structures == "crystals":
        kind, coefficients = "EnergyForceStress", {**coefficients, "stress": 1.0}
    metrics = {
        "_target_": f"nequip.train.{kind}Metrics",
        "coeffs": {f"{name}_mae": value for name, value in coefficients.items()},
    }
    return instantiate(
        {
            "_target_": f"nequip.train.{'EMA' if args.ema else 'NequIP'}LightningModule",
            **({"ema_decay": 0.9} if args.ema else {}),
            "loss": {"_target_": f"nequip.train.{kind}Loss", "per_atom_energy": True, "coeffs": coefficients},
            "train_metrics": metrics,
            "val_metrics": metrics,
            "optimizer": {"_target_": "torch.optim.Adam", "lr": 1e-3},
            "model": {**_COMMON, "compile_mode": args.compile_mode, **_ARCHITECTURES[args.model](args)},
        },
        _recursive_=False,
        _convert_="all",
        num_datasets={"train": 1, "val": 1, "test": 0, "predict": 0},
    )


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=list(_ARCHITECTURES), default="nequip")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--l-max", type=int, default=1)
    parser.add_argument("--compile-mode", default="eager")
    parser.add_argument("--ema", action="store_true", help="train an EMALightningModule")
    parser.add_argument("--structures", choices=list(KINDS), default="crystals")
    parser.add_argument("--num-structures", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1, help="accumulate_grad_batches")
    parser.add_argument("--epochs", type=int, default=1, help="of num-structures / batch-size steps")
    parser.add_argument("--validate", action="store_true", help="after every epoch")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--janus", type=json.loads, help="JSON of the arguments of JanusPipeStrategy")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args(given)


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if args.janus is not None:
        import lightning_januspipe
    losses = Losses()
    # NequIP's data module has no state after training.
    saving = ModelCheckpoint(args.out.parent, f"{args.out.stem}-{{epoch}}", save_top_k=-1)
    trainer = quiet_trainer(
        "auto" if args.janus is None else lightning_januspipe.JanusPipeStrategy(**args.janus),
        devices=args.devices,
        max_epochs=args.epochs,
        accumulate_grad_batches=args.accumulate,
        callbacks=[losses, saving],
        limit_val_batches=1.0 if args.validate else 0,
        inference_mode=False,
        enable_checkpointing=True,
        num_sanity_val_steps=2,
    )
    module, data = make_module(args), make_data(args)
    module.world_size = trainer.world_size  # as nequip-train does
    trainer.fit(module, datamodule=data, ckpt_path=args.resume, weights_only=False)
    metrics = {k: v for k, v in trainer.callback_metrics.items() if "step" not in k}
    if trainer.is_global_zero:
        saved = torch.load(saving.best_model_path, weights_only=False)
        state = {**saved["state_dict"], **{f"metric {k}": v for k, v in metrics.items()}}
        torch.save({"losses": losses.values, "state": state, "ema": state.get("ema._extra_state")}, args.out)


if __name__ == "__main__":
    main()
