"""Trains modules that are made on the meta device, and counts the bytes of parameters that a rank ever holds."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import checkpoint_workers
import compiled_workers
import torch
from torch import nn

from lightning_januspipe.runtime import initial_values, parameter_residence


def made_in_hook(on_meta: bool = True) -> Any:
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
                        ["Cu", "Ni", "Al"], 5.0, num_layers=4, num_features=8, l_max=1
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
