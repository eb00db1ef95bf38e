"""Runs modules whose parameters do not fit into memory: a file has their values, which are read when they are needed.

That is for the capture, which runs the whole module on one rank. A parameter keeps its shape, its strides and its
device, while its storage is empty. Before an operation reads a parameter, or any view of it, its values are read from
the file into this storage, and others that were not used for the longest time leave. So results, and derivatives of
every order, are those of a module that is there as a whole.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from lightning_januspipe.engine.clock import UntimedWork
from lightning_januspipe.runtime.initial_values import give_values, make_room, take_values

_ALWAYS_THERE = 1 / 8
"""The share of the pages for the smallest parameters, which never leave."""


class ParameterFile:
    """Keeps the values of parameters in a temporary file, which is gone when nothing refers to it.

    Args:
        folder: The folder of the file.
    """

    def __init__(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder, prefix=".januspipe-", buffering=0)  # noqa: SIM115
        self._entries: dict[nn.Parameter, tuple[int, Tensor]] = {}
        self._end = 0

    def __contains__(self, parameter: nn.Parameter) -> bool:
        """Tells whether the file has values of a parameter."""
        return parameter in self._entries

    def forget(self, parameter: nn.Parameter) -> None:
        """Forgets the values of a parameter."""
        self._entries.pop(parameter, None)

    def values(self, parameter: nn.Parameter) -> Tensor:
        """Returns the values of a parameter in host memory."""
        place, like = self._entries[parameter]
        found = torch.empty_like(like, device="cpu")
        view = _memory_of(found)
        done = 0
        while done < len(view):
            read = os.preadv(self._file.fileno(), [view[done:]], place + done)
            if not read:
                raise OSError(f"the file of parameters ends at byte {place + done}, within a parameter")
            done += read
        return found.to(parameter.dtype)  # the module may have been converted since

    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Writes the values of a parameter, from a tensor with its shape and dtype on any device."""
        entry = self._entries.get(parameter)
        if entry is None or entry[1].dtype != values.dtype:
            entry = self._end, torch.empty_like(values, device="meta").detach()
            self._end += entry[1].untyped_storage().nbytes()
        place, like = entry
        host = torch.empty_like(like, device="cpu").copy_(values.detach())
        view = _memory_of(host)
        done = 0
        while done < len(view):
            done += os.pwrite(self._file.fileno(), view[done:], place + done)
        self._entries[parameter] = entry


@dataclass(eq=False)
class _Page:
    """Holds a parameter whose storage is full or empty.

    Attributes:
        parameter: The parameter.
        storage: Its storage.
        num_bytes: The size of the storage when it is full.
        is_there: Whether it is full.
        is_changed: Whether it has values that the file does not have.
        stays: Whether it never leaves.
    """

    parameter: nn.Parameter
    storage: torch.UntypedStorage
    num_bytes: int
    is_there: bool = False
    is_changed: bool = False
    stays: bool = False


class PagedParameters(UntimedWork):
    """Gives parameters on the meta device values from a file, inside of the ``with`` block.

    After the block they are on the meta device again, and the file has what the block wrote to them.

    Args:
        file: The file.
        device: The device of the parameters inside of the block.
        most_bytes: The most bytes of their values that are there at once. An operation that reads more has them all.

    Attributes:
        seconds: The time that reading and writing have taken.
    """

    def __init__(self, file: ParameterFile, device: torch.device | str, most_bytes: float) -> None:
        super().__init__()
        self._file, self._device, self._most_bytes = file, device, most_bytes
        self._pages: dict[int, _Page] = {}
        self._there: OrderedDict[_Page, None] = OrderedDict()
        self._bytes_there = self._bytes_staying = 0

    @contextmanager
    def on(self, parameters: Iterable[nn.Parameter]) -> Iterator[PagedParameters]:
        """Gives values to those of the parameters that are on the meta device and in the file, inside of the block."""
        self.make_room([p for p in parameters if p.is_meta and p in self._file])
        try:
            with self:
                yield self
        finally:
            for page in self._pages.values():
                self._end(page)
            self._pages.clear()

    def make_room(self, tensors: Iterable[Tensor]) -> None:
        """Gives parameters on the meta device an empty storage, which operations may write to, and buffers memory."""
        absent = [t for t in tensors if t.is_meta]
        make_room((t for t in absent if not isinstance(t, nn.Parameter)), self._device)
        for parameter in sorted((t for t in absent if isinstance(t, nn.Parameter)), key=lambda p: p.nbytes):
            values = torch.empty_like(parameter, device=self._device).detach()
            storage = values.untyped_storage()
            num_bytes = storage.nbytes()
            storage.resize_(0)
            give_values(parameter, values)
            stays = self._bytes_staying + num_bytes <= _ALWAYS_THERE * self._most_bytes
            self._bytes_staying += num_bytes if stays else 0
            page = _Page(parameter, parameter.untyped_storage(), num_bytes, stays=stays)
            self._pages[page.storage._cdata] = page

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation when the values that it reads are there; torch refuses views of empty storages, too."""
        kwargs = kwargs or {}
        pages = [page for t in pytree.tree_leaves((args, kwargs)) if (page := self._page(t)) is not None]
        if pages:
            began = time.perf_counter()
            self._bring(dict.fromkeys(pages))
            self.seconds += time.perf_counter() - began
            if func._schema.is_mutable:
                for page in _written(func, args, kwargs, self._page):
                    page.is_changed = True
        return func(*args, **kwargs)

    def _page(self, value: Any) -> _Page | None:
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return None
        return self._pages.get(value.untyped_storage()._cdata)

    def _bring(self, pages: Mapping[_Page, None]) -> None:
        needed = sum(page.num_bytes for page in pages if not page.is_there)
        for page in list(self._there):
            if self._bytes_there + needed <= self._most_bytes:
                break
            if page not in pages and not page.stays:
                self._send_away(page)
        for page in pages:
            if not page.is_there:
                page.storage.resize_(page.num_bytes)
                page.is_there = True
                self._bytes_there += page.num_bytes
                if page.parameter in self._file:
                    page.parameter.detach().copy_(self._file.values(page.parameter))
            self._there[page] = None
            self._there.move_to_end(page)

    def _send_away(self, page: _Page) -> None:
        if page.is_changed:
            self._file.write(page.parameter, page.parameter)
        page.storage.resize_(0)
        page.is_there = page.is_changed = False
        self._bytes_there -= page.num_bytes
        del self._there[page]

    def _end(self, page: _Page) -> None:
        """Moves a parameter to the meta device, when the file has its values."""
        parameter = page.parameter
        if parameter.is_meta:  # nothing has given it values
            self._file.forget(parameter)
            return
        if parameter.untyped_storage()._cdata != page.storage._cdata:  # its ``data`` was replaced
            self._file.write(parameter, parameter)
        elif page.is_there:
            self._send_away(page)
        take_values(parameter)


def _written(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], page_of: Callable[[Any], _Page | None]
) -> Iterator[_Page]:
    """Yields the pages that an operation writes to."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = args[place] if place < len(args) else kwargs.get(argument.name)
        for leaf in pytree.tree_leaves(value):
            if (page := page_of(leaf)) is not None:
                yield page


def _memory_of(tensor: Tensor) -> memoryview:
    """Returns the bytes of a tensor's storage in host memory."""
    content: Any = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()
    return memoryview(content)
