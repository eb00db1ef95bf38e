"""Shows the roles of docstrings, such as ``:class:`Name```, as code in the pages of the API."""

from __future__ import annotations

import re
from typing import Any

from griffe import Extension, Object

_ROLE = re.compile(r":(?:class|func|meth|data|attr|mod):`~?(?:[\w.]*\.)?(\w+)`")


class Roles(Extension):
    """Replaces each role by the last part of its name."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Rewrites the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
