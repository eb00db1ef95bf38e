"""Trains modules that are made on the meta device, and counts the bytes of parameters that a rank ever holds."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest.mock import patch

import checkpoint_workers
import compiled_workers
import lightning
import plain_modules
import strategy_workers
import torch
from explicit_models import SelfDividing
from torch import nn

from lightning_januspipe.capture import capture
from lightning_januspipe.capture.cache.store import VARIABLE
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.runtime import initial_values, paged_parameters, parameter_residence
from lightning_januspipe.runtime.batch_checks import BatchChecks
from lightning_januspipe.runtime.paged_parameters import PagedParameters
from lightning_januspipe.runtime.parameter_residence import ParameterResidence
from lightning_januspipe.strategy.initial_value_hooks import InitialValueHooks
from lightning_januspipe.testing import quiet_trainer, runs


def made_in_hook(on_meta: bool = True, num_layers: int = 4) -> Any:
    """Returns a module whose parameters have no values when it is made, or all of them."""
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    class Made(PotentialModule):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            torch.set_default_dtype(torch.float64)
            super().__init__(nn.Identity(), stress_weight=1.0)
            self.potential = None

        def configure_model(self) -> None:
            if self.potential is None:
                torch.manual_seed(3)
                with self.trainer.init_module(empty_init=on_meta):
                    self.potential = EquivariantPotential(
                        ["Cu", "Ni", "Al"], 5.0, num_layers=num_layers, num_features=8, l_max=1
                    )
                assert all(p.is_meta == on_meta for p in self.parameters())

    return Made()


def train(
    strategy: dict[str, Any] | None, folder: str, more: dict[str, Any], on_meta: bool = True, fault: str = ""
) -> dict[str, Any]:
    """Trains as :func:`checkpoint_workers.train` does; with the most bytes of parameters that were there at once.

    Args:
        strategy: Arguments of the strategy.
        folder: Where checkpoints are saved.
        more: More arguments of :func:`checkpoint_workers.train`.
        on_meta: Whether the module is made on the meta device.
        fault: "other seed" or "not filled" breaks the initial values on one rank.
    """
    made = made_in_hook(on_meta)
    most = 0

    def given(tensor: Any, values: Any) -> None:
        nonlocal most
        if fault == "not filled" and os.environ["RANK"] == "1":
            values = torch.zeros_like(values)
        give_values(tensor, values)
        most = max(most, checkpoint_workers._memory(made.parameters()))

    give_values, seed_of = initial_values.give_values, initial_values._seed_of
    other = int(fault == "other seed")
    with (
        patch.object(parameter_residence, "give_values", given),
        patch.object(initial_values, "give_values", given),
        patch.object(initial_values, "_seed_of", lambda name, seed: seed_of(name, seed + other)),
    ):
        found = checkpoint_workers.train(strategy, folder, {"module": lambda: made, **more})
    names = [n for n, p in made.named_parameters() if p.is_meta]
    state = {n: v for n, v in found["state"].items() if not v.is_meta}
    return found | {"most": most, "state": state, "absent": names}


def errors(folder: str) -> list[str]:
    """Returns how runs of a module on the meta device end that cannot go on."""
    from torch.optim import Adagrad

    made, other, averaged = made_in_hook(), made_in_hook(), made_in_hook()
    other.configure_optimizers = lambda: Adagrad(other.parameters())
    averaged.on_fit_start = lambda: setattr(averaged, "averages", [p.detach().clone() for p in averaged.parameters()])
    runs = [
        {"module": lambda: other},
        {"module": lambda: averaged},
        {"module": lambda: made, "stop": ("exception", 1, None)},
        {"module": lambda: made},
    ]
    ended = [checkpoint_workers.train({}, folder, {"num_steps": 2, "callbacks": (), **more})["ended"] for more in runs]
    limited = {"pipeline_size": 1, "graph_size": 2, "memory_limit": 1e9, "shard": "auto"}
    graph = checkpoint_workers.train(limited, folder, {"num_steps": 1, "callbacks": (), "module": made_in_hook})
    return [*ended[:2], ended[3], graph["ended"]]


def train_interpreted(*arguments: Any) -> dict[str, Any]:
    """Trains as :func:`train`, with interpreted phase graphs."""
    with compiled_workers.interpreted() as graphs:
        found = train(*arguments)
    assert graphs
    return found


def train_drawn(folder: str, more: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """Trains with plain Lightning, from the values that a module on the meta device gets from the seed."""
    made = made_in_hook(on_meta=False, num_layers=num_layers)
    made.configure_model = partial(_draw, made, made.configure_model)
    return checkpoint_workers.train(None, folder, {"module": lambda: made, **more})


def train_large(
    strategy: dict[str, Any], folder: str, more: dict[str, Any], share: float, cache: str
) -> dict[str, Any]:
    """Trains as :func:`train` does, with less memory than the capture of the whole module takes.

    Besides, it returns the most bytes of parameters that were there at once, those of gradients that the capture has
    summed, how often a trace was made, and how often an operation has asked for parameters of a file. Parameters are
    counted whenever some get values, also those that come from a file for one operation only; those of a checkpoint in
    a single file do not count.

    Args:
        strategy: Arguments of the strategy; with ``compile`` phase graphs are interpreted.
        folder: Where checkpoints are saved.
        more: More arguments of :func:`checkpoint_workers.train`.
        share: The memory of a rank, in bytes of all parameters.
        cache: The folder of traces.
    """
    made = made_in_hook(num_layers=2)
    most = {"parameters": 0, "gradients": 0, "traces": 0, "pages": 0}
    is_saving = False

    def count() -> None:
        if not is_saving:
            most["parameters"] = max(most["parameters"], checkpoint_workers._memory(made.parameters()))

    def given(tensor: Any, values: Any) -> None:
        give_values(tensor, values)
        count()

    def bring(pages: Any, wanted: Any) -> None:
        brought(pages, wanted)
        most["pages"] += 1
        count()

    def add(buffers: Any, parameters: Any, gradients: Any) -> None:
        added(buffers, parameters, gradients)
        if made.trainer.strategy.runner is None:
            most["gradients"] = max(most["gradients"], sum(t.nbytes for t in buffers.sums()))

    def trace(*arguments: Any) -> Any:
        most["traces"] += 1
        return traced(*arguments)

    @contextmanager
    def saving(residence: Any) -> Iterator[None]:
        nonlocal is_saving
        is_saving = True
        with whole(residence):
            yield
        is_saving = False

    give_values, brought, added = initial_values.give_values, PagedParameters._bring, GradientBuffers.add
    traced, whole = capture.trace_potential, ParameterResidence.whole_on_first_rank
    with (
        patch.object(parameter_residence, "give_values", given),
        patch.object(paged_parameters, "give_values", given),
        patch.object(initial_values, "give_values", given),
        patch.object(PagedParameters, "_bring", bring),
        patch.object(ParameterResidence, "whole_on_first_rank", saving),
        patch.object(GradientBuffers, "add", add),
        patch.object(capture, "trace_potential", trace),
        memory_for(made, share),
        patch.dict(os.environ, {VARIABLE: cache}),
        compiled_workers.interpreted() if strategy.get("compile") else nullcontext() as graphs,
    ):
        found = checkpoint_workers.train(strategy, folder, {"module": lambda: made, **more})
    assert graphs is None or graphs
    names = [n for n, p in made.named_parameters() if p.is_meta]
    whole = sum(p.nbytes for p in made.parameters())
    return found | most | {"state": _values(made), "absent": names, "whole": whole}


def memory_for(made: Any, share: float) -> Any:
    """Returns a context in which a rank has memory for a share of the bytes of a module's parameters."""
    memory = property(lambda _: share * sum(p.nbytes for p in made.parameters()))
    return patch.object(InitialValueHooks, "_memory", memory)


