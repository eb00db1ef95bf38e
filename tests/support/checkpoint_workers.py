"""What the ranks of the checkpoints' tests run: training that is saved, interrupted, and resumed elsewhere."""

from __future__ import annotations

import os
import random
import resource
import signal
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning
import numpy as np
import tiny
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint, OnExceptionCheckpoint
from strategy_workers import plain
from torch.utils.data import DataLoader, DistributedSampler

from lightning_januspipe.testing import quiet_trainer

GLOBAL_BATCH = 4
NUM_BATCHES = 4
"""Batches of an epoch; structures are of one size, so that a step is the same on every mesh."""


def data(num_replicas: int = 1, shuffle: bool = False, num_train: int = GLOBAL_BATCH * NUM_BATCHES) -> Any:
    """Returns structures of four atoms; a batch of all replicas together has four, the same ones on every mesh.

    With ``shuffle`` their order comes from the random numbers of the process, else from the epoch.
    """
    from lightning_januspipe.data import EMTDataModule

    class Data(EMTDataModule):
        def train_dataloader(self) -> Any:
            loader = super().train_dataloader()
            if shuffle:
                return loader
            replica = int(os.environ["RANK"]) % num_replicas
            sampler: Any = DistributedSampler(loader.dataset, num_replicas, replica)
            return DataLoader(
                loader.dataset, loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn, num_workers=0
            )

    return Data(
        num_train=num_train,
        num_val=2,
        num_test=2,
        sizes=(4,),
        dtype="float64",
        batch_size=GLOBAL_BATCH // num_replicas,
        shuffle=shuffle,
    )


class Stop(Callback):
    """Ends a run after some batches, on one rank or on all."""

    def __init__(self, how: str, num_batches: int, rank: int | None) -> None:
        self.how, self.num_batches, self.rank = how, num_batches, rank

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step != self.num_batches or self.rank not in (None, trainer.global_rank):
            return
        if self.how == "exception":
            raise RuntimeError("a callback has failed")
        if self.how == "full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
            return
        os.kill(os.getpid(), {"sigterm": signal.SIGTERM, "sigkill": signal.SIGKILL}[self.how])


class SaveAtEnd(Callback):
    """Saves when the loops have ended."""

    def __init__(self, folder: str) -> None:
        self.file = f"{folder}/end.ckpt"

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        trainer.save_checkpoint(self.file)


class WriteOver(Callback):
    """Writes zeros over the checkpoint that a run was resumed from, in place, when no optimizer has stepped yet."""

    def on_before_optimizer_step(self, trainer: Any, *_: Any) -> None:
        file = Path(trainer.ckpt_path)
        if trainer.global_rank == 0 and trainer.global_step == 4:
            with file.open("r+b") as stream:
                stream.write(bytes(file.stat().st_size))


class Residents(Callback):
    """Notes how many bytes of parameters, and of the optimizer's states, are in memory in training."""

    def __init__(self) -> None:
        self.bytes: tuple[int, int] = (0, 0)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        states = [t for s in trainer.optimizers[0].state.values() for t in s.values()]
        leaves = [p for g in trainer.optimizers[0].param_groups for p in g["params"]]
        self.bytes = _memory([*module.parameters(), *leaves]), _bytes(states)


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _memory(tensors: Any) -> int:
    """Returns the bytes of the memory of tensors, that of views once."""
    storages = [t.untyped_storage() for t in tensors if not t.is_meta]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


class Noise(Callback):
    """Random numbers of all kinds change the learning rate in every step."""

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        factor = 1 + 0.2 * (random.random() + float(np.random.rand()) + float(torch.rand(())))
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = 1e-3 * factor


def module_in_hook(num_features: int = 8, tied: bool = False) -> Any:
    """Returns a module whose potential is made in ``configure_model``; its optimizer has momentum and a schedule.

    Args:
        num_features: channels.
        tied: whether the last two layers share a part of their weights.
    """
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    class Made(PotentialModule):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            torch.set_default_dtype(torch.float64)
            super().__init__(torch.nn.Identity(), stress_weight=1.0)
            self.potential = None

        def configure_model(self) -> None:
            if self.potential is None:
                torch.manual_seed(0)
                self.potential = EquivariantPotential(
                    ["Cu", "Ni", "Al"], 5.0, num_layers=4, num_features=num_features, l_max=1
                )
                if tied:
                    *_, before, last = self.potential.energy_model.layers
                    last.radial_network.linears[0] = before.radial_network.linears[0]
                    last.radial_network.linears[1] = before.radial_network.linears[1]

    return Made()


