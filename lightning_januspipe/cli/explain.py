"""Rewrites the errors of jsonargparse in one line: what is unknown, missing or invalid, and what was probably meant."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from jsonargparse import ArgumentParser  # type: ignore[attr-defined]

_NAMED = tuple(
    f"{package}.{name}"
    for package in ("lightning.pytorch", "pytorch_lightning")
    for name in ("callbacks", "loggers", "strategies", "profilers")
) + tuple(f"lightning_januspipe.{name}" for name in ("callbacks", "data", "models"))
"""Modules with classes that a recipe may name without their module, or with it."""

_DUMPS = ("Does not validate", "Subtypes:", "Errors:", "Given value", "- Expected a <class", "Subclass types", "- a ")
"""How lines of jsonargparse's errors begin that list types, forms and values."""


def explain_error(message: str, options: Sequence[str], arguments: Mapping[str, str] | None = None) -> str:
    """Returns an error of jsonargparse in one line.

    Args:
        message: The error.
        options: The options of the command line, such as ``--trainer.max_epochs``.
        arguments: What each positional argument is, by name.
    """
    keys = [option.removeprefix("--") for option in options]
    rules: tuple[tuple[str, Callable[[re.Match[str], str], str]], ...] = (
        (r"Option '(\w+)' is not accepted", _unknown_argument),
        (r"module '([\w.]+)' has no attribute '(\w+)'", _unknown_class),
        (r"Expected a dot import path string: (\w+)", _unknown_name),
        (r"does not accept option '([\w.]+)'", lambda found, _: _unknown_key(found[1], keys)),
        (
            r"unrecognized arguments: (--[^\s=]+)",
            lambda found, _: f"unknown option {found[1]}{_meant(found[1], options)}",
        ),
        (r"unrecognized arguments: (\S+\.ya?ml)", lambda found, _: f"{found[0]}; did you mean --config {found[1]}?"),
        (
            r"invalid choice: '([^']*)' \(choose from (.*)\)",
            lambda found, _: found[0] + _meant(found[1], re.findall("'([^']*)'", found[2])),
        ),
        (
            r"the following arguments are required: (.+)",
            lambda found, before: _missing(found[1], _place(before), arguments or {}),
        ),
        (r"Expected a typing\.Literal\[(.*?)\]\. Got value: (.*)", _wrong_choice),
        (r"Expected a <class '(\w+)'>\. Got value: (.*)", _wrong_type),
        (r"(?s)Problems parsing config: (.+)", lambda found, _: f"this is no YAML: {_line(found[1])}"),
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


def _unknown_key(key: str, known: Sequence[str]) -> str:
    """Explains a key of a recipe that is unknown; the first part of its name may be what is misspelt."""
    known = [name for name in known if not name.endswith(".help")]
    first, _, rest = key.partition(".")
    firsts = {name.partition(".")[0] for name in known}
    close = difflib.get_close_matches(first, firsts, n=1)
    if not rest or first in firsts or not close:
        return f"unknown key {key}{_meant(key, known)}"
    whole = f"{close[0]}.{rest}"
    return (
        f"unknown key {key}; did you mean {whole}?"
        if whole in known
        else f"unknown key {first}; did you mean {close[0]}?"
    )


def _wrong_choice(found: re.Match[str], before: str) -> str:
    choices = re.findall("'([^']*)'", found[1])
    return f"{_place(before)}: invalid value {found[2]}; expected one of {found[1]}{_meant(found[2], choices)}"


def _wrong_type(found: re.Match[str], before: str) -> str:
    return f"{_place(before)}: invalid value {found[2]}; expected {found[1]}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _missing(found: str, place: str, arguments: Mapping[str, str]) -> str:
    names = re.split(r",\s*", found)
    if not place and any("." not in name for name in names):  # positional arguments
        meanings = [arguments.get(name, "").rstrip(".") for name in names]
        told = [f" ({meaning[0].lower()}{meaning[1:]})" if meaning else "" for meaning in meanings]
        return f"missing {', '.join(name.upper() + what for name, what in zip(names, told, strict=True))}"
    wanted = [f"{place}.{name}" if place else f"--{name.partition('.')[2]}" for name in names]
    hint = "" if place else "; a recipe has it: --config RECIPE, and `januspipe init` writes recipes"
    return f"missing {', '.join(wanted)}{hint}"


def _value(message: str) -> str:
    """Returns an error about a value, without the types and inner values that jsonargparse lists."""
    start = re.match(r'Parser key "([^"]+)":', message)
    if start is None:
        return without_types(message)
    place, rest = f"--{start[1]}", message[start.end() :]
    causes = _causes(rest)
    if not causes:
        types = re.findall(r"Expected a <class '(\w+)'>", rest)
        wanted = " or ".join("null" if name == "NoneType" else name for name in dict.fromkeys(types))
        given = re.search(r"Given value: (.*)", rest)
        return f"{place}: invalid value {given[1] if given else ''}" + (f"; expected {wanted}" if wanted else "")
    return f"{place}: {causes}"


def without_types(message: str) -> str:
    """Returns an error that a class has raised when jsonargparse made it, without the types and values listed.

    Args:
        message: The error; one of another kind is returned as it is.
    """
    found = re.match(r"Does not validate against any of the Union subtypes\s+Subtypes: (.*)", message)
    causes = _causes(message) if found else ""
    if found is None or not causes:
        return message
    named = re.search(r"class_path='[\w.]*?(\w+)'", message)
    option = "--data: " if "LightningDataModule" in found[1] else "--model: " if "LightningModule" in found[1] else ""
    return f"{option or (f'{named[1]}: ' if named else '')}{causes}"


def _causes(message: str) -> str:
    """Returns the lines of an error, without those that list types, forms and values, in one line."""
    lines = [line.strip() for line in message.splitlines()]
    causes = [line for line in lines if line and not line.startswith(_DUMPS)]
    return "; ".join(cause.removeprefix("- ") for cause in causes).replace(":; ", ": ")
