"""Adapts jsonargparse's parsers: each error is one line, and names the option that was meant."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace  # type: ignore[attr-defined]

from lightning_januspipe.cli.explain import explain_error

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser
else:
    try:
        from lightning.pytorch.cli import LightningArgumentParser
    except ModuleNotFoundError:
        from pytorch_lightning.cli import LightningArgumentParser


class OneLineErrors(ArgumentParser):
    """Ends with status 2 and one line, ``PROGRAM: error: MESSAGE``, on a wrong command line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message, with what is spelt most like an unknown option, and exits."""
        if not self.exit_on_error or "JSONARGPARSE_DEBUG" in os.environ:
            super().error(message, ex)
        program = self.prog.replace(" [options]", "")
        arguments = {a.dest: str(a.help) for a in self._actions if not a.option_strings and a.help}
        self.exit(2, f"{program}: error: {explain_error(message, list(self._option_names()), arguments)}\n")

    def _option_names(self) -> Iterator[str]:
        """Returns the options of this parser and of its subcommands."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action.choices, Mapping):
                for parser in action.choices.values():
                    yield from parser._option_names()


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
        self._file = ""
        self.add_argument(
            "-c", "--config", action=ActionConfigFile, help="A recipe: a YAML file of arguments. Later ones win."
        )

    def parse_path(self, path: Any, *args: Any, **kwargs: Any) -> Namespace:
        """Parses a file, which errors then name."""
        before, self._file = self._file, str(path)
        try:
            return super().parse_path(path, *args, **kwargs)
        finally:
            self._file = before

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message with the file that is being read, where YAML has no name for it, and exits."""
        super().error(message.replace("<unicode string>", self._file) if self._file else message, ex)

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
