"""What the ranks of the tests of optimization run: users' ways to build optimizers, schedules, and frozen modules."""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import tiny
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from strategy_workers import plain
from torch import Tensor, nn
from torch.optim import lr_scheduler

from lightning_januspipe.testing import quiet_trainer

LAST = "readout.2"
"""The last part of the tiny potential, which one rank of a pipeline holds alone."""

FIRST = "layers.0.radial_network.linears.1"
"""A part of its first layer, which one rank holds alone."""


def module(**arguments: Any) -> Any:
    """Returns a module with a parameter that its loss reads beside the potential, and one that nothing reads."""
    made = tiny.module(num_layers=2, **arguments)
    made.offset, made.unused = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(1.0))
    step = made.training_step

    def training_step(batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = step(batch, batch_idx) + (made.offset - batch["energy"].mean()).square()
        return loss

    made.training_step = training_step
    return made


def with_optimizer(make: Callable[[Any], Any], **arguments: Any) -> Any:
    """Returns the module with ``configure_optimizers`` of a user."""
    made = module(**arguments)
    made.configure_optimizers = lambda: make(made)
    return made


def frozen(made: Any, is_trained: Callable[[str], bool]) -> Any:
    """A module of which some parameters are trained; those alone are given to the optimizer, which has a schedule."""
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(is_trained(name))

    def configure_optimizers() -> Any:
        optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=1e-3)
        return [optimizer], [lr_scheduler.StepLR(optimizer, 1, 0.5)]

    made.configure_optimizers = configure_optimizers
    return made


def _groups(made: Any) -> Any:
    """Decay for matrices of the potential, none for its other parameters, other rates for its end and for the rest."""
    named = dict(made.named_parameters())
    last = [p for n, p in named.items() if LAST in n]
    outside = [p for n, p in named.items() if "potential" not in n]
    inside = [p for n, p in named.items() if "potential" in n and LAST not in n]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in inside if p.ndim > 1], "weight_decay": 0.1, "name": "matrices"},
            {"params": [p for p in inside if p.ndim <= 1], "weight_decay": 0.0, "name": "vectors"},
            {"params": last, "lr": 1e-4, "name": "last"},
            {"params": outside, "lr": 1e-2, "name": "outside"},
        ],
        lr=1e-3,
        amsgrad=True,
        foreach=True,
    )
    factors = [lambda step: 0.9**step, lambda step: 1.0, lambda step: 1 / (1 + step), lambda step: 0.5**step]
    scheduler = lr_scheduler.LambdaLR(optimizer, factors)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _fused(made: Any) -> Any:
    """Two groups with another decay and another schedule of their rates each, all updated by one kernel."""
    vectors, matrices = ([p for p in made.parameters() if (p.ndim > 1) == is_matrix] for is_matrix in (False, True))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 1e-2, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    scheduler = lr_scheduler.LambdaLR(optimizer, [lambda step: 0.9**step, lambda step: 1 / (1 + step)])
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def _plateau(made: Any) -> Any:
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3, fused=True)
    # So large an improvement is in one epoch only.
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0, threshold=0.5)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}


def _one_cycle(made: Any) -> Any:
    optimizer = torch.optim.SGD(made.parameters(), lr=1e-3, momentum=0.9, nesterov=True)
    total = int(made.trainer.estimated_stepping_batches)
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=total)
    return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def _matrices(made: Any) -> Any:
    """Returns an optimizer of whole matrices, for those of the potential."""
    return torch.optim.Muon([p for p in made.potential.parameters() if p.ndim == 2], lr=1e-3)


def _clipping_by_hook() -> Any:
    made = with_optimizer(lambda m: torch.optim.SGD(m.parameters(), lr=1e-3))

    def configure_gradient_clipping(optimizer: Any, gradient_clip_val: Any, gradient_clip_algorithm: Any) -> None:
        limit = 0.5 / (1 + made.trainer.global_step)
        made.clip_gradients(optimizer, gradient_clip_val=limit, gradient_clip_algorithm="norm")

    made.configure_gradient_clipping = configure_gradient_clipping
    return made


def _simple(kind: type[torch.optim.Optimizer]) -> Callable[[], Any]:
    return lambda: with_optimizer(lambda m: kind(m.parameters(), lr=1e-3))


MODULES: dict[str, Callable[[], Any]] = {
    "clipping by a hook": _clipping_by_hook,
    "groups": lambda: with_optimizer(_groups),
    "fused": lambda: with_optimizer(_fused),
    "plateau": lambda: with_optimizer(_plateau),
    "one cycle": lambda: with_optimizer(_one_cycle),
    "accumulators": _simple(torch.optim.Adagrad),
    "matrices": lambda: with_optimizer(_matrices),
    "factored": _simple(torch.optim.Adafactor),
    "some frozen": lambda: frozen(module(), lambda n: "species_scale" not in n and "embedding" not in n),
    "last trained": lambda: frozen(tiny.module(num_layers=2), lambda n: LAST in n),
    "first trained": lambda: frozen(tiny.module(num_layers=2), lambda n: FIRST in n),
    "some trained by a callback": lambda: with_optimizer(
        lambda m: torch.optim.Adam([p for p in m.parameters() if p.requires_grad], lr=1e-3)
    ),
    "plain": lambda: tiny.module(num_layers=2),
}


