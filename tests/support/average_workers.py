"""Averages of weights, kept in the ways of several projects, and what the ranks of their tests run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import tiny
import torch
from lightning.pytorch.utilities import rank_zero_only
from strategy_workers import plain
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_januspipe.testing import quiet_trainer

DECAY = 0.8


@torch.no_grad()
def follow(averages: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> None:
    for average, parameter in zip(averages, parameters, strict=True):
        average.lerp_(parameter, 1 - DECAY)


@torch.no_grad()
def swap(averages: Iterable[Tensor], parameters: Iterable[nn.Parameter]) -> None:
    for average, parameter in zip(averages, parameters, strict=True):
        kept = average.clone()
        average.copy_(parameter)
        parameter.copy_(kept)


class Buffers(nn.Module):
    """Averages as numbered buffers, as NequIP keeps them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        for i, p in enumerate(model.parameters()):
            self.register_buffer(f"weight_{i}", p.detach().clone())


class InBuffers(lightning.Callback):
    """Updates the buffers, and validates with them."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        follow(module.in_buffers.buffers(), module.potential.parameters())

    def on_validation_start(self, trainer: Any, module: Any) -> None:
        swap(module.in_buffers.buffers(), module.potential.parameters())

    def on_validation_end(self, trainer: Any, module: Any) -> None:
        swap(module.in_buffers.buffers(), module.potential.parameters())


class InSubmodule(lightning.Callback):
    """Updates torch's own average, a submodule of the LightningModule."""

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        module.in_submodule.update_parameters(module.potential)


class Lists:
    """Averages and weights put aside in lists, as in ``torch_ema``."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.shadow = [p.detach().clone() for p in parameters]
        self.collected: list[Tensor] | None = None


class InLists(lightning.Callback):
    """As SchNetPack's callback: training goes on from the average after the last validation of all."""

    def __init__(self) -> None:
        self.lists: Lists | None = None

    def on_fit_start(self, trainer: Any, module: Any) -> None:
        self.lists = Lists(module.potential.parameters())

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self._put(self.lists.collected or self.lists.shadow, module)

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        follow(self.lists.shadow, module.potential.parameters())

    def on_validation_epoch_start(self, trainer: Any, module: Any) -> None:
        self.lists.collected = [p.detach().clone() for p in module.potential.parameters()]
        self._put(self.lists.shadow, module)

    def _put(self, values: list[Tensor], module: Any) -> None:
        for value, parameter in zip(values, module.potential.parameters(), strict=True):
            parameter.data.copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.lists.shadow, "collected": self.lists.collected}


class InDict(lightning.Callback):
    """Averages by name."""

    def __init__(self) -> None:
        self.average: dict[str, Tensor] = {}

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.average = {n: p.detach().clone() for n, p in module.potential.named_parameters()}

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        follow(self.average.values(), module.potential.parameters())

    def state_dict(self) -> dict[str, Any]:
        return self.average


class OnFirstRank(InDict):
    """Averages on one rank, which would do with replicas."""

    @rank_zero_only
    def on_train_start(self, trainer: Any, module: Any) -> None:
        super().on_train_start(trainer, module)

    @rank_zero_only
    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        super().on_train_batch_end(trainer, module)


class Gradients(lightning.Callback):
    """Keeps what each rank has."""

    def __init__(self) -> None:
        self.last: dict[str, Tensor] = {}

    def on_after_backward(self, trainer: Any, module: Any) -> None:
        found = {n: p.grad for n, p in module.potential.named_parameters()}
        self.last = {n: g.clone() for n, g in found.items() if g is not None}


def other_holders() -> tuple[dict[str, Tensor], str]:
    """Returns the gradients that this rank has after training, and what it is warned of."""
    gradients = Gradients()
    trainer = quiet_trainer(
        {"num_microbatches": 1}, max_steps=2, limit_val_batches=0, callbacks=[OnFirstRank(), gradients]
    )
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        trainer.fit(tiny.module(num_layers=2), tiny.data())
    return gradients.last, " ".join(str(w.message) for w in told if "ranks" in str(w.message))


def averaged(how: str) -> tuple[Any, list[lightning.Callback]]:
    """Returns a module and its callbacks."""
    module = tiny.module(num_layers=2)
    if how == "lists":
        return module, [InLists()]
    if how == "lightning":
        from lightning.pytorch.callbacks import EMAWeightAveraging

        return module, [EMAWeightAveraging(decay=DECAY)]
    module.in_buffers = Buffers(module.potential)
    module.in_submodule = AveragedModel(module.potential, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return module, [InBuffers(), InSubmodule(), InDict()]


def checkpoint(strategy: dict[str, Any] | None, how: str, folder: str) -> dict[str, Any]:
    """Returns what a run with an average leaves: the last checkpoint of training, the metrics, and the module."""
    module, callbacks = averaged(how)
    saving = lightning.pytorch.callbacks.ModelCheckpoint(folder, "last-of-training", save_top_k=-1)
    trainer = quiet_trainer(
        strategy, max_epochs=2, limit_train_batches=2, callbacks=[*callbacks, saving], enable_checkpointing=True
    )
    trainer.fit(module, tiny.data())
    saved = torch.load(Path(folder) / "last-of-training.ckpt", weights_only=False)
    states = {k: v for k, v in saved["callbacks"].items() if not k.startswith("ModelCheckpoint")}
    weights = {k: v for k, v in saved.items() if k.endswith(("state_dict", "model_state"))}
    return {
        **weights,
        "callbacks": states,
        "optimizer": saved["optimizer_states"],
        "metrics": plain(trainer.callback_metrics),
        "module": {k: v.clone() for k, v in module.state_dict().items()},
    }
