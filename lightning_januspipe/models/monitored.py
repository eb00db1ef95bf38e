"""Compares the names that callbacks monitor with those that a module logs, before training begins."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from typing import Any

_STAGES = ("train_", "val_")


def check_monitors(callbacks: Iterable[Any], logged: Sequence[str], others: Sequence[tuple[str, str]] = ()) -> None:
    """Refuses a callback that waits for a value that is never logged.

    Only names that begin with ``train_`` or ``val_`` are compared: other callbacks may log values of other names.

    Args:
        callbacks: Callbacks of the Trainer; those with an attribute ``monitor`` are looked at.
        logged: Names that the module logs.
        others: What else monitors a value, and the name of the value.

    Raises:
        ValueError: A name is not logged.
    """
    monitored = [(type(one).__name__, getattr(one, "monitor", None)) for one in callbacks]
    for owner, name in [*monitored, *others]:
        if isinstance(name, str) and name.startswith(_STAGES) and name not in logged:
            near = get_close_matches(name, logged, 1)
            hint = f"did you mean {near[0]!r}? All names: " if near else "expected one of "
            raise ValueError(f"{owner} monitors {name!r}, which is never logged; {hint}{', '.join(logged)}")
