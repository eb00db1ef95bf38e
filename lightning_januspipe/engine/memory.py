"""Counts the bytes that phases hold, in storages: the same on every device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_januspipe.engine.timeline import ActionRecorder
from lightning_januspipe.schedule import Action


class StorageCounter(TorchDispatchMode):
    """Counts the bytes of the storages that were made while it was active and are still alive.

    An operation makes a storage if one of its results has a storage that no argument has. Views make none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Counts these tensors too."""
        for tensor in tensors:
            if (storage := _storage(tensor)) is not None:
                # The weak reference keeps the address from being used again.
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def alive(self, without: Iterable[Tensor] = ()) -> int:
        """Returns the bytes of what was made and is alive, without the storages of some tensors."""
        self._made = {k: (ref, size) for k, (ref, size) in self._made.items() if not ref.expired()}
        excluded = {s._cdata for s in map(_storage, without) if s is not None}
        return sum(size for key, (_, size) in self._made.items() if key not in excluded)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation and notes what it made."""
        result = func(*args, **(kwargs or {}))
        given = {s._cdata for s in map(_storage, pytree.tree_leaves((args, kwargs))) if s is not None}
        made = [t for t in pytree.tree_leaves(result) if (s := _storage(t)) is not None and s._cdata not in given]
        self.note(made)
        return result


class MemoryRecorder(ActionRecorder):
    """Measures the bytes that a rank holds after each action of the step that it is entered for.

    It counts all that was made in the step and is alive: what phases saved, and messages, but no gradients of
    parameters. Counting is slow, so times that are measured meanwhile mean little.

    Args:
        gradients: Returns the gradients of the parameters, as they are when called.

    Attributes:
        peak: The most bytes held after an action.
    """

    def __init__(self, gradients: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__(torch.device("cpu"))
        self.peak = 0
        self._gradients = gradients
        self._counter = StorageCounter()

    def __enter__(self) -> MemoryRecorder:
        self._counter.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._counter.__exit__(*error)

    def end(self, action: Action) -> None:
        """Measures what is held now."""
        super().end(action)
        self.peak = max(self.peak, self._counter.alive(without=self._gradients()))


def _storage(value: object) -> torch.UntypedStorage | None:
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return value.untyped_storage()
    return None