def _values(made: Any) -> dict[str, Any]:
    """Returns what this rank has of a module's state, in memory or in a file."""
    file, parameters = vars(made).get("_januspipe_file"), dict(made.named_parameters())
    state = {n: v.clone() for n, v in made.state_dict().items() if not v.is_meta}
    absent = {n: p for n, p in parameters.items() if file is not None and p.is_meta}
    return state | {n: file.values(p) for n, p in absent.items()}


def in_turn(
    strategy: dict[str, Any] | None, runs: tuple[str, ...], num_evaluated: int = 4, share: float | None = None
) -> dict[str, Any]:
    """Runs a Trainer's methods on one module, each with a new Trainer; the values come from the seed.

    Args:
        strategy: Arguments of the strategy; None is plain Lightning.
        runs: Names of the methods.
        num_evaluated: Structures to evaluate, in batches of two.
        share: The memory of a rank, in bytes of all parameters; None is that of the machine.

    Returns:
        How the runs ended, their metrics, the module's state, how often a rank has compared a batch of a new kind, and
        whether a file has parameters.
    """
    from lightning_januspipe.data import EMTDataModule

    made = made_in_hook(on_meta=strategy is not None, num_layers=2)
    if strategy is None:
        made.configure_model = partial(_draw, made, made.configure_model)
    num_checks = 0
    validate = BatchChecks._validate

    def counted(*arguments: Any) -> None:
        nonlocal num_checks
        validate(*arguments)
        num_checks += 1

    given = {"num_microbatches": 1, "schedule": "wavek", "timeout": 60, "shard": "none"}
    ended, metrics = [], []
    for name in runs:
        lightning.seed_everything(1, verbose=False)
        data = EMTDataModule(
            num_train=8,
            num_val=num_evaluated,
            num_test=num_evaluated,
            sizes=(4,),
            dtype="float64",
            batch_size=2,
            shuffle=False,  # the random numbers of an order would be others after the constructors' own
        )
        arguments = {"max_steps": 2, "limit_val_batches": 1.0, "use_distributed_sampler": False}
        trainer = quiet_trainer(None if strategy is None else given | strategy, **arguments)
        with patch.object(BatchChecks, "_validate", counted), memory_for(made, share) if share else nullcontext():
            try:
                getattr(trainer, name)(made, datamodule=data)
                ended.append("")
            except Exception as error:
                ended.append(f"{type(error).__name__}: {error}")
        metrics.append(strategy_workers.plain(trainer.callback_metrics))
    has_file = "_januspipe_file" in vars(made)
    found = {"ended": ended, "metrics": metrics, "num_checks": num_checks, "has_file": has_file}
    return found | {"state": _values(made)}