def train(
    strategy: dict[str, Any] | None,
    folder: str,
    more: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Trains and saves into a folder, with the arguments of :func:`_train` in a dict, which a pool can send."""
    return _train(strategy, folder, **(more or {}))


def _train(
    strategy: dict[str, Any] | None,
    folder: str,
    *,
    num_steps: int = 8,
    resume: str | None = None,
    stop: tuple[str, int, int | None] | None = None,
    callbacks: tuple[str, ...] = ("every step",),
    num_features: int = 0,
    tied: bool = False,
    shuffle: bool = False,
    num_train: int = GLOBAL_BATCH * NUM_BATCHES,
    arguments: dict[str, Any] | None = None,
    module: Any = tiny.module,
) -> dict[str, Any]:
    """Trains and saves into a folder; returns how it ended, and the module as it is then.

    Args:
        strategy: arguments of the strategy, of which some have other defaults here; None is plain Lightning.
        folder: of the checkpoints.
        num_steps: optimizer steps in all.
        resume: ckpt_path.
        stop: how to end before, after how many steps, and on which rank (None: all).
        callbacks: names in CALLBACKS.
        num_features: of a module that is made in ``configure_model``; 0 is one that is not.
        tied: whether layers of that module share weights.
        shuffle: whether the training data are shuffled.
        num_train: structures of the training data.
        arguments: of the Trainer.
        module: makes another module, where ``num_features`` is 0.
    """
    made = module_in_hook(num_features, tied) if num_features else module()
    chosen = [CALLBACKS[name](folder) for name in callbacks]
    chosen += [Stop(*stop)] if stop else []
    num_replicas = 1 if strategy is None else strategy.get("data_size", 1)
    # In a pool a rank may wait in vain for ranks that have failed: their processes, and their connections, live on.
    given = {"num_microbatches": 1, "schedule": "wavek", "timeout": 60 if stop else 300, "shard": "none"}
    given |= strategy or {}
    residents = Residents()
    lightning.seed_everything(1, verbose=False)
    trainer = quiet_trainer(
        None if strategy is None else given,
        max_steps=num_steps,
        callbacks=[*chosen, residents],
        enable_checkpointing=True,
        **{"limit_val_batches": 0, **(arguments or {})},
    )
    ended = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            trainer.fit(made, data(num_replicas, shuffle, num_train), ckpt_path=resume)
        except (Exception, SystemExit) as error:
            ended = f"{type(error).__name__}: {error}"
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    return {
        "ended": ended,
        "warnings": [str(w.message) for w in caught if "saves no checkpoint" in str(w.message)],
        "step": trainer.global_step,
        "bytes": residents.bytes,
        "resumed": str(trainer.ckpt_path or ""),
        "metrics": plain(trainer.callback_metrics),
        # After an exception parameters in shards stay there.
        "state": {}
        if ended and given["shard"] == "parameters"
        else {k: v.clone() for k, v in made.state_dict().items()},
    }


CALLBACKS: dict[str, Any] = {
    "every step": lambda folder: ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last=True),
    "link": lambda folder: ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_last="link"),
    "two best": lambda folder: ModelCheckpoint(
        folder, "{step}", monitor="train_loss", save_top_k=2, every_n_train_steps=1, save_last="link"
    ),
    "weights": lambda folder: ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_weights_only=True),
    "on exception": lambda folder: OnExceptionCheckpoint(folder),
    "last on exception": lambda folder: ModelCheckpoint(
        folder, "{step}", every_n_train_steps=3, save_last="link", save_on_exception=True
    ),
    "average": lambda folder: EMAWeightAveraging(decay=0.8),
    "every epoch": lambda folder: ModelCheckpoint(folder, "end"),
    "at the end": SaveAtEnd,
    "noise": lambda folder: Noise(),
    "written over": lambda folder: WriteOver(),
}


def killed_in_saving(strategy: dict[str, Any], folder: str, step: int) -> None:
    """Rank 0 is killed when it has written a half of a checkpoint."""
    save = torch.save

    def half(value: Any, file: Any, *arguments: Any, **more: Any) -> None:
        save(value, file, *arguments, **more)
        if isinstance(value, dict) and value.get("global_step") == step:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(torch, "save", half):
        train(strategy, folder)


def evaluate(strategy: dict[str, Any] | None, checkpoint: str, weights_only: bool | None = None) -> Any:
    """Validates with the weights of a checkpoint."""
    trainer = quiet_trainer(strategy, use_distributed_sampler=False)
    return trainer.validate(tiny.module(), data(), ckpt_path=checkpoint, weights_only=weights_only, verbose=False)


def names(folder: str | Path) -> list[str]:
    """Returns what is in a folder, hidden names too; links with what they point to."""
    found = []
    for path in Path(folder).iterdir():
        found.append(f"{path.name} -> {os.readlink(path)}" if path.is_symlink() else path.name)
    return sorted(found)
