"""Runs ``januspipe bench``: the benchmarks of docs/benchmarks.md."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, get_type_hints

from jsonargparse.typing import PositiveInt

from lightning_januspipe.bench import training_steps
from lightning_januspipe.bench.compiled import compiled
from lightning_januspipe.bench.datasets import datasets
from lightning_januspipe.bench.emulate.schedules import emulate_schedules
from lightning_januspipe.bench.emulate.sharded_steps import emulate_sharded
from lightning_januspipe.bench.expert_steps import expert_placements
from lightning_januspipe.bench.experts import expert_loads
from lightning_januspipe.bench.graph import graph
from lightning_januspipe.bench.janus import predicted_steps
from lightning_januspipe.bench.janus_check import checked_prediction
from lightning_januspipe.bench.largest import largest
from lightning_januspipe.bench.molecular_dynamics import molecular_dynamics
from lightning_januspipe.bench.parameter_uses import parameter_uses
from lightning_januspipe.bench.replicas import unequal_structures
from lightning_januspipe.bench.rounded_rows import exchange_errors
from lightning_januspipe.bench.state_bytes import state_bytes
from lightning_januspipe.cli.parsers import CommandParser

BENCHMARKS: Mapping[str, Callable[..., str]] = {
    "single": training_steps.single_process,
    "two-ranks": training_steps.two_ranks,
    "contention": training_steps.contention,
    "simulation": training_steps.simulation,
    "messages": training_steps.messages,
    "balance": unequal_structures,
    "graph": graph,
    "compile": compiled,
    "largest": largest,
    "data": datasets,
    "md": molecular_dynamics,
    "emulate": emulate_schedules,
    "shard": emulate_sharded,
    "state": state_bytes,
    "uses": parameter_uses,
    "experts": expert_loads,
    "placements": expert_placements,
    "exchanges": exchange_errors,
    "janus": predicted_steps,
    "janus-check": checked_prediction,
}
"""The benchmarks; each returns its tables. If one has a parameter ``work``, its options are the fields of that type."""

_OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "runs": {"type": PositiveInt, "help": "Runs of each configuration, of which medians are taken."},
    "num_structures": {"type": PositiveInt, "help": "Structures that are made."},
    "compile": {"action": "store_true", "help": "Compile the phases of all ranks before training."},
    "emulate": {
        "action": "store_true",
        "help": "Run the simulated meshes instead, with a process for each of their 32 ranks, real messages, and "
        "phases that sleep. Each of --steps takes more than a minute.",
    },
}
"""Arguments of benchmarks that jsonargparse would make other options of."""

_DESCRIPTION = """\
Measures this machine: several configurations on the same work, in turn, in fresh processes. docs/benchmarks.md shows
the tables.
"""


def main(args: Sequence[str]) -> None:
    """Runs ``januspipe bench NAME`` and prints its tables.

    Args:
        args: The command line after ``bench``.
    """
    parser = CommandParser("januspipe bench", _DESCRIPTION)
    commands = parser.add_subcommands(dest="name", metavar="NAME", title="benchmarks", description=None)
    for name, benchmark in BENCHMARKS.items():
        commands.add_subcommand(name, _parser_of(benchmark), help=(inspect.getdoc(benchmark) or "").partition("\n")[0])
    words = ["emulate", *args[1:]] if args[:1] == ["--emulate"] else list(args)
    given = parser.parse_args(words or ["--help"])
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    benchmark, values = BENCHMARKS[given.name], vars(given[given.name])
    work = _work_of(benchmark)
    if work is not None:
        values["work"] = work(**{field.name: values.pop(field.name) for field in fields(work)})
    try:
        text = benchmark(**values)
    except ValueError as error:
        parser.error(str(error))
    print(f"\n{text}")


def _parser_of(benchmark: Callable[..., str]) -> CommandParser:
    """Returns a parser of a benchmark's arguments."""
    parser = CommandParser(description=(inspect.getdoc(benchmark) or "").partition("\n\nArgs:")[0])
    parameters = inspect.signature(benchmark).parameters
    own = [name for name in _OPTIONS if name in parameters]
    for name in own:
        parser.add_argument(f"--{name}", default=parameters[name].default, **_OPTIONS[name])
    parser.add_function_arguments(benchmark, skip={name for name in ("work", "pool", *own) if name in parameters})
    work = _work_of(benchmark)
    if work is not None:
        parser.add_class_arguments(work)
    return parser


def _work_of(benchmark: Callable[..., str]) -> Any:
    """Returns the dataclass of a benchmark's parameter ``work``; None if it has no such parameter."""
    return get_type_hints(benchmark).get("work")
