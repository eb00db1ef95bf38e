"""Runs two trainings to compare: one rank's part of a pipelined run, and the same run in one process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.replica_balance import balance_replicas
from lightning_januspipe.loader.split import split_batches
from lightning_januspipe.strategy.registry import strategy_class
from lightning_januspipe.testing.trainer import library, namespace_of, quiet_trainer


@dataclass
class RunRecord:
    """Holds what a training run leaves to compare.

    Attributes:
        initial: Parameters before training, by name.
        losses: The loss of each batch.
        gradients: The gradients of each optimizer step, by parameter name; None where a parameter has none.
        parameters: Trained parameters, by name.
        eager: With ``compile=True``, the reasons why stages of the rank run eagerly.
        num_misfits: With ``compile=True``, the most micro-batches that ran eagerly in a compiled stage of the rank.
    """

    initial: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)
    eager: list[str] = field(default_factory=list)
    num_misfits: int = 0


def train_in_pipeline(
    module_factory: Callable[[], Any],
    datamodule_factory: Callable[[], Any],
    strategy: dict[str, Any],
    steps: int,
    trainer_arguments: dict[str, Any],
) -> RunRecord:
    """Trains as one rank of a pipeline, in a :class:`~lightning_januspipe.testing.RankPool`.

    Args:
        module_factory: Makes the LightningModule.
        datamodule_factory: Makes the LightningDataModule.
        strategy: Arguments of :class:`~lightning_januspipe.JanusPipeStrategy`.
        steps: Optimizer steps.
        trainer_arguments: Further arguments of the Trainer.
    """
    module, data = module_factory(), datamodule_factory()
    namespace = namespace_of(module)
    bound = strategy_class(namespace)(**strategy)
    world = int(os.environ["WORLD_SIZE"])
    record = RunRecord(initial=_copies(module))
    recorder = _recorder(record, module, lambda: bound.runner.parameters.gradients())
    trainer = _trainer(namespace, steps, trainer_arguments, strategy=bound, devices=world)
    trainer.callbacks.insert(0, recorder)
    replica = bound.mesh_shape.coordinates(int(os.environ["RANK"]))[1]
    trainer.fit(module, _ordered_loader(_train_loader(data), bound.mesh_shape.data, replica))
    record.parameters = _copies(module)
    return record


def train_reference(
    module_factory: Callable[[], Any],
    datamodule_factory: Callable[[], Any],
    strategy: dict[str, Any],
    steps: int,
    trainer_arguments: dict[str, Any],
    devices: int,
) -> RunRecord:
    """Trains the module as it is with a plain Trainer, on the mean loss of all micro-batches of all replicas.

    In one process the replicas' batches are trained on side by side. In as many processes as there are replicas, each
    trains on its own with Lightning's DDP, so that losses that reduce themselves over processes are what they would be.

    Args:
        module_factory: Makes the LightningModule.
        datamodule_factory: Makes the LightningDataModule.
        strategy: The pipeline's arguments, which say how many replicas and micro-batches there are.
        steps: Optimizer steps.
        trainer_arguments: Further arguments of the Trainer.
        devices: The ranks of the pipelined run.
    """
    module, data = module_factory(), datamodule_factory()
    namespace = namespace_of(module)
    bound = strategy_class(namespace)(**strategy)
    bound.parallel_devices = [torch.device("cpu")] * devices
    replicas, num_microbatches = bound.mesh_shape.data, bound.num_microbatches()
    balance = strategy.get("balance", "auto")
    world = int(os.environ["WORLD_SIZE"])
    loaders = []
    for replica in range(replicas) if world == 1 else [int(os.environ["RANK"])]:
        loader = _ordered_loader(_train_loader(data), replicas, replica)
        loader = split_batches(loader, num_microbatches, required=False)
        if replicas > 1 and balance != "microbatches":
            balance_replicas(
                loader,
                num_microbatches,
                replicas,
                replica,
                required=balance == "replicas",
                tell=lambda known: known,
                is_teller=True,
            )
        loaders.append(loader)
    step = module.training_step

    def mean_step(batch: tuple[Any, ...], batch_idx: int) -> Tensor:
        of_replicas = [b.batches if isinstance(b, MicroBatches) else [b] for b in batch]
        outputs = [[step(m, batch_idx) for m in microbatches] for microbatches in of_replicas]
        means = [torch.stack([o["loss"] if isinstance(o, dict) else o for o in micro]).mean() for micro in outputs]
        return torch.stack(means).mean()

    module.training_step = mean_step
    module.log = lambda *_, **__: None
    plain = "auto" if world == 1 else "ddp_find_unused_parameters_true"
    trainer = _trainer(namespace, steps, trainer_arguments, strategy=plain, devices=world)
    record = RunRecord(initial=_copies(module))
    recorder = _recorder(record, module, lambda: {p: p.grad for p in module.parameters() if p.requires_grad})
    trainer.callbacks.insert(0, recorder)
    trainer.fit(module, _Zipped(loaders))
    record.parameters = _copies(module)
    return record


class _Zipped:
    """Iterates over the loaders of all replicas side by side."""

    def __init__(self, loaders: list[Any]) -> None:
        self._loaders = loaders

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        return zip(*self._loaders, strict=True)

    def __len__(self) -> int:
        return len(self._loaders[0])


def _copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().cpu().clone() for name, parameter in module.named_parameters()}


def _train_loader(data: Any) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def _ordered_loader(loader: Any, num_replicas: int, replica: int) -> Any:
    """Returns a loader of one replica's samples in the dataset's order, without workers."""
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, num_replicas=num_replicas, rank=replica, shuffle=False
    )
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)


def _trainer(namespace: str, steps: int, arguments: dict[str, Any], **fixed: Any) -> Any:
    return quiet_trainer(namespace=namespace, **{"max_steps": steps, "limit_val_batches": 0, **arguments, **fixed})


def _recorder(record: RunRecord, module: Any, gradients: Callable[[], dict[nn.Parameter, Tensor | None]]) -> Any:
    class Recorder(library(namespace_of(module)).Callback):  # type: ignore[misc]
        """Keeps losses and the gradients that the optimizer sees.

        The record is no attribute: tensors by the names of parameters would be taken for averages of these.
        """

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            names = {p: n for n, p in pl_module.named_parameters()}
            record.gradients.append(
                {names[p]: None if g is None else g.detach().cpu().clone() for p, g in gradients().items()}
            )

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            record.losses.append(float(trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")))

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            runner = getattr(trainer.strategy, "runner", None)  # the strategy drops it when training is over
            report = getattr(runner, "compile_report", None)
            if runner is not None and report is not None:
                record.eager = list(report.eager)
                stages = runner.executor.stages.values()
                record.num_misfits = max(getattr(stage, "num_misfits", 0) for stage in stages)

    return Recorder()
