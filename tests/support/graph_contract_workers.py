"""What graph ranks do in the tests of Lightning's contract: faults of one of them, and more."""

from __future__ import annotations

import time
from typing import Any
from unittest.mock import patch

import lightning
import tiny
import torch
from capture_models import Batch, Potential
from graph_habits import grid_of
from graph_models import Angles, Module, angles_of
from strategy_workers import plain
from torch import Tensor, nn

from lightning_januspipe.data import EMTDataModule
from lightning_januspipe.graph import shard_microbatch
from lightning_januspipe.graph.partition import partition_atoms
from lightning_januspipe.graph.shard_microbatch import MicrobatchSharder
from lightning_januspipe.runtime.single_stage import SingleStage
from lightning_januspipe.testing import quiet_trainer

FAULTY = 1
"""The rank that something happens to."""

TIMEOUT = 40
"""Seconds that a rank waits for a message."""


def ended(how: str, strategy: dict[str, Any]) -> tuple[str, float]:
    """Trains with a fault on one rank; how this rank ended, and how many seconds after the fault.

    Args:
        how: "before" the potential, while "sharding", in the "loss", "not finite", in "evaluation", or "other batch".
        strategy: sizes.
    """
    module, began = tiny.module(num_layers=2), [time.monotonic()]
    trainer = quiet_trainer(
        {"timeout": TIMEOUT, **strategy}, max_steps=2, limit_val_batches=int(how == "evaluation"), val_check_interval=1
    )

    def is_due() -> bool:
        is_here = trainer.strategy.mesh.rank == FAULTY and trainer.global_step == 1
        began[0] = time.monotonic() if is_here else began[0]
        return is_here

    def faulty(step: Any) -> Any:
        def run(batch: Batch, batch_idx: int) -> Any:
            if how == "before" and is_due():
                raise OSError("no such table")
            if how == "other batch" and is_due():
                batch = {**batch, "positions": batch["positions"] + 0.01}
            loss = step(batch, batch_idx)
            if how in ("loss", "evaluation") and is_due():
                raise OSError("no such table")
            return loss * torch.nan if how == "not finite" and is_due() else loss

        return run

    def read_indices(self: MicrobatchSharder, tensors: list[Tensor]) -> Any:
        if how == "sharding" and is_due():
            raise OSError("no such table")
        return read(self, tensors)

    read = MicrobatchSharder.read_indices
    name = "validation_step" if how == "evaluation" else "training_step"
    setattr(module, name, faulty(getattr(module, name)))
    try:
        with patch.object(MicrobatchSharder, "read_indices", read_indices):
            trainer.fit(module, tiny.data())
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began[0]
    return "", 0.0


def sane(strategy: dict[str, Any]) -> tuple[int, dict[str, float]]:
    """Returns how often this rank ran a whole structure in the sanity check, and what validation found."""
    calls = []
    whole = SingleStage.evaluate_step

    def counting(self: SingleStage, step: Any, batch: Any) -> Any:
        calls.append(len(batch["positions"]))
        return whole(self, step, batch)

    found: dict[str, float] = {}

    class Look(lightning.Callback):
        def on_sanity_check_end(self, trainer: Any, module: Any) -> None:
            found.update(plain(trainer.callback_metrics))

    trainer = quiet_trainer(strategy, max_steps=1, num_sanity_val_steps=1, limit_val_batches=1, callbacks=[Look()])
    with patch.object(SingleStage, "evaluate_step", counting):
        trainer.fit(tiny.module(num_layers=2), tiny.data())
    return len(calls), found


def sharded_steps(num_workers: int, other_way: bool = False) -> tuple[list[int], list[float]]:
    """Trains on two graph ranks in each stage, with four micro-batches in each step.

    Args:
        num_workers: of the loader.
        other_way: rank 1 divides atoms in another order than rank 0.

    Returns:
        For how many atoms this process chose owners each time while training, and the trained parameters.
    """
    strategy = {"graph_size": 2, "num_microbatches": 4, "schedule": "wavek"}
    module = tiny.module(num_layers=2)
    data = EMTDataModule(
        16, 4, 0, sizes=(4, 8, 16), dtype="float64", batch_size=8, shuffle=False, num_workers=num_workers
    )
    trainer = quiet_trainer(strategy, max_steps=2, limit_val_batches=0)
    chosen: list[int] = []

    def choose(target: Tensor, source: Tensor, num_atoms: int, *others: Any) -> Tensor:
        if trainer.strategy.runner is None:  # the proof before training
            return partition_atoms(target, source, num_atoms, *others)
        chosen.append(num_atoms)
        order: Any = "index" if other_way and trainer.strategy.mesh.rank == 1 else "spatial"
        return partition_atoms(target, source, num_atoms, *others, order=order)

    with patch.object(shard_microbatch, "partition_atoms", choose):
        trainer.fit(module, data)
    return chosen, torch.cat([p.detach().reshape(-1) for p in module.parameters()]).tolist()


def partly_frozen() -> Any:
    """Returns a module whose first layer is frozen, with a trained factor of the loss outside the potential."""
    module = tiny.module()
    module.factor = nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
    module.potential.energy_model.layers[0].requires_grad_(False)
    step = module.training_step
    module.training_step = lambda batch, batch_idx: module.factor.square() * step(batch, batch_idx)
    return module


# -- potentials with numbers that are easily mistaken ------------------------------------------------------------------


class Narrow(Potential):
    """Numbers of atoms in 32 bits."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        return super().features({**batch, "edges": batch["edges"].int()}, vectors)


class Table(Potential):
    """Three neighbours of each atom in a table, beside the list of edges."""

    def forward(self, batch: Batch) -> Any:
        return super().forward({**batch, "near": batch["near"]})

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        return h + torch.tanh(h[batch["near"]]).sum(1)


class Values(Potential):
    """The numbers of atoms are features too."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        odd = (2 * batch["edges"][0]).to(vectors.dtype)
        return super().features(batch, vectors * (1 + 0.01 * torch.cos(odd))[:, None])


class Grid(Potential):
    """A grid with a row of edges for each atom, and look-ups by places in it."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        edges, mask, reverse = grid_of(batch["edges"], h.shape[0])
        m = h[:, None] * torch.exp(-vectors.square().sum(1))[edges, None] * mask[..., None]
        return h + torch.tanh((m * m.reshape(-1, m.shape[2])[reverse]).sum(1))


class Pairs(Potential):
    """As many states as atoms, in another order: two classes whose sizes are always equal."""

    def forward(self, batch: Batch) -> Any:
        return super().forward({**batch, "partner": batch["partner"]})

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        return h + torch.tanh(torch.zeros_like(h).index_add(0, batch["partner"], h))


def table_of(batch: Batch) -> Batch:
    """Returns the same with three atoms for each, some of them itself."""
    index = batch["index"]
    first = torch.searchsorted(index, index)
    size = torch.bincount(index)[index]
    place = torch.arange(len(index)) - first
    near = torch.stack([first + (place + k) % size for k in (1, 2, 5)], 1)
    return {**batch, "near": near, "partner": near[:, 0]}


class _TableModule(Module):
    def prepared(self, batch: Batch) -> Batch:
        return table_of(batch)


class _AnglesModule(Module):
    def prepared(self, batch: Batch) -> Batch:
        return angles_of(batch)


def narrow() -> nn.Module:
    return Module(Narrow())


def table() -> nn.Module:
    return _TableModule(Table())


def grid() -> nn.Module:
    return Module(Grid())


def pairs() -> nn.Module:
    return _TableModule(Pairs())


def angles() -> nn.Module:
    return _AnglesModule(Angles())
