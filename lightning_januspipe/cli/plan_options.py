"""Defines the options of ``januspipe plan``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeFloat, PositiveInt, register_type

from lightning_januspipe.plan.graph_share import GraphLink
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts
from lightning_januspipe.schedule.build_schedule import GENERATORS
from lightning_januspipe.schedule.request import Auto

_UNITS = {"": 1.0, "b": 1.0, **{f"{p}b": 1000.0**i for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}ib": 1024.0**i for i, p in enumerate("kmgt", 1)}


class ScheduleNames(tuple[str, ...]):
    """Reads names of schedules, written with commas between them."""


_ALL = ScheduleNames(GENERATORS)


class GraphSizes(tuple[int, ...]):
    """Reads numbers of graph ranks, written with commas between them."""


class ByteSize(float):
    """Reads a number of bytes: ``40e9``, ``40GB`` (of 1000³ bytes) or ``40GiB`` (of 1024³)."""


@dataclass(frozen=True)
class PlanArguments:
    """The plan has these options.

    Attributes:
        ranks: Ranks of the pipeline; of all devices with --meshes. Default: as in the recipe.
        num_microbatches: Micro-batches of a training step. Default: as in the recipe, or twice the ranks.
        schedules: Schedules to compare, with commas between them, or all.
        wave_size: Micro-batches in a wave of wavek and wavek-zb, or auto.
        max_live: Most micro-batches that a rank may hold at once.
        memory_limit: Bytes that saved tensors of micro-batches may take on a rank: 40e9, 40GB or 40GiB.
        latency: Seconds of a message. Default: 0; 20e-6 with --meshes and between graph ranks.
        bandwidth: Bytes per second between two ranks, in each direction. Default: no limit; 10GB with --meshes and
            between graph ranks.
        graph_sizes: With a recipe: numbers of graph ranks to compare, such as 1,2,4, which share the atoms of its
            micro-batches. Default: 1 and the recipe's graph_size; 1,2,4 with --meshes.
        repeats: With a recipe: measurements of each phase, of which medians are taken. Default: 7 or more, for 5 s.
        costs: Without a model: milliseconds of one rank's share of a micro-batch, as FE,FF,BF,BE[,WF,WE]. WF and WE
            can be deferred, and are not counted in BF and BE.
        memory: Without a model: bytes that a micro-batch holds on a rank from FE to BE, from FF to BF, and from BF to
            BE, as ENERGY,FORCE,KEPT.
        message_bytes: Without a model: bytes of a message, for --bandwidth.
        output: Folder for pictures, a trace, plan.json and schedules.
        format: Format of the pictures.
        meshes: With a recipe: compare all ways to share the devices between pipeline, replicas and graph ranks.
        extrapolate: With a recipe: share the times of a potential evenly over the ranks where it has fewer cuttable
            parts.

    Raises:
        ValueError: Options contradict each other.
    """

    ranks: PositiveInt | None = None
    num_microbatches: PositiveInt | None = None
    schedules: ScheduleNames = _ALL
    wave_size: PositiveInt | Auto | None = None
    max_live: PositiveInt | None = None
    memory_limit: ByteSize | None = None
    latency: NonNegativeFloat | None = None
    bandwidth: ByteSize | None = None
    graph_sizes: GraphSizes | None = None
    repeats: PositiveInt | None = None
    costs: PhaseCosts | None = None
    memory: MemoryCosts | None = None
    message_bytes: ByteSize | None = None
    output: Path | None = None
    format: Literal["svg", "png"] = "svg"
    meshes: bool = False
    extrapolate: bool = False

    def __post_init__(self) -> None:
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError("--bandwidth is 0; expected a number of bytes per second > 0")
        with_costs = self.costs is not None
        for name in ("extrapolate", "graph_sizes", "meshes", "repeats") if with_costs else ("memory", "message_bytes"):
            if getattr(self, name):
                is_for = "a recipe" if with_costs else "--costs: with a recipe it is measured"
                raise ValueError(f"--{name} is for {is_for}")
        if self.meshes and self.extrapolate:
            raise ValueError("--extrapolate is for one pipeline, and --meshes compares several: leave out one of them")
        if with_costs and self.ranks is None:
            raise ValueError("--costs needs --ranks too, the number of ranks")
        if with_costs and self.memory_limit is not None and self.memory is None:
            raise ValueError(
                "--memory_limit with --costs needs --memory ENERGY,FORCE,KEPT too, what a micro-batch holds"
            )
        if with_costs and self.bandwidth is not None and self.message_bytes is None:
            raise ValueError("--bandwidth with --costs needs --message_bytes BYTES too, the size of a message")

    @classmethod
    def read(cls, given: Any) -> PlanArguments:
        """Returns the options in a parsed configuration."""
        return cls(**{field.name: given[field.name] for field in fields(cls)})

    @property
    def link(self) -> GraphLink:
        """Returns what messages between ranks cost, as given or as usual."""
        usual = GraphLink()
        return GraphLink(
            usual.latency if self.latency is None else self.latency,
            usual.bandwidth if self.bandwidth is None else self.bandwidth,
        )


def add_plan_options(parser: ArgumentParser) -> None:
    """Adds the options of ``januspipe plan`` to a parser."""
    flags = {
        "meshes": "With a recipe: compare all ways to share the devices between pipeline, replicas and graph ranks.",
        "extrapolate": "With a recipe: share the times of a potential evenly over the ranks where it has fewer "
        "cuttable parts.",
    }
    parser.add_class_arguments(PlanArguments, skip=set(flags))
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)


def parse_bytes(text: str) -> ByteSize:
    """Reads a number of bytes.

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
    return ByteSize(value)


def _parts(given: str | int | Sequence[str | int]) -> list[str]:
    """Returns what stands between commas; jsonargparse hands in values that it has read before as plain tuples."""
    parts = str(given).split(",") if isinstance(given, (str, int)) else map(str, given)
    return [part.strip() for part in parts if part.strip()]


def _schedules(text: str | Sequence[str]) -> ScheduleNames:
    names = tuple(_parts(text))
    if names == ("all",):
        return _ALL
    for name in names or (str(text),):
        if name not in GENERATORS:
            close = difflib.get_close_matches(name, GENERATORS, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{name!r} is no schedule; expected all, or {', '.join(GENERATORS)}{hint}")
    return ScheduleNames(names)


def _graph_sizes(text: str | int | Sequence[int]) -> GraphSizes:
    parts = _parts(text)
    if not parts or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"{text!r}; expected whole numbers >= 1 with commas between them")
    return GraphSizes(dict.fromkeys(map(int, parts)))


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


for _type, _read in {
    ScheduleNames: _schedules,
    GraphSizes: _graph_sizes,
    ByteSize: parse_bytes,
    PhaseCosts: _costs,
    MemoryCosts: _memory,
}.items():
    register_type(_type, str, _read)
