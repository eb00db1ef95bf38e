"""``januspipe plan``: what each schedule would give, and which one to take."""

from __future__ import annotations

import argparse
import difflib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lightning_januspipe.plan.files import write_plan
from lightning_januspipe.plan.measure import Measured, TooManyRanks
from lightning_januspipe.plan.options import make_parser
from lightning_januspipe.plan.rows import Options, Plan, plan_costs, plan_stages
from lightning_januspipe.plan.tables import (
    STAGE_LEGEND,
    cut_lines,
    make_console,
    notes,
    schedule_legend,
    schedule_table,
    stage_table,
)
from lightning_januspipe.planning import placements
from lightning_januspipe.schedule import PhaseCosts

_LARGE_SPREAD = 0.25
# First parts of the names of fit's options; jsonargparse judges the rest.
_OF_FIT = ("config", "c", "seed_everything", "trainer", "model", "data", "optimizer", "lr_scheduler", "ckpt_path")


def main(args: Sequence[str]) -> None:
    """Run ``januspipe plan``.

    Args:
        args: command line after ``plan``.
    """
    parser = make_parser()
    given, fit = parser.parse_known_args(list(args))
    try:
        _refuse_unknown(parser, fit)
        if given.costs is None and not fit:
            raise ValueError(
                "expected a recipe (--config recipes/quickstart.yaml) or phase times (--costs FE,FF,BF,BE[,WF,WE])"
            )
        if given.costs is None:
            _plan_recipe(given, fit)
        else:
            _plan_costs(given, fit)
    except ValueError as error:
        if not _is_own(error):
            raise
        parser.error(str(error))


def _refuse_unknown(parser: argparse.ArgumentParser, fit: Sequence[str]) -> None:
    """Refuse what neither ``plan`` nor ``fit`` has, before a model is made."""
    if fit and not fit[0].startswith("-"):
        raise ValueError(f"got {fit[0]!r}, expected an option: --config {fit[0]} for a recipe, or --costs {fit[0]}")
    own = [option for action in parser._actions for option in action.option_strings]
    for option in (arg.partition("=")[0] for arg in fit if arg.startswith("--")):
        if option.lstrip("-").partition(".")[0].removesuffix("+") not in _OF_FIT:
            close = difflib.get_close_matches(option, [*own, "--config"], n=1)
            hint = f"did you mean {close[0]}?" if close else "see januspipe plan --help"
            raise ValueError(f"unknown option {option}: {hint}")


