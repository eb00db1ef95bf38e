"""What the ranks of the strategy's tests run."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
import torch
from torch import Tensor

from lightning_januspipe.testing import quiet_trainer
from lightning_januspipe.testing.trainer import library


def plain(values: Any) -> Any:
    """Returns results without tensors, to compare and to send."""
    if isinstance(values, Tensor):
        return values.detach().cpu().tolist()
    if isinstance(values, dict):
        return {k: plain(v) for k, v in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(v) for v in values]
    return values


class Losses:
    """Keeps the loss of every batch."""

    def __new__(cls, namespace: str = "lightning") -> Any:
        class Callback(library(namespace).Callback):  # type: ignore[misc]
            def __init__(self) -> None:
                self.losses: list[float] = []

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
                self.losses.append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))

        return Callback()


def fit(
    strategy: dict[str, Any] | None,
    arguments: dict[str, Any],
    save: str | None = None,
    resume: str | None = None,
    validate: bool = False,
    num_microbatches: int = 1,
) -> dict[str, Any]:
    """Trains on the tiny data; returns losses, metrics and the trained module's state."""
    module, data = tiny.module(), tiny.data()
    losses = Losses()
    trainer = quiet_trainer(strategy, callbacks=[losses], limit_val_batches=None if validate else 0, **arguments)
    trainer.fit(module, data, ckpt_path=resume)
    if save:
        trainer.save_checkpoint(save)
    return {
        "losses": losses.losses,
        "metrics": plain(trainer.callback_metrics),
        "state": {k: v.clone() for k, v in module.state_dict().items()},
    }


def evaluate(strategy: dict[str, Any] | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """Validates, tests and predicts with an untrained module."""
    module, data = tiny.module(), tiny.data()
    trainer = quiet_trainer(strategy, **arguments)
    validated = trainer.validate(module, data, verbose=False)
    tested = trainer.test(module, data, verbose=False)
    predicted = trainer.predict(module, data)
    return {"validate": validated, "test": tested, "predict": plain(predicted)}


def fit_then_evaluate(
    strategy: dict[str, Any] | None, arguments: dict[str, Any], make: Callable[[], Any] = tiny.module
) -> dict[str, Any]:
    """Trains, with validation in every epoch, and tests the trained module with the same Trainer."""
    module, data = make(), tiny.data()
    trainer = quiet_trainer(strategy, **arguments)
    trainer.fit(module, data)
    metrics = plain(trainer.callback_metrics)
    return {"fit": metrics, "test": trainer.test(module, data, verbose=False)}


def namespaced_module(namespace: str, learning_rate: float) -> Any:
    """Returns the potential in a LightningModule of either Lightning, written by hand."""
    base = library(namespace).LightningModule
    potential = tiny.module().potential

    class Module(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.potential = potential

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            out = self.potential(batch)
            energy = (out["energy"] - batch["energy"]).square().mean()
            forces = (out["forces"] - batch["forces"]).square().mean()
            self.log_dict(
                {"energy": energy, "forces": forces}, on_step=True, on_epoch=True, batch_size=len(batch["energy"])
            )
            return {"loss": energy + 10 * forces, "forces": forces.detach()}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=learning_rate)

    return Module()


def fit_namespace(namespace: str, strategy: str | dict[str, Any] | None, learning_rate: float = 1e-3) -> dict[str, Any]:
    """Trains three steps under either Lightning; a string is a registered name."""
    module = namespaced_module(namespace, learning_rate)
    losses = Losses(namespace)
    trainer = quiet_trainer(strategy, namespace, max_steps=3, callbacks=[losses])
    trainer.fit(module, tiny.data().train_dataloader())
    return {
        "losses": losses.losses,
        "metrics": plain(trainer.callback_metrics),
        "state": {k: v.clone() for k, v in module.state_dict().items()},
        "schedule": trainer.strategy.schedule if strategy is not None else None,
    }


def inspect_mesh(strategy: dict[str, Any]) -> dict[str, Any]:
    """Returns what a module sees of the mesh, and which samples a replica gets from Lightning's own sampler."""
    seen: dict[str, Any] = {"energies": []}
    module = tiny.module()
    step = module.training_step

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        for microbatch in batch:
            seen["energies"].extend(microbatch["energy"].tolist())

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Any:
        seen.update(axes=module.device_mesh.mesh_dim_names, shape=tuple(module.device_mesh.shape))
        seen["world_inside"] = torch.distributed.get_world_size()
        return step(batch, batch_idx)

    module.training_step, module.on_train_batch_start = training_step, on_train_batch_start
    trainer = quiet_trainer(strategy, max_epochs=1, use_distributed_sampler=True, limit_val_batches=0)
    trainer.fit(module, tiny.data())
    seen.update(
        world=trainer.world_size,
        outside=torch.distributed.get_world_size(),
    )
    return seen


def initial_parameters(strategy: dict[str, Any]) -> list[float]:
    """Returns parameters after a step with learning rate 0, of modules that every rank initialized differently."""
    module = tiny.module(learning_rate=0.0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(int(os.environ["RANK"])))
    quiet_trainer(strategy, max_steps=1, limit_val_batches=0).fit(module, tiny.data())
    return [float(p.detach().double().sum()) for p in module.parameters()]


def error_of(case: str, strategy: dict[str, Any], arguments: dict[str, Any] | None = None) -> str:
    """Returns the type and message of the error that a bad case raises; empty if there is none."""
    import bad_modules

    module, data = bad_modules.CASES[case]()
    try:
        trainer = quiet_trainer(strategy, max_steps=2, limit_val_batches=0, **(arguments or {}))
        trainer.fit(module, data)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def unavailable_precision() -> str:
    """Returns the error for a precision plugin that the strategy does not know."""
    plugin = importlib.import_module("lightning.pytorch.plugins.precision").Precision()
    plugin.precision = "nvfp4"
    return error_of("tiny", {}, {"plugins": [plugin]})


def killed_and_told(path: str) -> None:
    """Rank 1 ends in the middle of a step; the others write down what they are told."""
    module = tiny.module()
    step = module.training_step
    calls = []

    def training_step(batch: Any, batch_idx: int) -> Any:
        calls.append(batch_idx)
        # Each micro-batch calls the step twice: up to the potential, and with its result.
        if int(os.environ["RANK"]) == 1 and batch_idx == 1 and calls.count(1) == 7:
            Path(path).write_text("rank 1 was in the middle of a step")
            os._exit(1)
        return step(batch, batch_idx)

    module.training_step = training_step
    told = Path(path).parent / f"told-{os.environ['RANK']}"
    try:
        quiet_trainer({"num_microbatches": 4, "timeout": 20}, max_steps=4, limit_val_batches=0).fit(module, tiny.data())
    except Exception as error:
        told.write_text(f"{type(error).__name__}: {error}")
        raise
