"""Copies a user's loader, and gives the copy more methods; the loader itself is not changed."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

from torch.utils.data import DataLoader

if TYPE_CHECKING:
    AnyLoader = DataLoader[Any]
else:
    AnyLoader = object
"""The base of a class that is put before a loader's own class."""


def copied_loader(mixin: type, kind: type, source: Any) -> Any:
    """Returns a copy of a loader whose class has the methods of a mixin before those of the loader's class.

    The copy is made without ``__init__``, which in subclasses of ``DataLoader`` may ignore or rename its arguments. Its
    class has the name of the loader's class.

    Args:
        mixin: A class derived from :data:`AnyLoader`.
        kind: The class of the loader.
        source: The loader whose attributes the copy gets.
    """
    mixed = types.new_class(kind.__name__, (mixin, kind))
    mixed.__module__, mixed.__qualname__ = kind.__module__, kind.__qualname__
    copy: Any = object.__new__(mixed)
    copy.__dict__.update(source.__dict__)
    return copy
