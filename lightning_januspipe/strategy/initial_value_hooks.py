"""Implements the hooks that give values to modules that are made on the meta device."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.distributed import on_every_rank, on_first_rank
from lightning_januspipe.runtime.initial_values import (
    MakeRoom,
    draw_missing,
    give_values,
    loading_into_meta,
    make_room,
    parameters_on_meta,
    without_values,
)
from lightning_januspipe.runtime.paged_parameters import PagedParameters, ParameterFile
from lightning_januspipe.runtime.parameter_residence import ParameterResidence
from lightning_januspipe.schedule.costs import format_bytes
from lightning_januspipe.strategy.shared_state import StrategyState

_LOST = "_januspipe_lost_values"
_FILE = "_januspipe_file"

_OF_CAPTURE = 3
"""What the capture of a module needs on one rank, in bytes of its parameters: them, and their gradients twice."""


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
                with self._room() as room, loading_into_meta(self._module, room):
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

        def draw() -> str:
            lost = vars(module).pop(_LOST, False) and without_values(module)
            if lost:
                raise ValueError(
                    f"{', '.join(lost[:3])} of {type(module).__name__} {'was' if len(lost) == 1 else 'were'} on other "
                    "ranks when an exception ended training, and the values are lost. Load a checkpoint into a new "
                    "module."
                )
            with self._room() as room:
                draw_missing(module, torch.initial_seed(), room)
            if _FILE not in vars(module):
                return ""
            return (
                f"the parameters of {type(module).__name__} take {format_bytes(_bytes(module))}; for its capture "
                f"global rank 0 reads them from a file in {self._trainer.default_root_dir} as they are needed, since "
                f"they and two copies of their gradients exceed {format_bytes(self._memory)}"
            )

        told = on_first_rank(draw, self.global_rank, self.broadcast)
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
            if told:
                self.lib.rank_zero.rank_zero_info(f"januspipe: {told}")
            self._residence = ParameterResidence(module, self._mesh, absent, bool(told), vars(module).get(_FILE))
        else:
            file = vars(module).pop(_FILE, None)
            for parameter in module.parameters() if file is not None else ():
                if parameter.is_meta and parameter in file:
                    give_values(parameter, file.values(parameter))
            make_room((*module.parameters(), *module.buffers()))

    def _note_lost_values(self, module: nn.Module) -> None:
        """Lets a later run refuse a module whose other stages were on ranks that have not given them back."""
        vars(module).pop(_FILE, None)
        vars(module)[_LOST] = True

    # -- modules that global rank 0 cannot hold ----------------------------------------------------------------------

    @property
    def _memory(self) -> float:
        """Returns the bytes that a rank may use: the limit that was given, or the memory of its device."""
        if self.options.memory_limit is not None:
            return self.options.memory_limit
        if self.root_device.type == "cuda":
            return torch.cuda.mem_get_info(self.root_device)[1]
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def _is_too_large(self) -> bool:
        """Tells whether parameters were made on the meta device, and one rank cannot hold what their capture needs."""
        is_large = _OF_CAPTURE * _bytes(self._module) > self._memory
        return is_large and self._shares_replicas and bool(without_values(self._module))

    @contextmanager
    def _room(self) -> Iterator[MakeRoom]:
        """Returns what gives memory to parameters on the meta device; the values of a large module go to a file."""
        module = self._module
        if _FILE not in vars(module) and self._is_too_large():
            vars(module)[_FILE] = ParameterFile(self._trainer.default_root_dir)
        file = vars(module).get(_FILE)
        if file is None:
            yield make_room
            return
        with PagedParameters(file, "cpu", self._memory / _OF_CAPTURE).on(module.parameters()) as pages:
            yield pages.make_room

    def _paging(self) -> tuple[Callable[[], AbstractContextManager[Any]], float | None]:
        """Returns a context in which global rank 0 can run the module, and the most bytes of gradients in it."""
        if self._residence is None or not self._residence.is_paged:
            return nullcontext, None
        file, share = vars(self._module).get(_FILE), self._memory / _OF_CAPTURE
        if file is None:
            return nullcontext, share / 2
        return lambda: PagedParameters(file, self.root_device, share).on(self._module.parameters()), share / 2

    def _value_in_file(self, value: Any) -> Any:
        """Returns a value of the module's state, from the file if it is a parameter whose values are there."""
        if not isinstance(value, Tensor):
            return value
        file: ParameterFile | None = vars(self._module).get(_FILE)
        if file is not None and isinstance(value, nn.Parameter) and value.is_meta and value in file:
            return file.values(value)
        return value.detach()


def _bytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())
