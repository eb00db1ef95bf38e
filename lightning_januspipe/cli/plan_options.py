"""The options of ``januspipe plan``."""

from __future__ import annotations

import argparse
import difflib
import math
from pathlib import Path
from typing import Any, NoReturn

from lightning_januspipe.plan.export import FORMATS
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts
from lightning_januspipe.schedule.build import GENERATORS

_UNITS = {"": 1.0, "B": 1.0, **{f"{p}B": 1000.0**i for i, p in enumerate("kMGT", 1)}}
_UNITS |= {f"{p}iB": 1024.0**i for i, p in enumerate(("K", "M", "G", "T"), 1)} | {"KB": 1000.0}

DESCRIPTION = """\
Tells what each schedule would give, before anything is trained, and which one to take.

With a recipe, the model is captured in this one process and its phases are measured on a micro-batch of the data:

  januspipe plan --config recipes/quickstart.yaml --ranks 2 --num_microbatches 8 --output plan

Every argument of `januspipe fit` can be added (--data.batch_size 16, --model.potential.num_layers 8, ...). With
the phase times of one rank's share given, no model is needed:

  januspipe plan --costs 10,14,12,9,6,5 --ranks 8 --num_microbatches 16
"""


class _Parser(argparse.ArgumentParser):
    """Errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_bytes(text: str) -> float:
    """A number of bytes: ``40e9``, ``40GB`` (of 1000³ bytes) or ``40GiB`` (of 1024³).

    Raises:
        argparse.ArgumentTypeError: the text has another form.
    """
    text = text.strip()
    number = text.rstrip("BKMGTikbmgt").strip()
    unit = text[len(number) :].strip()
    known = {name.lower(): size for name, size in _UNITS.items()}
    try:
        value = float(number) * known[unit.lower()]
    except (KeyError, ValueError):
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of bytes; expected one like 40e9, 40GB or 40GiB")
    return value


def make_parser() -> argparse.ArgumentParser:
    """The options of ``januspipe plan``."""
    parser = _Parser(
        prog="januspipe plan",
        usage="januspipe plan (--config RECIPE [arguments of fit] | --costs FE,FF,BF,BE[,WF,WE]) [options]",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    size = parser.add_argument_group("what to plan")
    size.add_argument(
        "--ranks",
        type=_positive,
        metavar="P",
        help="ranks of the pipeline (default: those of the recipe); with --meshes of all three axes together",
    )
    size.add_argument(
        "--num_microbatches",
        type=_positive,
        metavar="M",
        help="micro-batches of a training step (default: those of the recipe, else twice the ranks)",
    )
    size.add_argument(
        "--schedules",
        type=_names,
        default=tuple(GENERATORS),
        metavar="A,B",
        help=f"schedules to compare: all (default), or some of {','.join(GENERATORS)}",
    )
    size.add_argument(
        "--wave_size",
        type=_positive_or_auto,
        metavar="K",
        help="micro-batches in a wave of wavek and wavek-zb, or auto",
    )
    size.add_argument("--max_live", type=_positive, metavar="L", help="most micro-batches that a rank may hold at once")
    size.add_argument(
        "--graph_sizes",
        type=_sizes,
        metavar="1,2,4",
        help="with a recipe: graph ranks among which its micro-batches are divided, to compare what each would have "
        "(default: 1 and the recipe's graph_size, if that is more; with --meshes 1,2,4)",
    )
    size.add_argument(
        "--meshes",
        action="store_true",
        help="with a recipe: compare all ways to share --ranks (default: all of the recipe's) between pipeline, "
        "replicas and graph ranks",
    )
    limits = parser.add_argument_group("the machine")
    limits.add_argument(
        "--memory_limit",
        type=parse_bytes,
        metavar="BYTES",
        help="what saved tensors of micro-batches may take on a rank: 40e9, 40GB or 40GiB",
    )
    limits.add_argument(
        "--latency",
        type=_number,
        metavar="SECONDS",
        help="what a message takes (default 0; with --meshes and between graph ranks 20e-6)",
    )
    limits.add_argument(
        "--bandwidth",
        type=_bandwidth,
        metavar="BYTES/S",
        help="of messages between two ranks, in each direction (default: no limit; with --meshes and between graph "
        "ranks 10GB)",
    )
    recipe = parser.add_argument_group("with a recipe")
    recipe.add_argument(
        "--repeats",
        type=_positive,
        metavar="R",
        help="measurements, of which medians are taken (default: at least 7, and as many as fit in 5 s)",
    )
    recipe.add_argument(
        "--extrapolate",
        action="store_true",
        help="where the potential has fewer cuttable parts than ranks: take its measured times as divided evenly",
    )
    given = parser.add_argument_group("without a model")
    given.add_argument(
        "--costs",
        type=_costs,
        metavar="FE,FF,BF,BE[,WF,WE]",
        help="milliseconds of one rank's share of a micro-batch; WF and WE, which can be deferred, are not counted in "
        "BF and BE",
    )
    given.add_argument(
        "--memory",
        type=_memory,
        metavar="ENERGY,FORCE,KEPT",
        help="bytes that a micro-batch holds on a rank from FE to BE, from FF to BF, and from BF to BE",
    )
    given.add_argument("--message_bytes", type=parse_bytes, metavar="BYTES", help="bytes of a message, for --bandwidth")
    output = parser.add_argument_group("output")
    output.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="write pictures, a trace for ui.perfetto.dev, plan.json and schedules",
    )
    output.add_argument("--format", choices=FORMATS, default="svg", help="of the pictures (default svg)")
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number >= 1")
    return int(text)


def _positive_or_auto(text: str) -> Any:
    return text if text == "auto" else _positive(text)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number >= 0")
    return value


def _bandwidth(text: str) -> float:
    value = parse_bytes(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a number of bytes per second > 0")
    return value


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == ("all",):
        return tuple(GENERATORS)
    for name in names or (text,):
        if name not in GENERATORS:
            close = difflib.get_close_matches(name, GENERATORS, n=1, cutoff=0.4)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise argparse.ArgumentTypeError(f"{name!r} is no schedule; expected all, or {', '.join(GENERATORS)}{hint}")
    return names


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(dict.fromkeys(_positive(part.strip()) for part in text.split(",")))


def _costs(text: str) -> PhaseCosts:
    try:
        values = [1e-3 * float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (4, 6) or min(values[:4]) <= 0 or min(values) < 0 or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected four or six times in ms, FE,FF,BF,BE[,WF,WE], of which the first four are > 0"
        )
    return PhaseCosts(*values)


def _memory(text: str) -> MemoryCosts:
    parts = text.split(",")
    if len(parts) != 3:
        raise argparse.ArgumentTypeError(
            f"{text!r}; expected three numbers of bytes, ENERGY,FORCE,KEPT: 30MB,20MB,10MB"
        )
    return MemoryCosts(*map(parse_bytes, parts))
