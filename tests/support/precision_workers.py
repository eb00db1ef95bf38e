"""What the ranks of the precision tests run: a few steps, and the gradients that the optimizer saw."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import tiny
import torch
import torch.distributed as dist
from strategy_workers import namespaced_module
from torch import nn

from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.split import split_batches
from lightning_januspipe.strategy.precision import mesh_aware
from lightning_januspipe.testing import quiet_trainer
from lightning_januspipe.testing.trainer import library


def loader(precision: str) -> Any:
    """Returns the tiny data as a user of this precision has it; half precision is made by Lightning."""
    from lightning_januspipe.data import EMTDataModule

    dtype = "float64" if precision == "64-true" else "float32"
    data = EMTDataModule(
        num_train=20, num_val=4, num_test=4, sizes=(4, 8, 16), dtype=dtype, batch_size=8, shuffle=False
    )
    data.prepare_data()
    data.setup("fit")
    data.setup("validate")
    return data


def module_for(precision: str, namespace: str = "lightning") -> Any:
    """Returns the tiny module; its weights are exact in every precision."""
    module = tiny.module() if namespace == "lightning" else namespaced_module(namespace, 1e-3)
    for value in (*module.parameters(), *module.buffers()):
        if value.is_floating_point():
            value.data.copy_(value.data.bfloat16())
    torch.set_default_dtype(torch.float32)
    return module if precision == "64-true" else module.float()


class Single:
    """Batches as one loader: a list itself would be several loaders."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


class _Recorder:
    """Keeps what every optimizer step had and left."""

    def __new__(cls, namespace: str, holds: Callable[[Any, nn.Parameter], bool]) -> Any:
        class Recorder(library(namespace).Callback):  # type: ignore[misc]
            def __init__(self) -> None:
                self.record: dict[str, list[Any]] = {
                    "gradients": [],
                    "losses": [],
                    "scales": [],
                    "parameters": [],
                    "clipped": [],
                }

            def _held(self, trainer: Any, module: Any) -> list[tuple[str, nn.Parameter]]:
                return [(n, p) for n, p in module.named_parameters() if holds(trainer, p)]

            def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
                named = self._held(trainer, module)
                found = {n: p.grad.detach().double() for n, p in named if p.grad is not None}
                self.record["gradients"].append(found)

            def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
                self.record["losses"].append(float(outputs["loss"] if isinstance(outputs, dict) else outputs))
                if trainer.fit_loop._should_accumulate():
                    return
                scaler = getattr(trainer.precision_plugin, "scaler", None)
                self.record["scales"].append(None if scaler is None else float(scaler.get_scale()))
                clipped = {n: p.grad.double() for n, p in self._held(trainer, module) if p.grad is not None}
                self.record["clipped"].append(clipped)
                values = {n: p.detach().double().clone() for n, p in self._held(trainer, module)}
                self.record["parameters"].append(values)

        return Recorder()


def train(
    precision: str,
    strategy: dict[str, Any] | None,
    num_microbatches: int,
    steps: int = 1,
    namespace: str = "lightning",
    init_scale: float = 2.0**10,
    overflow: str | None = None,
    arguments: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A few steps; ``strategy`` None is plain Lightning, which accumulates gradients over the same micro-batches.

    Args:
        precision: of the Trainer; for "16-mixed" a plugin is made, because for CPUs Lightning takes another one.
        strategy: arguments of the strategy.
        num_microbatches: of each batch.
        steps: optimizer steps.
        namespace: which Lightning.
        init_scale: of the gradient scaler.
        overflow: a parameter whose gradient becomes infinite in the second step.
        arguments: further ones of the Trainer.
    """
    module, data = module_for(precision, namespace), loader(precision)
    batches = data.train_dataloader()
    arguments = {"limit_val_batches": 0, **(arguments or {})}
    if strategy is None:
        split = split_batches(batches, num_microbatches, required=False)
        batches = Single([m for b in split for m in (b if isinstance(b, MicroBatches) else [b])])
        arguments["accumulate_grad_batches"] = num_microbatches
    else:
        strategy = {**strategy, "num_microbatches": num_microbatches}
    if precision == "16-mixed":
        plugins = importlib.import_module(f"{library(namespace).__name__}.plugins.precision")
        scaler = torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=2)
        arguments["plugins"] = [plugins.MixedPrecision("16-mixed", "cpu", scaler)]
    else:
        arguments["precision"] = precision
    if overflow is not None:
        _overflow(module, overflow)
    recorder = _Recorder(namespace, lambda t, p: strategy is None or t.strategy.runner.parameters.holds(p))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = quiet_trainer(strategy, namespace, max_steps=steps, callbacks=[recorder], **arguments)
        trainer.fit(module, batches)
    return recorder.record  # type: ignore[no-any-return]


def _overflow(module: Any, name: str) -> None:
    parameter = dict(module.named_parameters())[name]

    def on_after_backward() -> None:
        if module.trainer.global_step == 1 and parameter.grad is not None:
            parameter.grad.reshape(-1)[0] = math.inf

    module.on_after_backward = on_after_backward


def evaluate(precision: str, strategy: dict[str, Any] | None) -> dict[str, float]:
    """Returns what validation of the untrained module logs."""
    trainer = quiet_trainer(strategy, precision=precision)
    (found,) = trainer.validate(module_for(precision), loader(precision).val_dataloader(), verbose=False)
    return {k: float(v) for k, v in found.items()}


class _Plain:
    """Stands for a strategy without a runner."""

    runner = mesh = None


def scaled_steps(case: str) -> tuple[list[float], list[bool]]:
    """Three steps with a scaler of which the second overflows on rank 1; the scales, and whether each step was made.

    Args:
        case: "unscaled before", "fused" (the optimizer unscales by itself), or "no gradients" (on rank 0).
    """
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    plugins = importlib.import_module("lightning.pytorch.plugins.precision")
    plugin = mesh_aware(plugins.MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0)), _Plain)
    scaler = plugin.scaler
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([parameter], lr=0.1, fused=case == "fused")
    scales, made = [], []
    for step in range(3):
        before = parameter.detach().clone()
        scaler.scale(torch.ones(()))
        if case != "no gradients" or rank == 1:
            parameter.grad = torch.full((2,), math.inf if (step, rank) == (1, 1) else 8.0)
        if case != "fused":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(float(scaler.get_scale()))
        made.append(not torch.equal(before, parameter.detach()))
    return scales, made
