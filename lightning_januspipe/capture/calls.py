"""Arguments of the potential's call, by their place: batches may hold the same entries in another order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.utils._pytree as pytree
from torch import Tensor

from lightning_januspipe.capture.errors import CaptureError


def call_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Leaves of a call by their place in it, in a fixed order."""
    found, _ = pytree.tree_flatten_with_path((args, kwargs))
    return dict(sorted((pytree.keystr(path), leaf) for path, leaf in found))


@dataclass(frozen=True)
class CallFormat:
    """What a call of the potential looked like when it was captured.

    Attributes:
        tensors: places of its tensors, in the order of the program's inputs.
        constants: places and values of its other leaves; they are part of the program.
    """

    tensors: list[str]
    constants: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallFormat:
        """The format of one call."""
        leaves = call_leaves(args, kwargs)
        return cls(
            [p for p, x in leaves.items() if isinstance(x, Tensor)],
            {p: x for p, x in leaves.items() if not isinstance(x, Tensor)},
        )

    def bind(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Tensors of another call, in the order of the program's inputs.

        Args:
            path: the potential's name, for the message.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.

        Raises:
            CaptureError: the call lacks a tensor, or has other constants.
        """
        leaves = call_leaves(args, kwargs)
        missing = [p for p in self.tensors if not isinstance(leaves.get(p), Tensor)]
        if missing:
            raise CaptureError(
                f"the potential {path!r} was captured with the tensors {self.tensors}, but this batch calls it without "
                f"{missing}. Every batch has to hold the same entries."
            )
        for place, value in self.constants.items():
            if place not in leaves or not _same(leaves[place], value):
                raise CaptureError(
                    f"the potential {path!r} was captured with {place} = {value!r}, but this batch calls it with "
                    f"{leaves.get(place)!r}. Values that change with the batch have to be tensors, "
                    "in dicts, lists or tuples; take them out of other objects before calling the potential."
                )
        return [leaves[p] for p in self.tensors]


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a is b or a == b)
    except (TypeError, ValueError, RuntimeError):  # objects that cannot be compared count as different
        return False
