"""What the ranks of the tests of optimizer shards run."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock, patch

import checkpoint_workers
import tiny
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from lightning_januspipe import JanusPipeStrategy
from lightning_januspipe.runtime.optimizer_shards import OptimizerShards
from lightning_januspipe.runtime.state_units import StateUnit
from lightning_januspipe.strategy.checkpoint_hooks import CheckpointHooks
from lightning_januspipe.strategy.gradient_norm import grad_norm
from lightning_januspipe.strategy.whole_parameters import whole_parameters
from lightning_januspipe.testing import interpreted_phases, quiet_trainer


def data() -> Any:
    """Returns structures of unequal sizes in five batches of each of two replicas."""
    return tiny.data(num_train=24, batch_size=4)


def module(optimizer: str) -> Any:
    """Returns a module of two layers, with one frozen and one that no loss depends on, and an optimizer by name."""
    made = tiny.module(num_layers=2)
    made.unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    made.frozen_weights = nn.Parameter(torch.ones(5, dtype=torch.float64), requires_grad=False)
    made.configure_optimizers = lambda: _optimizer(optimizer, made)
    return made


def _optimizer(name: str, made: Any) -> torch.optim.Optimizer:
    if name == "Adam":
        return torch.optim.Adam(made.parameters(), lr=1e-3, weight_decay=0.01)
    if name == "SGD":
        return torch.optim.SGD(made.parameters(), lr=1e-3, momentum=0.9)
    if name == "Adafactor":
        return torch.optim.Adafactor(made.parameters(), lr=1e-3)
    matrices = [p for p in made.parameters() if p.dim() == 2]
    return torch.optim.Muon(matrices, lr=1e-3)


def fit_within(limit: float, replicas: int, folder: str = "") -> tuple[str, int]:
    """Trains within a memory limit; returns the level of sharing, or the error, and the bytes of the optimizer."""
    made = module("Adam")
    strategy = {"pipeline_size": 1, "data_size": replicas, "num_microbatches": 2, "memory_limit": limit}
    trainer = quiet_trainer(strategy, max_steps=2, limit_val_batches=0)
    found: list[Any] = []
    made.on_train_batch_end = lambda *_: found.append(
        (trainer.strategy._shard_level, _bytes([t for s in trainer.optimizers[0].state.values() for t in s.values()]))
    )
    try:
        trainer.fit(made, data())
    except ValueError as error:
        return str(error), 0
    return found[-1]


class FewParameters(LightningModule):
    """A pair potential with two parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.depth = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
        self.width = nn.Parameter(torch.tensor(1.1, dtype=torch.float64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        positions = batch["positions"].detach().requires_grad_()
        energy = self.depth * torch.exp(-(positions.square().sum(-1) * 0.01) * self.width).sum()
        (derivative,) = torch.autograd.grad(energy, positions, create_graph=True)
        return (derivative + batch["forces"]).square().mean() + energy.square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def few_parameters() -> Any:
    """Returns a module with fewer entries of parameters than the tests have ranks."""
    return FewParameters()


class _Look(Callback):
    def __init__(self, look: Callable[[Any, Any], dict[str, float]]) -> None:
        self._look = look
        self.seen: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        if trainer.global_step == 1:
            self.seen = self._look(pl_module, optimizer)


def _look_at(strategy: dict[str, Any], look: Callable[[Any, Any], dict[str, float]]) -> dict[str, float]:
    made, callback = module("Adam"), _Look(look)
    bound = JanusPipeStrategy(**strategy)
    shape = int(strategy.get("data_size", 1)) * int(strategy.get("graph_size", 1))
    trainer = quiet_trainer(strategy=bound, devices=shape, max_steps=2, limit_val_batches=0, callbacks=[callback])
    trainer.fit(made, data())
    return callback.seen


def state_bytes(strategy: dict[str, Any]) -> dict[str, float]:
    """Returns bytes of trained parameters, and of what this rank has of them, their gradients and optimizer state.

    They are counted in the second step, before the optimizer steps. Parameters count with the memory that they have.
    """

    def look(pl_module: Any, optimizer: Any) -> dict[str, float]:
        states = [t for s in optimizer.state.values() for t in s.values()]
        gradients = [p.grad for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        used = [p for n, p in pl_module.named_parameters() if n.startswith("potential") and p.requires_grad]
        of_parameters = [_raw_gradient(p) for p in pl_module.parameters()]
        gradients += [g for g in of_parameters if g is not None and not any(g is other for other in gradients)]
        return {
            "parameters": _bytes(used),
            "held": _storages([*used, *(p for g in optimizer.param_groups for p in g["params"])]),
            "state": _bytes(states),
            "moments": _bytes([t for s in optimizer.state.values() for k, t in s.items() if k != "step"]),
            "gradients": _bytes(gradients),
        }

    return _look_at(strategy, look)


def _raw_gradient(parameter: nn.Parameter) -> Tensor | None:
    """Returns what a parameter in shards has as its gradient, which it refuses to tell."""
    with torch._C.DisableTorchFunctionSubclass():
        found: Tensor | None = Tensor.grad.__get__(parameter)  # type: ignore[attr-defined]
    return found


def released_in_step(strategy: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Returns for each reduction bytes of its parameters: of all, in memory when it starts, and when phases began."""
    made = module("Adam")
    found: list[tuple[int, int, int]] = []
    in_phases: dict[StateUnit, int] = {}
    wait, start = StateUnit.wait_for_parameters, StateUnit.start_reduction

    def waited(self: StateUnit) -> None:
        wait(self)
        in_phases[self] = _storages(list(self.parameters))

    def started(self: StateUnit, gradient: Any) -> None:
        if not self.reduction and self.stage is not None and self.parameters:
            found.append((_bytes(list(self.parameters)), _storages(list(self.parameters)), in_phases[self]))
        start(self, gradient)

    shape = int(strategy.get("data_size", 1)) * int(strategy.get("graph_size", 1)) * int(strategy["pipeline_size"])
    trainer = quiet_trainer(strategy=JanusPipeStrategy(**strategy), devices=shape, max_steps=2, limit_val_batches=0)
    with (
        patch.object(StateUnit, "wait_for_parameters", waited),
        patch.object(StateUnit, "start_reduction", started),
        interpreted_phases() if strategy.get("compile") else nullcontext(),
    ):
        trainer.fit(made, data())
    return found


def resume_misplaced(strategy: dict[str, Any], checkpoint: str) -> dict[str, Any]:
    """Goes on from a checkpoint with optimizer state that is loaded from the wrong place of each cut parameter."""
    load = OptimizerShards.part_of_state

    def misplaced(self: OptimizerShards, parameter: nn.Parameter, state: Any) -> Any:
        rolled = {k: v.roll(1) if isinstance(v, Tensor) and v.dim() else v for k, v in state.items()}
        return load(self, parameter, rolled)

    with patch.object(OptimizerShards, "part_of_state", misplaced):
        return checkpoint_workers.train(strategy, checkpoint + "-misplaced", {"resume": checkpoint})


def error_of_hook(hook: str, code: str, strategy: dict[str, Any]) -> str:
    """Returns the error of training with a hook; ``p`` is a parameter in its code, and ``every`` has all."""
    made = module("Adam")
    p = made.potential.energy_model.embedding.weight
    names = {"p": p, "every": list(made.potential.parameters()), "made": made, "torch": torch}

    def run(*_: Any) -> None:
        if made.global_step == 1:
            eval(code, names)

    setattr(made, hook, run)
    shape = int(strategy.get("data_size", 1)) * int(strategy.get("graph_size", 1))
    trainer = quiet_trainer(strategy=JanusPipeStrategy(**strategy), devices=shape, max_steps=3, limit_val_batches=0)
    try:
        trainer.fit(made, data())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class _Reader(Callback):
    """Reads and changes a parameter between steps, and tries to do so without asking for it."""

    def __init__(self) -> None:
        self.errors: set[str] = set()
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        weight = pl_module.potential.energy_model.embedding.weight
        assert isinstance(weight, nn.Parameter) and weight.shape[0] > 1 and weight.requires_grad
        for read in (weight.sum, weight.detach, lambda: weight * 2, lambda: weight.data):
            try:
                read()
            except RuntimeError as error:
                self.errors.add(str(error))
        with whole_parameters(pl_module), torch.no_grad():
            weight.clamp_(-0.5, 0.5)
            self.values.append(float(weight.sum()))


def read_between_steps(strategy: dict[str, Any]) -> tuple[set[str], list[float]]:
    """Returns the errors of reading parameters between steps, and values that were read in a block for it."""
    reader = _Reader()
    shape = int(strategy.get("data_size", 1)) * int(strategy.get("graph_size", 1))
    trainer = quiet_trainer(
        strategy=JanusPipeStrategy(**strategy), devices=shape, max_steps=4, limit_val_batches=0, callbacks=[reader]
    )
    made = module("Adam")
    trainer.fit(made, data())
    reader.values.append(float(made.potential.energy_model.embedding.weight.detach().sum()))
    return reader.errors, reader.values


def train_without_gathering(strategy: dict[str, Any], folder: str) -> int:
    """Trains and saves a folder after each step; returns how often a whole state was gathered for that."""
    calls = []

    def without_hook() -> Any:  # whole parameters are for hooks that add to the checkpoint
        made = tiny.module(num_layers=2)
        made.on_save_checkpoint = LightningModule.on_save_checkpoint.__get__(made)
        return made

    whole, gather = OptimizerShards.whole_states, CheckpointHooks.lightning_module_state_dict

    def counted(self: OptimizerShards, optimizer: Any) -> Any:
        calls.append("states")
        return whole(self, optimizer)

    def watched(self: Any) -> Any:
        before = [p.untyped_storage().nbytes() for p in self.lightning_module.parameters()]
        state = gather(self)
        if [p.untyped_storage().nbytes() for p in self.lightning_module.parameters()] != before:
            calls.append("parameters")
        return state

    with (
        patch.object(OptimizerShards, "whole_states", counted),
        patch.object(CheckpointHooks, "lightning_module_state_dict", watched),
    ):
        ended = checkpoint_workers.train(strategy, folder, {"num_steps": 2, "module": without_hook})["ended"]
    assert not ended, ended
    return len(calls)


def norms(strategy: dict[str, Any]) -> dict[str, float]:
    """Returns the norms of all gradients."""
    return _look_at(strategy, lambda pl_module, _: {n: float(v) for n, v in grad_norm(pl_module).items()})


def _bytes(tensors: list[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _without_updates(self: StateUnit, keep: bool) -> None:
    """Lets the optimizer's updates stay on their ranks."""


def _stale_gathering(self: StateUnit) -> None:
    """Takes the memory of parameters back, but not the values of other ranks."""
    memory = self._memory
    if memory is not None and not memory.is_there:
        memory._whole.untyped_storage().resize_(memory._num_bytes)
        memory._own_part().copy_(memory.own)
        memory.work = Mock()


def _without_factor(self: StateUnit, scale: float) -> None:
    _FINISH(self, 1.0)


def _exchanged(self: StateUnit, scale: float) -> None:
    _FINISH(self, scale)
    for leaf in self.leaves.values():
        if leaf.grad is not None:
            leaf.grad = leaf.grad.reshape(-1).flip(0).view_as(leaf)


_FINISH = StateUnit.finish_reduction

FAULTS: dict[str, tuple[type, str, Any]] = {
    "updates not gathered": (StateUnit, "spread_updates", _without_updates),
    "gathering skipped": (StateUnit, "start_gathering", _stale_gathering),
    "reduction without its factor": (StateUnit, "finish_reduction", _without_factor),
    "shards exchanged": (StateUnit, "finish_reduction", _exchanged),
}


def _storages(tensors: list[Tensor]) -> int:
    """Returns the bytes of the memory of tensors, that of views once."""
    storages = [t.untyped_storage() for t in tensors]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


def broken(name: str) -> Any:
    """Returns a module that trains with one fault of the shards."""
    made = module("Adam")
    fault = patch.object(*FAULTS[name])
    made.on_train_epoch_start = lambda: fault.start()
    made.teardown = lambda stage: fault.stop()
    return made