def _is_own(error: BaseException) -> bool:
    """Whether an error is a message of this package to its user; others keep their traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = Path(__file__).resolve().parents[1]
    return trace is not None and package in Path(trace.tb_frame.f_code.co_filename).resolve().parents


def _plan_costs(given: argparse.Namespace, fit: Sequence[str]) -> None:
    """The form with given times."""
    if fit:
        raise ValueError(f"--costs needs no model, but {fit[0]} was given too: leave out one of them")
    if given.ranks is None:
        raise ValueError("--costs needs --ranks too, the number of ranks")
    if given.extrapolate:
        raise ValueError("--extrapolate is for a recipe: --costs are those of one rank's share already")
    if given.memory_limit is not None and given.memory is None:
        raise ValueError("--memory_limit with --costs needs --memory ENERGY,FORCE,KEPT too, what a micro-batch holds")
    if math.isfinite(given.bandwidth) and given.message_bytes is None:
        raise ValueError("--bandwidth with --costs needs --message_bytes BYTES too, the size of a message")
    plan = plan_costs(
        given.costs,
        given.ranks,
        given.num_microbatches or 2 * given.ranks,
        schedules=given.schedules,
        memory=given.memory,
        memory_limit=given.memory_limit,
        wave_size=given.wave_size or "auto",
        max_live=given.max_live,
        latency=given.latency,
        bandwidth=given.bandwidth,
        message_bytes=given.message_bytes or 0.0,
    )
    costs: PhaseCosts = given.costs
    names = ("fe", "ff", "bf", "be", "wf", "we")
    times = ", ".join(f"{name.upper()} {1e3 * getattr(costs, name):g}" for name in names)
    console = make_console()
    console.print(f"One rank's share of a micro-batch, in ms: {times}; {1e3 * costs.total:g} in all.", soft_wrap=True)
    about = {"source": "costs", "seconds": {name: getattr(costs, name) for name in names}}
    _show(plan, given, about, [])


def _plan_recipe(given: argparse.Namespace, fit: Sequence[str]) -> None:
    """The form with a model."""
    from lightning_januspipe.plan.recipe import Recipe, sizes

    for option, value in (("--memory", given.memory), ("--message_bytes", given.message_bytes)):
        if value is not None:
            raise ValueError(f"{option} is for --costs: with a recipe it is measured")
    recipe = Recipe(fit)
    asked = recipe.asked
    num_ranks = given.ranks or asked.num_ranks
    num_microbatches = given.num_microbatches or asked.num_microbatches or 2 * num_ranks
    examples = recipe.examples(num_microbatches)
    structures, atoms = sizes(examples[1])
    wanted = dict.fromkeys((tuple(range(num_ranks)), *(p for s in given.schedules for p in placements(s, num_ranks))))
    measured: list[Measured] = []
    for placement in wanted:
        try:
            or_fewer = given.extrapolate and not measured
            measured.append(
                recipe.measure(examples, placement, asked.potential, or_fewer=or_fewer, repeats=given.repeats)
            )
        except TooManyRanks as error:
            if not measured:
                fewer = f"give --ranks {error.most}" if error.most > 1 else "take a deeper model"
                raise ValueError(
                    f"{error}: {fewer}, or --extrapolate to divide its times evenly all the same"
                ) from None
        if measured[0].num_stages < num_ranks:
            break
    options = Options(
        num_ranks,
        num_microbatches,
        given.wave_size or asked.wave_size,
        given.max_live,
        given.memory_limit if given.memory_limit is not None else asked.memory_limit,
        given.latency,
        given.bandwidth,
    )
    plan = plan_stages(
        [one.stages(num_ranks) for one in measured],
        options,
        given.schedules,
        structures=structures,
        atoms=atoms or None,
    )
    _describe(recipe, measured, structures, atoms, num_microbatches)
    extrapolated = measured[0].num_stages < num_ranks
    about = {
        "source": recipe.module_name,
        "potential": measured[0].potential.path,
        "device": str(recipe.device),
        "precision": recipe.precision,
        "num_threads": torch.get_num_threads(),
        "repeats": min(one.repeats for one in measured),
        "spread": max(one.spread for one in measured),
        "extrapolated": extrapolated,
    }
    console = make_console()
    for one in measured:
        console.print()
        console.print(stage_table(one, num_ranks))
        for line in cut_lines(one):
            console.print(line, soft_wrap=True)
    console.print()
    console.print(STAGE_LEGEND)
    if extrapolated:
        console.print(
            f"\nASSUMPTION (--extrapolate): this potential has {_count(measured[0].num_stages, 'cuttable part')}, "
            f"fewer than {num_ranks} ranks. What follows divides its times and memory evenly over {num_ranks} ranks, "
            "with boundaries as above: a deeper model of as much work. This model itself cannot run so.",
        )
    _show(plan, given, about, measured)


def _describe(recipe: Any, measured: Sequence[Measured], structures: int, atoms: int, num_microbatches: int) -> None:
    """What was measured, and how well."""
    console, first = make_console(), measured[0]
    num_operations = sum(first.potential.num_operations)
    threads, on_cpu = torch.get_num_threads(), recipe.device.type == "cpu"
    console.print(
        f"Potential {first.potential.path!r} of {recipe.module_name}, {num_operations} operations, "
        f"captured in {sum(one.elapsed for one in measured):.1f} s.\n"
        f"Measured on a micro-batch of {_count(structures, 'structure')}"
        + (f" with {_count(atoms, 'atom')}" if atoms else "")
        + f", {recipe.precision} on {recipe.device}"
        + (f" with {_count(threads, 'thread')}" if on_cpu else "")
        + f"; medians of {min(one.repeats for one in measured)} runs.",
        soft_wrap=True,
    )
    spread = max(one.spread for one in measured)
    if spread > _LARGE_SPREAD:
        console.print(
            f"Note: half of the runs lie {100 * spread:.0f} % apart, so times are uncertain: this machine is busy. "
            "More --repeats help.",
            soft_wrap=True,
        )
    if recipe.batch_size is not None and recipe.batch_size < num_microbatches:
        console.print(
            f"Note: batches have {recipe.batch_size} samples, so that training would have {recipe.batch_size} "
            f"micro-batches instead of {num_microbatches}. Raise the batch size.",
            soft_wrap=True,
        )
    if on_cpu and threads > 1:
        console.print(
            f"Note: times are with {threads} threads; set OMP_NUM_THREADS to the threads that each rank will have.",
            soft_wrap=True,
        )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _show(plan: Plan, given: argparse.Namespace, about: dict[str, Any], measured: Sequence[Measured]) -> None:
    """The table of schedules, the choice, and the files."""
    console = make_console()
    if plan.rows:
        console.print()
        console.print(schedule_table(plan))
        console.print(schedule_legend(plan))
    for line in notes(plan):
        console.print(line, soft_wrap=True)
    console.print(f"\n→ {plan.reason()}", soft_wrap=True)
    if given.output is not None and plan.rows:
        console.print("\nWritten:")
        for path in write_plan(plan, given.output, given.format, about, measured):
            console.print(f"  {path}", soft_wrap=True)
