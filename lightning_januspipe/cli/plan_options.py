"""The options of ``januspipe plan``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeFloat, PositiveInt

from lightning_januspipe.plan.export import FORMATS
from lightning_januspipe.plan.graph_share import GraphLink
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts
from lightning_januspipe.schedule.build import GENERATORS
from lightning_januspipe.schedule.request import Auto

_UNITS = {"": 1.0, "b": 1.0, **{f"{p}b": 1000.0**i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}ib": 1024.0**i for i, p in enumerate("kmgt", 1)}


@dataclass(frozen=True)
class PlanArguments:
    """The options of ``januspipe plan`` as they were given; None stands for an option that was left out.

    Attributes: see :func:`add_plan_options`.
    """

    ranks: int | None = None
    num_microbatches: int | None = None
    schedules: tuple[str, ...] = tuple(GENERATORS)
    wave_size: int | Auto | None = None
    max_live: int | None = None
    graph_sizes: tuple[int, ...] | None = None
    meshes: bool = False
    memory_limit: float | None = None
    latency: float | None = None
    bandwidth: float | None = None
    repeats: int | None = None
    extrapolate: bool = False
    costs: PhaseCosts | None = None
    memory: MemoryCosts | None = None
    message_bytes: float | None = None
    output: Path | None = None
    format: str = "svg"

    @classmethod
    def read(cls, given: Any) -> PlanArguments:
        """Returns the options that are in a parsed configuration.

        Args:
            given: A configuration with the arguments of :func:`add_plan_options`.

        Raises:
            ValueError: The text of an option has the wrong form, or options contradict each other.
        """
        values = {field.name: given[field.name] for field in fields(cls)}
        for name, read in _READERS.items():
            if values[name] is not None:
                try:
                    values[name] = read(values[name])
                except ValueError as error:
                    raise ValueError(f"--{name}: {error}") from None
        found = cls(**values)
        found._check_with_costs() if found.costs is not None else found._check_with_a_recipe()
        return found

    def _check_with_costs(self) -> None:
        if self.ranks is None:
            raise ValueError("--costs needs --ranks too, the number of ranks")
        if self.memory_limit is not None and self.memory is None:
            raise ValueError(
                "--memory_limit with --costs needs --memory ENERGY,FORCE,KEPT too, what a micro-batch holds"
            )
        if self.bandwidth is not None and math.isfinite(self.bandwidth) and self.message_bytes is None:
            raise ValueError("--bandwidth with --costs needs --message_bytes BYTES too, the size of a message")
        for name in ("extrapolate", "graph_sizes", "meshes"):
            if getattr(self, name):
                raise ValueError(f"--{name} is for a recipe, and --costs needs none: leave out one of them")

    def _check_with_a_recipe(self) -> None:
        for name in ("memory", "message_bytes"):
            if getattr(self, name) is not None:
                raise ValueError(f"--{name} is for --costs: with a recipe it is measured")
        if self.meshes and self.extrapolate:
            raise ValueError("--extrapolate is for one pipeline, and --meshes compares several: leave out one of them")

    @property
    def link(self) -> GraphLink:
        """What messages between ranks cost, as given or as usual."""
        usual = GraphLink()
        return GraphLink(
            usual.latency if self.latency is None else self.latency,
            usual.bandwidth if self.bandwidth is None else self.bandwidth,
        )


def add_plan_options(parser: ArgumentParser) -> None:
    """Adds the options of ``januspipe plan`` to a parser."""
    add = parser.add_argument_group("what to plan").add_argument
    add("--ranks", type=PositiveInt, metavar="P", help="Ranks of the pipeline; of all devices with --meshes.")
    add("--num_microbatches", type=PositiveInt, metavar="M", help="Micro-batches of a training step.")
    add(
        "--schedules",
        type=str,
        default="all",
        metavar="A,B",
        help=f"Schedules to compare: all, or some of {','.join(GENERATORS)}.",
    )
    add(
        "--wave_size",
        type=PositiveInt | Literal["auto"],
        metavar="K",
        help="Micro-batches in a wave of wavek and wavek-zb, or auto.",
    )
    add("--max_live", type=PositiveInt, metavar="L", help="Most micro-batches that a rank may hold at once.")
    add(
        "--graph_sizes",
        type=str,
        metavar="1,2,4",
        help="Numbers of graph ranks to compare, which share the atoms of the recipe's micro-batches. Default: 1 and "
        "the recipe's graph_size; 1,2,4 with --meshes.",
    )
    add(
        "--meshes",
        action="store_true",
        help="Compare all ways to share the devices between pipeline, replicas and graph ranks.",
    )
    add = parser.add_argument_group("the machine").add_argument
    add(
        "--memory_limit",
        type=str,
        metavar="BYTES",
        help="What saved tensors of micro-batches may take on a rank: 40e9, 40GB or 40GiB.",
    )
    add(
        "--latency",
        type=NonNegativeFloat,
        metavar="SECONDS",
        help="Time of a message. Default: 0; 20e-6 with --meshes and between graph ranks.",
    )
    add(
        "--bandwidth",
        type=str,
        metavar="BYTES/S",
        help="Rate of messages between two ranks, in each direction. Default: no limit; 10GB with --meshes and between "
        "graph ranks.",
    )
    add = parser.add_argument_group("with a recipe").add_argument
    add(
        "--repeats",
        type=PositiveInt,
        metavar="R",
        help="Measurements of each phase, of which medians are taken. Default: 7 or more, for 5 s.",
    )
    add(
        "--extrapolate",
        action="store_true",
        help="Share the times of a potential evenly over the ranks where it has fewer cuttable parts.",
    )
    add = parser.add_argument_group("without a model").add_argument
    add(
        "--costs",
        type=str,
        metavar="FE,FF,BF,BE[,WF,WE]",
        help="Milliseconds of one rank's share of a micro-batch. WF and WE can be deferred, and are not counted in BF "
        "and BE.",
    )
    add(
        "--memory",
        type=str,
        metavar="ENERGY,FORCE,KEPT",
        help="Bytes that a micro-batch holds on a rank from FE to BE, from FF to BF, and from BF to BE.",
    )
    add("--message_bytes", type=str, metavar="BYTES", help="Bytes of a message, for --bandwidth.")
    add = parser.add_argument_group("output").add_argument
    add("--output", type=Path, metavar="DIR", help="Folder for pictures, a trace, plan.json and schedules.")
    add("--format", type=Literal[FORMATS], default="svg", help="Format of the pictures.")


def parse_bytes(text: str) -> float:
    """Returns a number of bytes: ``40e9``, ``40GB`` (of 1000³ bytes) or ``40GiB`` (of 1024³).

    Raises:
        ValueError: The text has another form.
    """
    number = text.strip().rstrip("BKMGTikbmgt").strip()
    unit = text.strip()[len(number) :].strip().lower()
    try:
        value = float(number) * _UNITS[unit]
    except (KeyError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{text!r} is not a number of bytes; expected one like 40e9, 40GB or 40GiB")
    return value


def _bandwidth(text: str) -> float:
    value = parse_bytes(text)
    if value == 0:
        raise ValueError(f"{text!r}; expected a number of bytes per second > 0")
    return value


def _schedules(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == ("all",):
        return tuple(GENERATORS)
    for name in names or (text,):
        if name not in GENERATORS:
            close = difflib.get_close_matches(name, GENERATORS, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name!r} is no schedule; expected all, or {', '.join(GENERATORS)}{hint}")
    return names


def _graph_sizes(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in str(text).split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r}; expected whole numbers >= 1 with commas between them")
    return tuple(dict.fromkeys(map(int, parts)))


def _costs(text: str) -> PhaseCosts:
    try:
        values = [1e-3 * float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (4, 6) or min(values[:4]) <= 0 or min(values) < 0 or not all(map(math.isfinite, values)):
        raise ValueError(f"{text!r}; expected four or six times in ms, FE,FF,BF,BE[,WF,WE]; the first four are > 0")
    return PhaseCosts(*values)


def _memory(text: str) -> MemoryCosts:
    parts = text.split(",")
    if len(parts) != 3:
        raise ValueError(f"{text!r}; expected three numbers of bytes, ENERGY,FORCE,KEPT: 30MB,20MB,10MB")
    return MemoryCosts(*map(parse_bytes, parts))


_READERS: Mapping[str, Callable[[str], Any]] = {
    "schedules": _schedules,
    "graph_sizes": _graph_sizes,
    "memory_limit": parse_bytes,
    "bandwidth": _bandwidth,
    "costs": _costs,
    "memory": _memory,
    "message_bytes": parse_bytes,
}