class MadeExplicit(plain_modules.Explicit):
    """Makes a potential with stages of its own, on the meta device or in one process with the values of the seed."""

    def __init__(self) -> None:
        super().__init__()
        self.potential: Any = None

    def configure_model(self) -> None:
        if self.potential is None:
            is_alone = os.environ["WORLD_SIZE"] == "1"
            with self.trainer.init_module(empty_init=not is_alone):
                self.potential = SelfDividing(num_layers=4)
            if is_alone:
                _redraw(self)


def train_explicit(strategy: dict[str, Any] | None) -> runs.RunRecord:
    """Trains a potential with stages of its own; the record has those parameters that have values on this rank.

    Args:
        strategy: Arguments of the strategy; None for plain Lightning.
    """

    def copies(module: Any) -> dict[str, Any]:
        return {n: p.detach().clone() for n, p in module.named_parameters() if not p.is_meta}

    given = MadeExplicit, plain_modules.Data, strategy or {}, 3, {}
    with patch.object(runs, "_copies", copies):
        return runs.train_reference(*given, 1) if strategy is None else runs.train_in_pipeline(*given)


def refused_explicit(strategy: dict[str, Any], memory: float) -> str:
    """Returns how training ends where a rank has less memory than the capture of all parameters takes, in bytes."""
    with patch.object(InitialValueHooks, "_memory", memory):
        try:
            train_explicit(strategy)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return ""


def _draw(module: Any, make: Callable[[], None]) -> None:
    """Makes the potential, with the values that a module on the meta device gets from the seed."""
    if module.potential is None:
        make()
        _redraw(module)


def _redraw(module: Any) -> None:
    for parameter in module.parameters():
        initial_values.take_values(parameter)
    initial_values.draw_missing(module, torch.initial_seed())
