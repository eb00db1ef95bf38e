"""Runs ``januspipe bench``: the benchmarks of docs/benchmarks.md."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

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
from lightning_januspipe.bench.largest import largest
from lightning_januspipe.bench.molecular_dynamics import molecular_dynamics
from lightning_januspipe.bench.parameter_uses import parameter_uses
from lightning_januspipe.bench.replicas import unequal_structures
from lightning_januspipe.bench.rounded_rows import exchange_errors
from lightning_januspipe.bench.state_bytes import state_bytes
from lightning_januspipe.bench.work import Work
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
}
"""The benchmarks that train on this machine; each returns its tables."""

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
        own = CommandParser(description=(inspect.getdoc(benchmark) or "").partition("\n\nArgs:")[0])
        options = inspect.signature(benchmark).parameters
        own.add_argument(
            "--runs",
            type=PositiveInt,
            default=options["runs"].default,
            help="Runs of each configuration, of which medians are taken.",
        )
        if "emulate" in options:
            own.add_argument(
                "--emulate",
                action="store_true",
                help="Run the simulated meshes instead, with a process for each of their 32 ranks, real messages, and "
                "phases that sleep. Each of --steps takes more than a minute.",
            )
        if "compile" in options:
            own.add_argument("--compile", action="store_true", help="Compile the phases of all ranks before training.")
        if "num_structures" in options:
            default = options["num_structures"].default
            own.add_argument("--num_structures", type=PositiveInt, default=default, help="Structures that are made.")
        own.add_function_arguments(benchmark, skip={"work", "runs", "emulate", "compile", "num_structures"})
        own.add_class_arguments(Work)
        commands.add_subcommand(name, own, help=(inspect.getdoc(benchmark) or "").partition("\n")[0])
    emulate = CommandParser(description="Runs schedules with real messages between processes, and phases that sleep.")
    emulate.add_function_arguments(emulate_schedules)
    commands.add_subcommand("emulate", emulate, help=emulate.description)
    shard = CommandParser(description="Runs steps with sharded state, whose phases sleep, against their simulation.")
    shard.add_function_arguments(emulate_sharded, skip={"pool"})
    commands.add_subcommand("shard", shard, help=shard.description)
    state = CommandParser(description="Counts the bytes of parameters, gradients and optimizer state on each rank.")
    state.add_function_arguments(state_bytes, skip={"pool"})
    commands.add_subcommand("state", state, help=state.description)
    uses = CommandParser(description="Counts how often a step would gather parameters that are released between uses.")
    uses.add_function_arguments(parameter_uses)
    commands.add_subcommand("uses", uses, help=uses.description)
    experts = CommandParser(description="Counts how evenly experts load ranks, with and without placement by load.")
    experts.add_function_arguments(expert_loads)
    commands.add_subcommand("experts", experts, help=experts.description)
    placements = CommandParser(description="Times steps with experts on 2 and 4 ranks, as planned and as they are.")
    placements.add_function_arguments(expert_placements)
    commands.add_subcommand("placements", placements, help=placements.description)
    exchanges = CommandParser(description="Measures errors of gradients with rounded rows between ranks.")
    exchanges.add_function_arguments(exchange_errors)
    commands.add_subcommand("exchanges", exchanges, help=exchanges.description)
    janus = CommandParser(description="Predicts memory and step time of MatRIS-MoE on many GPUs; nothing is measured.")
    janus.add_function_arguments(predicted_steps)
    commands.add_subcommand("janus", janus, help=janus.description)
    words = ["emulate", *args[1:]] if args[:1] == ["--emulate"] else list(args)
    given = parser.parse_args(words or ["--help"])
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    values: dict[str, Any] = vars(given[given.name])
    try:
        if given.name == "emulate":
            text = emulate_schedules(**values)
        elif given.name == "shard":
            text = emulate_sharded(**values)
        elif given.name == "state":
            text = state_bytes(**values)
        elif given.name == "uses":
            text = parameter_uses(**values)
        elif given.name == "experts":
            text = expert_loads(**values)
        elif given.name == "placements":
            text = expert_placements(**values)
        elif given.name == "exchanges":
            text = exchange_errors(**values)
        elif given.name == "janus":
            text = predicted_steps(**values)
        else:
            work = Work(**{field.name: values.pop(field.name) for field in fields(Work)})
            text = BENCHMARKS[given.name](work, **values)
    except ValueError as error:
        parser.error(str(error))
    print(f"\n{text}")
