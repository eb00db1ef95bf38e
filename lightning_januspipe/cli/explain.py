"""Rewrites the errors of jsonargparse in one line: what is unknown, missing or invalid, and what was probably meant."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Sequence

from jsonargparse import ArgumentParser  # type: ignore[attr-defined]

_NAMED = tuple(
    f"{package}.{name}"
    for package in ("lightning.pytorch", "pytorch_lightning")
    for name in ("callbacks", "loggers", "strategies", "profilers")
) + tuple(f"lightning_januspipe.{name}" for name in ("callbacks", "data", "models"))
"""Modules with classes that a recipe may name without their module, or with it."""

_DUMPS = ("Does not validate", "Subtypes:", "Errors:", "Given value", "- Expected a <class", "Subclass types", "- a ")
"""How lines of jsonargparse's errors begin that list types, forms and values."""


def explain_error(message: str, options: Sequence[str]) -> str:
    """Returns an error of jsonargparse in one line.

    Args:
        message: The error.
        options: The options of the command line, such as ``--trainer.max_epochs``.
    """
    keys = [option.removeprefix("--") for option in options]
    rules: tuple[tuple[str, Callable[[re.Match[str], str], str]], ...] = (
        (r"Option '(\w+)' is not accepted", _unknown_argument),
        (r"module '([\w.]+)' has no attribute '(\w+)'", _unknown_class),
        (r"Expected a dot import path string: (\w+)", _unknown_name),
        (r"does not accept option '([\w.]+)'", lambda found, _: f"unknown key {found[1]}{_meant(found[1], keys)}"),
        (
            r"unrecognized arguments: (--[^\s=]+)",
            lambda found, _: f"unknown option {found[1]}{_meant(found[1], options)}",
        ),
        (r"unrecognized arguments: (\S+\.ya?ml)", lambda found, _: f"{found[0]}; did you mean --config {found[1]}?"),
        (
            r"invalid choice: '([^']*)' \(choose from (.*)\)",
            lambda found, _: found[0] + _meant(found[1], re.findall("'([^']*)'", found[2])),
        ),
        (r"the following arguments are required: (.+)", _missing),
        (r"Expected a <class '(\w+)'>\. Got value: (.*)", _wrong_type),
        (r"(?s)Problems parsing config: (.+)", lambda found, _: f"a --config file is no YAML: {_line(found[1])}"),
    )
    for pattern, explain in rules:
        if found := re.search(pattern, message):
            return explain(found, message[: found.start()])
    return _value(message)


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _place(before: str) -> str:
    """Returns the option that an error is about, from the text before it."""
    keys = re.findall(r'Parser key "([^"]+)"', before)
    return f"--{'.'.join(keys)}" if keys else ""


def _unknown_argument(found: re.Match[str], before: str) -> str:
    (*_, path) = re.findall(r"class_path '([\w.]+)'", before) or [""]
    known = ArgumentParser().add_class_arguments(pkgutil.resolve_name(path)) if path else []
    return f"{_place(before)}: unknown argument {found[1]} of {path.rpartition('.')[2]}{_meant(found[1], known)}"


def _unknown_class(found: re.Match[str], before: str) -> str:
    names = [n for n in dir(importlib.import_module(found[1])) if n[0].isupper()]
    return f"{_place(before)}: unknown class {found[2]} in {found[1]}{_meant(found[2], names)}"


def _unknown_name(found: re.Match[str], before: str) -> str:
    names: set[str] = set()
    for module in _NAMED:
        try:
            names.update(n for n in dir(importlib.import_module(module)) if n[0].isupper())
        except ModuleNotFoundError:  # one Lightning is enough
            continue
    return f"{_place(before)}: unknown class {found[1]}{_meant(found[1], names)}"


def _wrong_type(found: re.Match[str], before: str) -> str:
    return f"{_place(before)}: invalid value {found[2]}; expected {found[1]}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _missing(found: re.Match[str], before: str) -> str:
    place = _place(before)
    names = re.split(r",\s*", found[1])
    if not place and any("." not in name for name in names):  # positional arguments
        return f"missing {', '.join(names)}"
    wanted = [f"{place}.{name}" if place else f"--{name.partition('.')[2]}" for name in names]
    hint = "" if place else "; a recipe has it: --config RECIPE, and `januspipe init` writes recipes"
    return f"missing {', '.join(wanted)}{hint}"


def _value(message: str) -> str:
    """Returns an error about a value, without the types and inner values that jsonargparse lists."""
    start = re.match(r'Parser key "([^"]+)":', message)
    if start is None:
        return message
    place, rest = f"--{start[1]}", message[start.end() :]
    lines = [line.strip() for line in rest.splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(_DUMPS)]
    if not causes:
        types = re.findall(r"Expected a <class '(\w+)'>", rest)
        wanted = " or ".join("null" if name == "NoneType" else name for name in dict.fromkeys(types))
        given = re.search(r"Given value: (.*)", rest)
        return f"{place}: invalid value {given[1] if given else ''}" + (f"; expected {wanted}" if wanted else "")
    return f"{place}: " + "; ".join(cause.removeprefix("- ") for cause in causes).replace(":; ", ": ")