class Watch(callbacks.Callback):
    """Notes learning rates, how many parameters the optimizer holds, and its whole state at the end."""

    def __init__(self) -> None:
        self.rates: list[list[float]] = []
        self.held: list[int] = []
        self.norms: list[float] = []
        self.state: Any = None

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        groups = trainer.optimizers[0].param_groups
        self.rates.append([g["lr"] for g in groups])
        self.held = [len(g["params"]) for g in groups]

    def on_train_end(self, trainer: Any, *_: Any) -> None:
        self.state = trainer.strategy.optimizer_state(trainer.optimizers[0])


def fit(
    strategy: dict[str, Any] | None,
    name: str,
    arguments: dict[str, Any] | None = None,
    more: tuple[Any, ...] = (),
    resume: str | None = None,
    save: str | None = None,
) -> dict[str, Any]:
    """Trains one of MODULES.

    Args:
        strategy: arguments of the strategy; None is plain Lightning.
        name: in MODULES.
        arguments: of the Trainer.
        more: callbacks.
        resume: ckpt_path.
        save: where to save a checkpoint at the end.
    """
    made, watch = MODULES[name](), Watch()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    trainer = quiet_trainer(
        strategy, callbacks=[watch, *more], **{"max_epochs": 2, "limit_val_batches": 0, **(arguments or {})}
    )
    trainer.fit(made, tiny.data(), ckpt_path=resume)
    if save is not None:
        trainer.save_checkpoint(save)
    parameters = {n: p.detach().clone() for n, p in made.named_parameters()}
    return {
        "parameters": parameters,
        "changed": {n for n, p in parameters.items() if not torch.equal(p, before[n])},
        "rates": watch.rates,
        "held": watch.held,
        "state": watch.state,
        "metrics": plain(trainer.callback_metrics),
        "steps": trainer.global_step,
    }


