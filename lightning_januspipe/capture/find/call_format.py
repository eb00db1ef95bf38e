"""Identifies the arguments of the potential's call by their place: batches may hold the same entries in any order."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.capture.trees import leaves, with_leaves
from lightning_januspipe.errors import CaptureError, quoted


def call_leaves(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves of a call by their place in it, such as ``args[0]['positions']``, in a fixed order."""
    return dict(sorted([*leaves(args, "args"), *leaves(kwargs, "kwargs")]))


def size_carrier(size: int, device: torch.device | str = "cpu") -> Tensor:
    """Returns an integer as the length of an empty tensor, ``(size, 0)``: in a trace, lengths stay symbols."""
    return torch.empty((size, 0), device=device)


_ABSENT = "(no value)"


@dataclass(frozen=True)
class CallFormat:
    """Describes the calls that a captured potential takes.

    Attributes:
        tensors: places of tensors, in the order of the program's inputs.
        constants: places and values of leaves that were the same for both example batches; they are part of the
            program.
        sizes: places of integers, such as a number of graphs. They are inputs too, as lengths, after the tensors.
        evaluation: values of constants in evaluation, where they differ (``training=False``).
        without_effect: places of leaves that the captured potential does not read.
        ones: place and dimension of the tensors' sizes that were 1 in both calls.
    """

    tensors: list[str]
    constants: dict[str, Any]
    sizes: list[str] = field(default_factory=list)
    evaluation: dict[str, Any] = field(default_factory=dict)
    without_effect: frozenset[str] = frozenset()
    ones: frozenset[tuple[str, int]] = frozenset()

    @classmethod
    def of(
        cls,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        other: tuple[tuple[Any, ...], dict[str, Any]] | None = None,
    ) -> CallFormat:
        """Returns the format of a call.

        Args:
            args: positional arguments.
            kwargs: keyword arguments.
            other: arguments of the call for the second example batch. Non-tensor arguments whose values differ between
                the two, such as file names, are assumed not to affect the result, which the validation on the second
                batch verifies; integers are taken for sizes.
        """
        found = call_leaves(args, kwargs)
        second = found if other is None else call_leaves(*other)
        tensors = [p for p, x in found.items() if isinstance(x, Tensor)]
        sizes = [p for p, x in found.items() if p in second and _is_size(x) and _is_size(second[p])]
        # An integer that is 0 or 1 for both batches is a flag rather than a size.
        sizes = [p for p in sizes if found[p] > 1 or second[p] != found[p]]
        known = {*tensors, *sizes}
        constants = {
            p: x for p, x in found.items() if p not in known and p in second and (x is second[p] or _same(x, second[p]))
        }
        without_effect = (found.keys() | second.keys()) - known - constants.keys()
        ones = frozenset(
            (p, dim)
            for p in (tensors if other is not None else ())
            if isinstance(second.get(p), Tensor) and second[p].dim() == found[p].dim()
            for dim, (a, b) in enumerate(zip(found[p].shape, second[p].shape, strict=True))
            if a == b == 1
        )
        return cls(tensors, constants, sizes, without_effect=frozenset(without_effect), ones=ones)

    def with_evaluation(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CallFormat:
        """Returns the format that also takes the constants of a call in evaluation."""
        found = call_leaves(args, kwargs)
        values = {p: found.get(p, _ABSENT) for p in self.constants}
        return replace(
            self,
            evaluation={p: x for p, x in values.items() if not _same(x, self.constants[p])},
            without_effect=frozenset(self.without_effect | self.new_entries(args, kwargs)),
        )

    def new_entries(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
        """Returns the places of leaves that no known call had. All entries of a list but tensors count as one place."""
        known = {*self.tensors, *self.sizes, *self.constants, *self.without_effect}
        lists = {_list_of(p) for p in known}
        return {
            p
            for p, x in call_leaves(args, kwargs).items()
            if p not in known and (isinstance(x, Tensor) or _list_of(p) not in lists)
        }

    def bind(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Returns the tensors of another call and carriers of its sizes, in the order of the program's inputs.

        Args:
            path: dotted name of the potential, for the message.
            args: positional arguments of the call.
            kwargs: keyword arguments of the call.

        Raises:
            CaptureError: the call lacks a tensor or a size, or has other constants.
        """
        found = call_leaves(args, kwargs)
        missing = [p for p in self.tensors if not isinstance(found.get(p), Tensor)]
        missing += [p for p in self.sizes if not _is_size(found.get(p))]
        if missing:
            raise CaptureError(
                f"the potential {quoted(path)} was captured with the tensors {[*self.tensors, *self.sizes]}, but this "
                f"batch calls it without {missing}. Every batch has to hold the same entries."
            )
        for place, value in self.constants.items():
            given = found.get(place, _ABSENT)
            if not _same(given, value) and not _same(given, self.evaluation.get(place, value)):
                raise CaptureError(
                    f"the potential {quoted(path)} was captured with {place} = {value!r}, but this batch calls it with "
                    f"{given!r}. Values that change with the batch have to be tensors or integers."
                )
        tensors = [found[p] for p in self.tensors]
        device = tensors[0].device if tensors else "cpu"
        return [*tensors, *(size_carrier(found[p], device) for p in self.sizes)]

    def unbind(self, args: Any, kwargs: Any, tensors: list[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns a call's arguments with other tensors and sizes in their places: the inverse of :meth:`bind`.

        Args:
            args: positional arguments of a call of this format.
            kwargs: its keyword arguments.
            tensors: what :meth:`bind` would return for the wanted call.
        """
        values: dict[str, Any] = dict(zip(self.tensors, tensors, strict=False))
        carriers = tensors[len(self.tensors) :]
        values.update({p: c.shape[0] for p, c in zip(self.sizes, carriers, strict=False)})
        replace: Callable[[str, Any], Any] = lambda place, leaf: values.get(place, leaf)  # noqa: E731
        return with_leaves(args, replace, "args"), with_leaves(kwargs, replace, "kwargs")


def _list_of(place: str) -> str:
    return re.sub(r"\[\d+\]$", "[*]", place)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _same(a: Any, b: Any) -> bool:
    try:
        return bool(a is b or a == b)
    except (TypeError, ValueError, RuntimeError):  # objects that cannot be compared count as different
        return False
