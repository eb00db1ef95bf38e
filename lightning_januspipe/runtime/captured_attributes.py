"""Notices attributes of a potential that change in training, which the captured graph holds as constants."""

from __future__ import annotations

import warnings

from torch import nn

_PLAIN = (bool, int, float, str)


class CapturedAttributes:
    """Remembers the numbers and strings that are attributes of a potential's modules.

    Args:
        potential: The potential, as it was captured.
    """

    def __init__(self, potential: nn.Module) -> None:
        self._potential = potential
        self._values = _attributes(potential)

    def warn_of_changes(self) -> None:
        """Warns of attributes whose values have changed; once of each."""
        found = _attributes(self._potential)
        changed = sorted(n for n in found.keys() & self._values if found[n] != self._values[n])
        if not changed:
            return
        told = ", ".join(f"{name} from {self._values[name]!r} to {found[name]!r}" for name in changed[:3])
        for name in changed:
            del self._values[name]
        warnings.warn(
            f"attributes of the potential were changed after training had started: {told}. This has no effect on "
            "training, whose stages hold the values of its start. Use a buffer for what has to change.",
            stacklevel=2,
        )


def _attributes(potential: nn.Module) -> dict[str, bool | int | float | str]:
    return {
        f"{path}.{name}" if path else name: value
        for path, module in potential.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, _PLAIN) and value == value and name != "training" and not name.startswith("_")
    }
