"""How much memory the phases of a stage hold, counted in storages: the same on every device."""

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

    An operation makes a storage if a result has one that no argument has: views of a parameter make none.
    """

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def note(self, tensors: Iterable[Tensor]) -> None:
        """Count these too."""
        for tensor in tensors:
            if (storage := _storage(tensor)) is not None:
                # The weak reference keeps the address from being used again.
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())

    def alive(self, without: Iterable[Tensor] = ()) -> int:
        """Bytes of what was made and is alive, without the storages of some tensors."""
        self._made = {k: (ref, size) for k, (ref, size) in self._made.items() if not ref.expired()}
        excluded = {s._cdata for s in map(_storage, without) if s is not None}
        return sum(size for key, (_, size) in self._made.items() if key not in excluded)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and note what it made."""
        result = func(*args, **(kwargs or {}))
        given = {s._cdata for s in map(_storage, pytree.tree_leaves((args, kwargs))) if s is not None}
        made = [t for t in pytree.tree_leaves(result) if (s := _storage(t)) is not None and s._cdata not in given]
        self.note(made)
        return result


class MemoryRecorder(ActionRecorder):
    """Measures what a rank holds after each action, instead of times, which mean little meanwhile.

    To be entered for a step. Everything that is made in the step and alive counts: what phases saved and messages, but
    no gradients of parameters.

    Args:
        gradients: of parameters, as they are when called.
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
        """See what is held now."""
        super().end(action)
        self.peak = max(self.peak, self._counter.alive(without=self._gradients()))


def _storage(value: object) -> torch.UntypedStorage | None:
    if isinstance(value, Tensor) and value.layout is torch.strided:
        return value.untyped_storage()
    return None