def fit_each(strategy: dict[str, Any] | None, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Trains several modules, one after the other."""
    return {name: fit(strategy, name, {"max_steps": 3}) for name in names}


def fit_with_monitor(strategy: dict[str, Any] | None, folder: str) -> dict[str, Any]:
    """Trains with several groups, and logs their rates."""
    logger = CSVLogger(folder, name="", version="" if strategy is None else "pipeline")
    monitor = callbacks.LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
    found = fit(strategy, "groups", {"logger": logger, "log_every_n_steps": 1}, (monitor,))
    path, rows = Path(logger.log_dir) / "metrics.csv", []
    if strategy is None or os.environ["RANK"] == "0":
        with path.open() as file:
            rows = list(csv.DictReader(file))
    return {**found, "logged": plain(monitor.lrs), "csv": rows}


def fit_accumulating(strategy: dict[str, Any] | None) -> dict[str, Any]:
    """The number of batches of an optimizer step changes by epoch; an epoch of three batches ends with a part."""
    schedule = callbacks.GradientAccumulationScheduler({0: 1, 1: 2, 2: 3})
    return fit(strategy, "clipping by a hook", {"max_epochs": 3}, (schedule,))


def fit_and_resume(
    strategy: dict[str, Any] | None, name: str, folder: str, clipping: dict[str, Any]
) -> list[dict[str, Any]]:
    """Trains an epoch, saves, and trains another one from the checkpoint."""
    path = str(Path(folder) / f"{'plain' if strategy is None else 'pipeline'}.ckpt")
    first = fit(strategy, name, {"max_epochs": 1, **clipping}, save=path)
    return [first, fit(strategy, name, {"max_epochs": 2, **clipping}, resume=path)]


def fit_twice(strategy: dict[str, Any] | None) -> dict[str, Any]:
    """Trains the last part alone, and then everything, with another Trainer."""
    made = frozen(tiny.module(num_layers=2), lambda n: LAST in n)
    for _ in range(2):
        quiet_trainer(strategy, max_steps=2, limit_val_batches=0).fit(made, tiny.data())
        frozen(made, lambda _: True)
    return {"parameters": {n: p.detach().clone() for n, p in made.named_parameters()}}


def named(name: str) -> Any:
    """Returns one of MODULES, by a function that can be imported."""
    return MODULES[name]()


def fit_unfreezing(strategy: dict[str, Any] | None) -> dict[str, Any]:
    """Trains while a callback of Lightning unfreezes layers after an epoch."""
    return fit(strategy, "some trained by a callback", more=(Unfreezing(),))


def average_of_weights(strategy: dict[str, Any] | None, folder: str, resumes: bool = False) -> dict[str, Any]:
    """Trains with Lightning's average of weights over the last epochs, which also changes the schedule.

    Args:
        strategy: arguments of the strategy; None is plain Lightning.
        folder: of one checkpoint, after some epochs of the average; between, no rank hears of others' parameters.
        resumes: start from that checkpoint.
    """
    average = callbacks.StochasticWeightAveraging(swa_lrs=2e-3, swa_epoch_start=2, annealing_epochs=2)
    path = Path(folder) / "epoch=2.ckpt"
    saving = [] if resumes else [callbacks.ModelCheckpoint(folder, "{epoch}", every_n_epochs=3)]
    arguments = {"max_epochs": 4, "limit_val_batches": None, "enable_checkpointing": not resumes}
    found = fit(strategy, "groups", arguments, (average, *saving), str(path) if resumes else None)
    saved = torch.load(path, weights_only=False)
    states = {k: v for k, v in saved["callbacks"].items() if not k.startswith("ModelCheckpoint")}
    return {**found, "saved": {"state_dict": saved["state_dict"], "callbacks": states}}


def found_learning_rate(strategy: dict[str, Any] | None) -> dict[str, Any]:
    """Runs Lightning's learning rate finder, and fits with what it suggests."""
    from lightning.pytorch.tuner import Tuner

    made = tiny.module(num_layers=2, learning_rate=1e-3)
    made.learning_rate = 1e-3
    made.configure_optimizers = lambda: torch.optim.Adam(made.parameters(), lr=made.learning_rate)
    before = {k: v.clone() for k, v in made.state_dict().items()}
    trainer = quiet_trainer(strategy, max_steps=2, limit_val_batches=0)
    finder = Tuner(trainer).lr_find(made, tiny.data(), num_training=16, min_lr=1e-5, max_lr=1e-1)
    assert finder is not None
    found = {
        "results": finder.results,
        "suggestion": finder.suggestion(),
        "attribute": made.learning_rate,
        "restored": all(torch.equal(v, before[k]) for k, v in made.state_dict().items() if "metrics" not in k),
        "left": (trainer.global_step, len(trainer.callbacks), trainer.max_steps),
    }
    watch = Watch()
    trainer.callbacks.append(watch)
    trainer.fit(made, tiny.data())
    parameters = {n: p.detach().clone() for n, p in made.named_parameters()}
    return {**found, "parameters": parameters, "rates": watch.rates, "state": watch.state}


# -- what is refused -------------------------------------------------------------------------------------------------


class Unfreezing(callbacks.BaseFinetuning):
    """Trains the readout alone for an epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.potential.energy_model.layers)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.potential.energy_model.layers, optimizer)


class ClipsItself(callbacks.Callback):
    """Clips the gradients of this rank's stages by their norm."""

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        torch.nn.utils.clip_grad_norm_(pl_module.parameters(), 0.1)


def _module_clips_itself() -> Any:
    class Module(type(tiny.module())):  # type: ignore[misc]
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            torch.nn.utils.clip_grad_norm_(self.parameters(), 0.1)

    made = tiny.module(num_layers=2)
    made.__class__ = Module
    return made


def _with_batch_norm() -> Any:
    made = tiny.module(num_layers=2)
    made.norm = nn.BatchNorm1d(2)
    return made


def _hooked(kind: str) -> Any:
    """Returns a module with a hook that would see gradients."""
    made = tiny.module(num_layers=2)
    weight = made.potential.energy_model.embedding.weight
    if kind == "parameter":
        weight.register_hook(lambda gradient: gradient.clamp(-1, 1))
    elif kind == "sum":
        weight.register_post_accumulate_grad_hook(lambda parameter: None)
    else:
        made.potential.energy_model.embedding.register_full_backward_hook(lambda *_: None)
    return made


def _watched() -> Any:
    from wandb.integration.torch.wandb_torch import TorchHistory

    made = tiny.module(num_layers=2)
    TorchHistory().add_log_gradients_hook(made, log_freq=1)
    return made


REFUSED: dict[str, tuple[Callable[[], Any], Callable[[], list[Any]]]] = {
    "unfreezing": (MODULES["plain"], lambda: [Unfreezing()]),
    "backbone": (MODULES["plain"], lambda: [callbacks.BackboneFinetuning(1)]),
    "average with batch normalization": (_with_batch_norm, lambda: [callbacks.StochasticWeightAveraging(1e-3)]),
    "callback clips": (MODULES["plain"], lambda: [ClipsItself()]),
    "module clips": (_module_clips_itself, list),
    "batch size": (MODULES["plain"], lambda: [callbacks.BatchSizeFinder()]),
    "watched": (_watched, list),
    **{f"hook of a {kind}": (partial(_hooked, kind), list) for kind in ("parameter", "sum", "submodule")},
}


def refused(name: str) -> tuple[str, int]:
    """Returns the error of a fit, and how many steps were made before it."""
    make, more = REFUSED[name]
    trainer = quiet_trainer({}, max_epochs=3, limit_val_batches=0, callbacks=more())
    made = make()
    made.backbone = made.potential.energy_model.embedding
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trainer.fit(made, tiny.data())
        except Exception as error:
            return f"{type(error).__name__}: {error}", trainer.global_step
    return "", trainer.global_step


def scaled_batch_size() -> str:
    """Runs Lightning's search for the largest batch, and returns its error."""
    from lightning.pytorch.tuner import Tuner

    try:
        Tuner(quiet_trainer({}, max_epochs=1)).scale_batch_size(MODULES["plain"](), datamodule=tiny.data())
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
