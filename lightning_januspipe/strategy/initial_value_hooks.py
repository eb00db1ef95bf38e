"""Implements the hooks that give values to modules that are made on the meta device."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from typing_extensions import override

from lightning_januspipe.distributed import on_every_rank, on_first_rank
from lightning_januspipe.runtime.initial_values import (
    draw_missing,
    loading_into_meta,
    make_room,
    parameters_on_meta,
    without_values,
)
from lightning_januspipe.runtime.parameter_residence import ParameterResidence
from lightning_januspipe.strategy.shared_state import StrategyState

_LOST = "_januspipe_lost_values"


class InitialValueHooks(StrategyState):
    """Loads or draws on global rank 0 the values of a module that is made on the meta device."""

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        """Makes tensors on the device; with ``empty_init`` parameters have no values, and buffers have theirs."""
        with super().tensor_init_context(empty_init=False):
            if empty_init:
                with parameters_on_meta():
                    yield
            else:
                yield

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads the module's state; parameters on the meta device get theirs on global rank 0 only."""

        def load() -> None:
            if self.global_rank == 0:
                with loading_into_meta(self._module):
                    self._module.load_state_dict(checkpoint["state_dict"], strict=strict)
                return
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
                self._module.load_state_dict(checkpoint["state_dict"], strict=strict)

        on_every_rank(load, partial(self._mesh.gathered, what="loading of a checkpoint"))

    def _give_initial_values(self) -> None:
        """Draws what no checkpoint has given, and prepares the ranks without values to get theirs.

        Raises:
            ValueError: Nothing says which values a tensor has, or the values of an earlier run are lost.
        """
        module = self._module

        def draw() -> None:
            lost = vars(module).pop(_LOST, False) and without_values(module)
            if lost:
                raise ValueError(
                    f"{', '.join(lost[:3])} of {type(module).__name__} {'was' if len(lost) == 1 else 'were'} on other "
                    "ranks when an exception ended training, and the values are lost. Load a checkpoint into a new "
                    "module."
                )
            draw_missing(module, torch.initial_seed())

        on_first_rank(draw, self.global_rank, self.broadcast)
        of_ranks = self._mesh.gathered(without_values(module), "search for parameters without values")
        absent = {n for of_rank in of_ranks for n in of_rank}
        is_made_in_hook = self.lib.helpers.is_overridden("configure_model", module)
        if self._shares_replicas and (is_made_in_hook or absent):
            if self._spreads_experts:
                raise ValueError(
                    f"expert_size={self.options.expert_size} is not available for a module that is made in "
                    "configure_model or on the meta device, whose parameters leave the ranks of other stages. Make it "
                    "in __init__, or use expert_size=1."
                )
            if absent and self.mesh_shape.graph > 1 and self.options.memory_limit is not None:
                raise ValueError(
                    f"memory_limit={self.options.memory_limit} with graph_size > 1 measures the potential on each "
                    "graph rank, but only global rank 0 has parameters that were made on the meta device. Leave "
                    "memory_limit out, or make the module in host memory."
                )
            self._residence = ParameterResidence(module, self._mesh, absent)
        else:
            make_room((*module.parameters(), *module.buffers()))

    def _note_lost_values(self, module: nn.Module) -> None:
        """Lets a later run refuse a module whose other stages were on ranks that have not given them back."""
        vars(module)[_LOST] = True
