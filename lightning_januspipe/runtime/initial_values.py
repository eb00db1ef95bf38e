"""Gives values to modules that are made on the meta device, where tensors have shapes but no memory.

The values come from a checkpoint, or are drawn by the ``reset_parameters`` of submodules, each with a seed of its own.
This seed depends on the run's seed and on the submodule's name only. So the values are the same on every mesh.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.parameter import is_lazy

from lightning_januspipe.random_state import seeded


def without_values(module: nn.Module) -> list[str]:
    """Returns the names of parameters and buffers on the meta device."""
    return [name for name, t in _named_tensors(module) if t.is_meta]


def give_values(tensor: Tensor, values: Tensor) -> None:
    """Gives a tensor other values on another kind of device; the object stays the same for all who hold it.

    Args:
        tensor: A parameter or a buffer.
        values: Its new values; they share no memory with it.
    """
    is_parameter = isinstance(tensor, nn.Parameter)
    other = nn.Parameter(values, requires_grad=tensor.requires_grad) if is_parameter else values
    # torch.utils.swap_tensors refuses objects with weak references, which are to this very object, and stay right.
    torch._C._swap_tensor_impl(tensor, other)  # type: ignore[attr-defined]


def take_values(tensor: Tensor) -> None:
    """Moves a parameter or a buffer to the meta device and frees its memory; the object stays the same."""
    give_values(tensor, torch.empty_like(tensor, device="meta"))


MakeRoom = Callable[[Iterable[Tensor]], None]
"""Gives memory with undefined values to those tensors that are on the meta device."""


def make_room(tensors: Iterable[Tensor], device: torch.device | str = "cpu") -> None:
    """Gives memory with undefined values to those tensors that are on the meta device."""
    for tensor in tensors:
        if tensor.is_meta:
            give_values(tensor, torch.empty_like(tensor, device=device))


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Moves parameters of modules that are made inside the block to the meta device, each as soon as it is made.

    Buffers stay, with what constructors compute.
    """

    def move(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is None or parameter.is_meta:
            return
        if is_lazy(parameter):
            raise ValueError(_without_shape(f"{name} of {type(module).__name__}"))
        take_values(parameter)

    handle = register_module_parameter_registration_hook(move)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def loading_into_meta(module: nn.Module, make_room: MakeRoom = make_room) -> Iterator[None]:
    """Gives memory to tensors on the meta device inside the block; those that nothing writes to go back to it.

    Args:
        module: The LightningModule.
        make_room: Gives the memory, by default that of the host.
    """
    room = _Room(module, make_room)
    try:
        yield
    finally:
        for _, tensor in room.untouched():
            take_values(tensor)


def draw_missing(module: nn.Module, seed: int, make_room: MakeRoom = make_room) -> None:
    """Fills parameters and buffers on the meta device by ``reset_parameters`` of their submodules.

    Submodules draw after the submodules that they contain, as constructors do, each with its own seed. Tensors that
    have values keep them.

    Args:
        module: The LightningModule.
        seed: The seed of the run.
        make_room: Gives memory to tensors on the meta device, by default that of the host.

    Raises:
        ValueError: No ``reset_parameters`` fills a tensor; the message names it.
    """
    attributes = [f"{name}.{key}" for name, part in module.named_modules() for key in _plain_tensors_on_meta(part)]
    if attributes:
        raise ValueError(
            f"{_listed(attributes)} of {type(module).__name__}: a tensor on the meta device that is no parameter "
            "and no buffer gets no values. Use register_buffer for it, and make the module in configure_model within "
            "self.trainer.init_module(empty_init=True), which leaves buffers as constructors compute them."
        )
    missing = {id(t) for _, t in _named_tensors(module) if t.is_meta}
    if not missing:
        return
    room = _Room(module, make_room)
    for name, part in reversed(list(module.named_modules())):
        tensors = [t for _, t in _named_tensors(part)]
        reset = getattr(part, "reset_parameters", None)
        if not callable(reset) or all(id(t) not in missing for t in tensors):
            continue
        kept = [(t, t.detach().clone()) for t in tensors if id(t) not in missing]
        with seeded(_seed_of(name, seed)), torch.no_grad():
            reset()
            for tensor, values in kept:
                tensor.copy_(values)
    untouched = room.untouched()
    if untouched:
        room.take_back()
        names = [name for name, _ in untouched]
        owner = module.get_submodule(names[0].rpartition(".")[0])
        raise ValueError(
            f"{_listed(names)} of {type(module).__name__} {'has' if len(names) == 1 else 'have'} no values: made on "
            f"the meta device, in no checkpoint given, and filled by no reset_parameters. Give {type(owner).__name__}, "
            "or a module that contains it, a method reset_parameters that fills its parameters and buffers in place. "
            "If only buffers are missing, make the module in configure_model within "
            "self.trainer.init_module(empty_init=True) instead of "
            'torch.device("meta"): it leaves buffers as constructors compute them.'
        )


def _plain_tensors_on_meta(part: nn.Module) -> list[str]:
    """Returns the names of a module's attributes that are tensors on the meta device, but no parameters or buffers."""
    return [key for key, value in vars(part).items() if isinstance(value, Tensor) and value.is_meta]


def _without_shape(what: str) -> str:
    return (
        f"{what} has no shape before the first forward pass (it is lazy), and cannot be made on the meta device. Give "
        "the module its sizes, such as nn.Linear in the place of nn.LazyLinear."
    )


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


class _Room:
    """Gives memory to the tensors of a module on the meta device, and tells which nothing has written to."""

    def __init__(self, module: nn.Module, make_room: MakeRoom) -> None:
        self._given: list[tuple[str, Tensor, int]] = []
        for name, tensor in _named_tensors(module):
            if tensor.is_meta:
                if is_lazy(tensor):
                    raise ValueError(_without_shape(name))
                make_room([tensor])
                with torch.no_grad():
                    tensor.fill_(_filler(tensor.dtype))
                self._given.append((name, tensor, tensor._version))

    def take_back(self) -> None:
        for _, tensor, _ in self._given:
            take_values(tensor)

    def untouched(self) -> list[tuple[str, Tensor]]:
        # Writing through .data leaves the version as it is, but changes the values.
        return [(n, t) for n, t, version in self._given if t.numel() and t._version == version and _is_filler(t)]


def _filler(dtype: torch.dtype) -> Any:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).max


def _is_filler(tensor: Tensor) -> bool:
    filler = _filler(tensor.dtype)
    same = tensor.isnan() if filler != filler else tensor == filler
    return bool(same.all())


def _seed_of(name: str, seed: int) -> int:
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return int.from_bytes(digest[:4], "big")  # numpy takes 32 bits


def _named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]
