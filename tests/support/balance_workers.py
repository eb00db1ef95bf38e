"""What ranks run to see which samples they train on."""

from __future__ import annotations

import itertools
from typing import Any

import tiny
import torch

from lightning_januspipe.testing import quiet_trainer


def seen(strategy: dict[str, Any], data: dict[str, Any], save: str = "", resume: str = "", **trainer: Any) -> Any:
    """Returns the energies and the numbers of edges of the micro-batches of every batch that this rank trains on.

    Args:
        strategy: arguments of the strategy.
        data: arguments of the data module.
        save: folder for a checkpoint after each step, "step=1.ckpt" and so on.
        resume: a checkpoint to go on from.
        trainer: arguments of the Trainer.
    """
    from lightning_januspipe.data import EMTDataModule

    torch.manual_seed(0)
    module = tiny.module(num_layers=1, stress_weight=0.0)
    defaults = {"num_train": 30, "num_val": 0, "num_test": 0, "sizes": (4, 8, 16), "dtype": "float64", "batch_size": 6}
    found: list[Any] = []

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        found.append([(m["energy"].tolist(), m["edge_index"].shape[1]) for m in batch])

    module.on_train_batch_start = on_train_batch_start
    if save:
        from lightning.pytorch.callbacks import ModelCheckpoint

        keep = ModelCheckpoint(save, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer |= {"callbacks": [keep], "enable_checkpointing": True}
    made = quiet_trainer(strategy, limit_val_batches=0, **{"use_distributed_sampler": True, "max_epochs": 1, **trainer})
    made.fit(module, EMTDataModule(**{**defaults, **data}), ckpt_path=resume or None)
    return found


def of_steps(ranks: list[Any]) -> list[list[float]]:
    """Returns the energies of the samples of all replicas, for each step, in no order."""
    return [
        sorted(itertools.chain(*(energies for batch in step for energies, _ in batch)))
        for step in zip(*ranks, strict=True)
    ]


def fit_iterable(balance: str) -> str:
    """Returns the error that training on a stream ends with; empty without one."""
    import loaders
    from torch.utils.data import DataLoader

    from lightning_januspipe.data import collate_structures

    module, data = tiny.module(num_layers=1), tiny.data(num_train=8)
    data.setup("fit")
    stream = loaders.ResumableStructures(data.dataset("train"))
    strategy = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2, "balance": balance}
    trainer = quiet_trainer(strategy, max_epochs=1, limit_val_batches=0)
    try:
        trainer.fit(module, DataLoader(stream, batch_size=4, collate_fn=collate_structures))
    except ValueError as error:
        return str(error)
    return ""
