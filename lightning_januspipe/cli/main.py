"""Starts the command line ``januspipe``: finds the subcommand, and hands it the other arguments."""

from __future__ import annotations

import logging
import os
import pkgutil
import sys
from collections.abc import Sequence
from functools import partial
from types import TracebackType

from lightning_januspipe.errors import CheckpointError
from lightning_januspipe.strategy.quiet import ignore_warnings

DEBUG = "JANUSPIPE_DEBUG"
"""The environment variable that :mod:`lightning_januspipe.strategy.failure` names too; ``--debug`` sets it."""

TRAINER_COMMANDS = {
    "fit": "Trains a potential and prints a table of its errors.",
    "validate": "Evaluates a checkpoint on the validation data.",
    "test": "Evaluates a checkpoint on the test data.",
    "predict": "Predicts the structures of a file into another one.",
}
"""The subcommands that run a Trainer, and what each does."""

OTHER_COMMANDS = {
    "plan": ("lightning_januspipe.cli.plan:main", "Tells before training what each schedule would give."),
    "bench": ("lightning_januspipe.bench.command:main", "Measures this machine with the benchmarks of the docs."),
    "init": ("lightning_januspipe.cli.init:main", "Writes the recipes of the package into the current folder."),
    "export": ("lightning_januspipe.cli.export:main", "Compiles the potential of a checkpoint into one file."),
    "consolidate": ("lightning_januspipe.cli.consolidate:main", "Makes one file of a checkpoint folder."),
}
"""The other subcommands: the function that gets the rest of the command line, and what each does."""

_DESCRIPTION = """\
Trains interatomic potentials in a pipeline of devices. `januspipe init` writes recipes, which are YAML files, and
`januspipe fit --config recipes/quickstart.yaml` runs the first. `januspipe COMMAND --help` explains a command.
With --debug, errors come with whole tracebacks; with --verbose, a run tells more of its capture.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Runs ``januspipe``.

    Args:
        args: Command line without the name of the program; None for ``sys.argv``. A Trainer with several processes
            starts them by running ``sys.argv`` again, so that it needs None here.
    """
    given = sys.argv[1:] if args is None else list(args)
    if "--debug" in given:
        given.remove("--debug")
        os.environ[DEBUG] = "1"
    elif DEBUG not in os.environ and sys.excepthook is sys.__excepthook__:
        sys.excepthook = partial(print_error, " ".join(["januspipe", *given[:1]]))
    is_verbose = "--verbose" in given
    given = [arg for arg in given if arg != "--verbose"]
    command = given[0] if given else ""
    ignore_warnings()
    if command in OTHER_COMMANDS:
        pkgutil.resolve_name(OTHER_COMMANDS[command][0])(given[1:])
    elif command in TRAINER_COMMANDS or command in ("-c", "--config"):
        from lightning_januspipe.cli.fit import PotentialCLI

        if is_verbose:
            logging.getLogger(PotentialCLI.LOGGER).setLevel(logging.DEBUG)
        PotentialCLI(given)
    else:
        _explain(given)


def print_error(program: str, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the error that ends the program: of what a user has given only the message, else a short traceback.

    Args:
        program: The program and its command.
        kind: The type of the error, as of the other two arguments of ``sys.excepthook``.
        error: What was raised.
        trace: Its traceback.
    """
    from lightning_januspipe.cli.explain import without_types
    from lightning_januspipe.strategy.failure import short_traceback

    if issubclass(kind, KeyboardInterrupt):
        print("stopped by Ctrl-C", file=sys.stderr)
    elif issubclass(kind, (ValueError, OSError, CheckpointError)) or kind.__name__ == "MisconfigurationException":
        print(f"{program}: error: {without_types(str(error))} (--debug prints where)", file=sys.stderr)
    else:
        print(*short_traceback(error), sep="\n", file=sys.stderr)
    sys.stderr.flush()


def _explain(args: Sequence[str]) -> None:
    """Prints the help, the version, or an error."""
    from lightning_januspipe import __version__
    from lightning_januspipe.cli.parsers import CommandParser

    parser = CommandParser("januspipe", _DESCRIPTION, version=__version__)
    commands = parser.add_subcommands(required=False, metavar="COMMAND", title="commands", description=None)
    for name, text in (TRAINER_COMMANDS | {name: text for name, (_, text) in OTHER_COMMANDS.items()}).items():
        commands.add_subcommand(name, CommandParser(), help=text)
    parser.parse_args(args or ["--help"])
