"""Adapts jsonargparse's parsers: each error is one line, and names the option that was meant."""

from __future__ import annotations

import difflib
import os
import pkgutil
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser
else:
    try:
        from lightning.pytorch.cli import LightningArgumentParser
    except ModuleNotFoundError:
        from pytorch_lightning.cli import LightningArgumentParser
_DUMPS = (
    *("Does not validate", "Subtypes:", "Errors:", "Given value type", "- Expected a <class"),
    *("Given value: Namespace", "Given value: NestedArg"),
)
"""How lines of jsonargparse's errors begin that list types and inner values."""


class OneLineErrors(ArgumentParser):
    """Ends with status 2 and one line, ``PROGRAM: error: MESSAGE``, on a wrong command line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message, with what is spelt most like an unknown option, and exits."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        program, text = self.prog.replace(" [options]", ""), _short(message)
        close = difflib.get_close_matches(*self._unknown(text), n=1)
        self.exit(2, f"{program}: error: {text}" + (f"; did you mean {close[0]}?" if close else "") + "\n")

    def _unknown(self, text: str) -> tuple[str, list[str]]:
        """Returns the unknown option that an error names, and what it could have been."""
        if found := re.search(r"class_path '([\w.]+)'.*Option '(\w+)' is not accepted", text):
            return found[2], ArgumentParser().add_class_arguments(pkgutil.resolve_name(found[1]))
        if found := re.search(r"unrecognized arguments: (--[^\s=]+)", text):
            return found[1], list(self._option_names())
        if found := re.search(r"unrecognized arguments: (\S+\.ya?ml)", text):
            return f"--config {found[1]}", [f"--config {found[1]}"]
        return "", []

    def _option_names(self) -> Iterator[str]:
        """Returns the options of this parser and of its subcommands."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action.choices, Mapping):
                for parser in action.choices.values():
                    yield from parser._option_names()


def _short(message: str) -> str:
    """Returns an error of jsonargparse on one line, without the types and inner values that it lists."""
    found = re.match(r'Parser key "([^"]+)":', message)
    if found is None:
        return message
    lines = [line.strip() for line in message[found.end() :].splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(_DUMPS)] or lines
    return f"--{found[1]}: " + "; ".join(cause.removeprefix("- ") for cause in causes).replace(":; ", ": ")


class CommandParser(OneLineErrors):
    """Parses a command that runs no Trainer.

    Args:
        prog: The command, such as ``januspipe bench``.
        description: What it does, in whole sentences.
        arguments: Further arguments of the parser.
    """

    def __init__(self, prog: str | None = None, description: str | None = None, **arguments: Any) -> None:
        super().__init__(prog=prog, description=description, allow_abbrev=False, **arguments)


class RecipeParser(OneLineErrors, LightningArgumentParser):
    """Parses a command that takes a recipe.

    Attributes:
        left_to_data: Dotted keys that stand in the configuration, but not in its printed form.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.left_to_data: Sequence[str] = ()
        self._is_lenient = False
        self.add_argument(
            "-c", "--config", action=ActionConfigFile, help="A recipe: a YAML file of arguments. Later ones win."
        )

    def parse_given(self, args: Sequence[str]) -> Namespace:
        """Returns what a command line and its files give: no defaults, and required arguments may be missing."""
        self._is_lenient = True
        try:
            return self.parse_args([arg for arg in args if not arg.startswith("--print_config")], defaults=False)
        finally:
            self._is_lenient = False

    def validate(self, *args: Any, **kwargs: Any) -> None:
        """Checks a configuration, unless :meth:`parse_given` asked for an unfinished one."""
        if not self._is_lenient:
            super().validate(*args, **kwargs)

    def dump(self, namespace: Namespace, *args: Any, **kwargs: Any) -> str:
        """Returns a configuration as YAML, without what is left to the data; a comment names that."""
        shown = namespace.clone()
        left = [key for key in self.left_to_data if key in shown]
        for key in left:
            del shown[key]
        comment = "".join(f"# {key}: taken from the data\n" for key in left)
        return comment + super().dump(shown, *args, **kwargs)
