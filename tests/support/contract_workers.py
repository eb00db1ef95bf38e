"""What the ranks of the tests of Lightning's contract run; each module does one thing that users do."""

from __future__ import annotations

import copy
from typing import Any

import lightning
import tiny
import torch
from strategy_workers import plain
from torch import Tensor

from lightning_januspipe.testing import quiet_trainer


def changed_step(module: Any, around: Any) -> Any:
    """Replaces the training step by ``around(step, batch, batch_idx)``."""
    step = module.training_step
    module.training_step = lambda batch, batch_idx: around(step, batch, batch_idx)
    return module


def random_numbers(strategy: dict[str, Any]) -> list[float]:
    """Trains a step that draws random numbers behind the potential; returns them."""
    drawn: list[float] = []

    def around(step: Any, batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        drawn.append(float(torch.rand(())))
        return loss

    trainer = quiet_trainer(strategy, max_steps=3, limit_val_batches=0)
    module = changed_step(tiny.module(), around)
    module.on_train_batch_start = lambda *_: drawn.clear() if trainer.global_step == 0 else None  # those of the capture
    trainer.fit(module, tiny.data())
    return drawn


class Penalty(torch.nn.Module):
    """Reads parameters that are not its own."""

    def forward(self, parameters: list[Tensor]) -> Tensor:
        return torch.stack([p.square().sum() for p in parameters]).sum()


def outside_parameters(how: str, validate_first: bool) -> str:
    """Returns a loss that reads the potential's parameters past the potential."""
    module = tiny.module()
    module.penalty = Penalty()

    def around(step: Any, batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        parameters = list(module.potential.parameters())
        if how == "submodule":
            return loss + module.penalty(parameters)
        if how == "directly":
            return loss + parameters[0].square().sum()
        return loss + module.potential.energy_model.embedding(batch["species"]).square().sum()

    changed_step(module, around)
    trainer = quiet_trainer({"num_microbatches": 1, "schedule": "wavek"}, max_steps=1, limit_val_batches=2)
    try:
        if validate_first:
            trainer.validate(module, tiny.data(), verbose=False)
        trainer.fit(module, tiny.data())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def unfrozen() -> str:
    """Returns a callback that freezes a layer after the first step."""

    class Freeze(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            module.potential.energy_model.layers[0].requires_grad_(False)

    trainer = quiet_trainer({"schedule": "wavek"}, max_steps=2, limit_val_batches=0, callbacks=[Freeze()])
    try:
        trainer.fit(tiny.module(), tiny.data())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def several_loaders() -> str:
    """Returns a dict of training loaders."""
    loaders = {"a": tiny.data().train_dataloader(), "b": tiny.data().train_dataloader()}
    try:
        quiet_trainer({}, max_steps=1, limit_val_batches=0).fit(tiny.module(), loaders)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def collected_outputs() -> dict[str, Any]:
    """Returns a module that collects the losses of its steps in a list, and counts them."""
    module = tiny.module()
    module.collected, module.calls = [], 0

    def around(step: Any, batch: Any, batch_idx: int) -> Any:
        loss = step(batch, batch_idx)
        module.collected.append(float(loss))
        module.calls += 1
        return loss

    changed_step(module, around)
    quiet_trainer({"num_microbatches": 2}, max_steps=2, limit_val_batches=0).fit(module, tiny.data())
    return {"losses": module.collected, "calls": module.calls}


def one_loader_for_both(num_workers: int) -> dict[str, Any]:
    """Returns the same loader object for training and validation, and a transfer hook that writes to the batch."""
    module = tiny.module()
    seen: set[str] = set()

    def transfer(batch: dict[str, Tensor], dataloader_idx: int) -> dict[str, Tensor]:
        seen.add(type(batch).__name__)
        return {**batch, "energy": batch["energy"] * 1}

    module.on_before_batch_transfer = transfer
    dataset = tiny.data().train_dataloader().dataset
    collate = tiny.data().train_dataloader().collate_fn
    workers = {"num_workers": num_workers, "persistent_workers": True} if num_workers else {}
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, collate_fn=collate, **workers)
    next(iter(loader))
    trainer = quiet_trainer({"num_microbatches": 2, "schedule": "wavek"}, max_epochs=1)
    trainer.fit(module, loader, loader)
    copied = copy.deepcopy(module)
    same = all(torch.equal(a, b) for a, b in zip(copied.parameters(), module.parameters(), strict=True))
    return {
        "types": seen,
        "collate": loader.collate_fn is collate,
        "copied": same,
        "metrics": plain(trainer.callback_metrics),
    }


def same_optimizer_twice() -> list[int]:
    """Fits twice with one optimizer object; returns the parameters with a state in the last checkpoint."""
    module = tiny.module()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3)
    module.configure_optimizers = lambda: optimizer
    sizes = []
    for _ in range(2):
        trainer = quiet_trainer({}, max_steps=1, limit_val_batches=0)
        trainer.fit(module, tiny.data())
        sizes.append(len(trainer.strategy.optimizer_state(optimizer)["state"]))
    return sizes
