"""Runs ``januspipe plan``, which predicts a step with each schedule, and chooses one."""

from __future__ import annotations

import math
from argparse import RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_januspipe.callbacks import count_atoms, count_structures
from lightning_januspipe.cli.parsers import CommandParser
from lightning_januspipe.cli.plan_options import PlanArguments, add_plan_options
from lightning_januspipe.cli.plan_tables import (
    ACTIVATION_LEGEND,
    GRAPH_LEGEND,
    MESH_LEGEND,
    MESH_STATE_LEGEND,
    STAGE_LEGEND,
    STATE_LEGEND,
    activation_table,
    cut_lines,
    graph_table,
    level_lines,
    make_console,
    mesh_state_table,
    mesh_table,
    notes,
    refusals,
    schedule_legend,
    schedule_table,
    stage_table,
    state_table,
)
from lightning_januspipe.plan.compare import PlanOptions, SchedulePlan, best_plan, plan_costs, plan_cuts
from lightning_januspipe.plan.graph_share import MOST_MICROBATCHES, GraphLink, GraphShare, costs_of_share
from lightning_januspipe.plan.measure import Measured, TooManyRanks
from lightning_januspipe.plan.meshes import compare_meshes, largest_weights
from lightning_januspipe.plan.write_plan import write_plan
from lightning_januspipe.runtime.planner import placements
from lightning_januspipe.schedule.costs import format_bytes

if TYPE_CHECKING:
    from lightning_januspipe.cli.recipe import Recipe

_LARGE_SPREAD = 0.25  # of the middle half of the times, over their median: it is told
_GRAPH_SIZES = (1, 2, 4)
_PHASES = ("fe", "ff", "bf", "be", "wf", "we")

_DESCRIPTION = """\
Tells what each schedule would give, before anything is trained, and which one to take.

With a recipe, the model is captured in this one process and its phases are measured on a micro-batch of the data:

  januspipe plan --config recipes/quickstart.yaml --ranks 2 --num_microbatches 8 --output plan

Every argument of `januspipe fit` can be added (--data.batch_size 16, --model.potential.num_layers 8, ...). With the
phase times of one rank's share, no model is needed:

  januspipe plan --costs 10,14,12,9,6,5 --ranks 8 --num_microbatches 16
"""


def main(args: Sequence[str]) -> None:
    """Runs ``januspipe plan``.

    Args:
        args: The command line after ``plan``.
    """
    parser = CommandParser(
        "januspipe plan",
        _DESCRIPTION,
        usage="januspipe plan (--config RECIPE [arguments of fit] | --costs FE,FF,BF,BE[,WF,WE]) [options]",
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=str, metavar="RECIPE", help="A recipe, as of januspipe fit.")
    add_plan_options(parser)
    try:
        if args and not {"--costs", "-h", "--help"} & {arg.partition("=")[0] for arg in args}:
            from lightning_januspipe.cli.recipe import Recipe

            recipe = Recipe(args)
            _plan_meshes(recipe) if recipe.plan_arguments.meshes else _plan_recipe(recipe)
            return
        given = parser.parse_args(args)
        if given.costs is None:
            raise ValueError(
                "expected a recipe (--config recipes/quickstart.yaml) or phase times (--costs FE,FF,BF,BE[,WF,WE])"
            )
        if given.config is not None:
            raise ValueError("--costs needs no model, but --config was given too: leave out one of them")
        _plan_costs(PlanArguments.read(given))
    except ValueError as error:
        if not _is_own(error):
            raise
        parser.error(str(error))


def _is_own(error: BaseException) -> bool:
    """Tells whether an error is a message of this package to its user; others keep their traceback."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    package = Path(__file__).resolve().parents[1]
    return trace is not None and package in Path(trace.tb_frame.f_code.co_filename).resolve().parents


def _plan_costs(given: PlanArguments) -> None:
    """Prints the plan for given times."""
    costs, num_ranks = given.costs, given.ranks
    assert costs is not None and num_ranks is not None
    plan = plan_costs(
        costs,
        num_ranks,
        given.num_microbatches or 2 * num_ranks,
        schedules=given.schedules,
        memory=given.memory,
        memory_limit=given.memory_limit,
        wave_size=given.wave_size or "auto",
        max_live=given.max_live,
        latency=given.latency or 0.0,
        bandwidth=given.bandwidth or math.inf,
        message_bytes=given.message_bytes or 0.0,
    )
    times = ", ".join(f"{name.upper()} {1e3 * getattr(costs, name):g}" for name in _PHASES)
    console = make_console()
    _answer(plan.reason())
    console.print(f"One rank's share of a micro-batch, in ms: {times}; {1e3 * costs.total:g} in all.", soft_wrap=True)
    about = {"source": "costs", "seconds": {name: getattr(costs, name) for name in _PHASES}}
    _show(plan, given, about, [])


def _plan_recipe(recipe: Recipe) -> None:
    """Prints the plan of a model for one pipeline."""
    given, asked, link = recipe.plan_arguments, recipe.asked, recipe.plan_arguments.link
    num_ranks = given.ranks or asked.num_ranks
    num_microbatches = given.num_microbatches or asked.num_microbatches or 2 * num_ranks
    examples = recipe.examples(num_microbatches)
    shown, allowed = asked.activations((given.memory_limit or asked.memory_limit) is not None, recipe.device.type)
    measured = _measured_cuts(recipe, examples, num_ranks, shown)
    graph_sizes = given.graph_sizes or ((1, asked.graph_size) if asked.graph_size > 1 else ())
    batches = recipe.microbatches(num_microbatches, MOST_MICROBATCHES) if graph_sizes else []
    shares = _shares(recipe, measured[0], batches, graph_sizes) if graph_sizes else {}
    used = shares.get(asked.graph_size)
    if used is not None and (used.num_ranks == 1 or used.refused):
        used = None
    if used is None:
        cuts = [choice for one in measured for choice in one.choices(num_ranks, allowed)]
    else:
        own = [used, *(recipe.share(recipe.sharing(one, batches), used.num_ranks, used) for one in measured[1:])]
        cuts = [costs_of_share(one, num_ranks, share, link) for one, share in zip(measured, own, strict=True)]
    structures, atoms = count_structures(examples[1]), count_atoms(examples[1])
    options = _options(recipe, num_ranks, num_microbatches, given.latency or 0.0, given.bandwidth or math.inf)
    parameters = largest_weights(measured[0], recipe.potential(measured[0]))
    shared = replace(options, num_sharing=asked.num_sharing, parameters=parameters)
    uncertainty = max(one.uncertainty for one in measured)
    plans = [
        replace(
            plan_cuts(cuts, replace(shared, level=level), given.schedules, structures=structures, atoms=atoms or None),
            uncertainty=uncertainty,
        )
        for level in asked.levels(options.memory_limit is not None)
    ]
    plan = best_plan(plans)
    _answer(plan.reason())
    _describe(recipe, measured, structures, atoms, num_microbatches)
    _show_stages(measured, bool(shown))
    console = make_console()
    console.print()
    console.print(state_table(parameters, asked.accumulates))
    console.print(STATE_LEGEND)
    for line in level_lines(plans, plan):
        console.print(line, soft_wrap=True)
    is_extrapolated = measured[0].num_stages < num_ranks
    if is_extrapolated:
        console.print(
            f"\nASSUMPTION (--extrapolate): this potential has {_count(measured[0].num_stages, 'cuttable part')}, "
            f"fewer than {num_ranks} ranks. What follows shares its times and memory evenly over {num_ranks} ranks, "
            "with boundaries as above: a deeper model of as much work. This model itself cannot run so.",
        )
    _show_shares(shares, measured[0])
    if used is not None:
        console.print(
            f"\nIn what follows, micro-batches are sharded over {used.num_ranks} graph ranks: {num_ranks} ranks of the "
            f"pipeline are {num_ranks * used.num_ranks}. {_assumed(link)}",
            soft_wrap=True,
        )
    about = _about(recipe, measured, shares, 1 if used is None else used.num_ranks)
    _show(plan, given, about | {"extrapolated": is_extrapolated}, measured)


def _show_stages(measured: Sequence[Measured], has_activations: bool) -> None:
    """Prints what the stages of each cut take, what they send, and what they keep with each activation."""
    console = make_console()
    for one in measured:
        console.print()
        console.print(stage_table(one))
        for line in cut_lines(one):
            console.print(line, soft_wrap=True)
    console.print()
    console.print(STAGE_LEGEND)
    if has_activations:
        for one in measured:
            console.print()
            console.print(activation_table(one))
        console.print(ACTIVATION_LEGEND, soft_wrap=True)


def _measured_cuts(
    recipe: Recipe, examples: tuple[Any, Any], num_ranks: int, activations: Sequence[str]
) -> list[Measured]:
    """Returns the potential in all numbers of stages that the schedules need, one stage on each rank first."""
    given = recipe.plan_arguments
    wanted = dict.fromkeys((tuple(range(num_ranks)), *(p for s in given.schedules for p in placements(s, num_ranks))))
    measured: list[Measured] = []
    for placement in wanted:
        or_fewer = given.extrapolate and not measured
        try:
            measured.append(recipe.measure(examples, placement, or_fewer=or_fewer, activations=activations))
        except TooManyRanks as error:
            if not measured:
                fewer = f"give --ranks {error.most}" if error.most > 1 else "take a deeper model"
                raise ValueError(f"{error}: {fewer}, or --extrapolate to share its times evenly all the same") from None
        if measured[0].num_stages < num_ranks:
            break
    return measured


def _plan_meshes(recipe: Recipe) -> None:
    """Prints the plan of a model for every way to share the devices."""
    given, asked, link = recipe.plan_arguments, recipe.asked, recipe.plan_arguments.link
    num_ranks = given.ranks or asked.num_processes
    num_microbatches = given.num_microbatches or asked.num_microbatches or 2 * num_ranks
    examples = recipe.examples(num_microbatches)
    batches = recipe.microbatches(num_microbatches, MOST_MICROBATCHES)
    measured: dict[int, Measured] = {}

    def measure(num_stages: int) -> Measured:
        if num_stages not in measured:
            measured[num_stages] = recipe.measure(examples, range(num_stages))
        return measured[num_stages]

    whole = measure(1)
    wanted = [size for size in given.graph_sizes or _GRAPH_SIZES if num_ranks % size == 0]
    shares = _shares(recipe, whole, batches, wanted or [1])
    structures, atoms = count_structures(examples[1]), count_atoms(examples[1])
    meshes = compare_meshes(
        num_ranks,
        shares,
        measure,
        lambda one, share: recipe.share(recipe.sharing(one, batches), share.num_ranks, share),
        recipe.potential(whole),
        _options(recipe, num_ranks, num_microbatches, link.latency, link.bandwidth),
        given.schedules,
        link,
        structures=structures,
        atoms=atoms or None,
        shard=asked.shard,
    )
    console, best = make_console(), meshes.choice
    if best is not None:
        _answer(best.arguments())
    elif meshes.rows:
        least = min((row.memory for row in meshes.rows if row.memory is not None), default=0.0)
        _answer(f"No mesh fits: the least that a rank needs is {format_bytes(least)}.")
    _describe(recipe, list(measured.values()), structures, atoms, num_microbatches)
    _show_shares(shares, whole)
    console.print()
    for line in meshes.left_out:
        console.print(f"! {line}", soft_wrap=True)
    if not meshes.rows:
        raise ValueError(f"{num_ranks} ranks cannot be shared: see above; give other --graph_sizes, or other --ranks")
    console.print(mesh_table(meshes))
    console.print(MESH_LEGEND)
    console.print()
    console.print(mesh_state_table(meshes))
    console.print(MESH_STATE_LEGEND)
    console.print(_assumed(link))
    if best is None:
        return
    about = _about(recipe, list(measured.values()), shares, best.shape.graph)
    about["meshes"] = [row.to_dict() for row in meshes.rows]
    _write(best.plan, given, about, [measured[best.shape.pipeline]])


def _shares(
    recipe: Recipe, measured: Measured, batches: Sequence[Any], graph_sizes: Sequence[int]
) -> dict[int, GraphShare]:
    """Returns the share of a graph rank by the number of graph ranks, one first."""
    sharing = recipe.sharing(measured, batches)
    return {size: recipe.share(sharing, size) for size in sorted({1, *graph_sizes})}


def _show_shares(shares: Mapping[int, GraphShare], measured: Measured) -> None:
    """Prints the table of graph ranks."""
    if not shares:
        return
    console, rows = make_console(), list(shares.values())
    console.print()
    console.print(graph_table(rows, measured))
    for line in refusals(rows):
        console.print(line, soft_wrap=True)
    console.print(GRAPH_LEGEND)


def _assumed(link: GraphLink) -> str:
    rate = f"{format_bytes(link.bandwidth)}/s" if math.isfinite(link.bandwidth) else "any number of bytes per second"
    return f"Exchanges: {1e6 * link.latency:g} µs each, {rate} (--latency, --bandwidth)."


def _options(recipe: Recipe, num_ranks: int, num_microbatches: int, latency: float, bandwidth: float) -> PlanOptions:
    """Returns the options that all schedules share."""
    given, asked = recipe.plan_arguments, recipe.asked
    limit = given.memory_limit if given.memory_limit is not None else asked.memory_limit
    wave_size = given.wave_size or asked.wave_size
    options = PlanOptions(num_ranks, num_microbatches, wave_size, given.max_live, limit, latency, bandwidth)
    return replace(options, accumulates=asked.accumulates)


def _about(
    recipe: Recipe, measured: Sequence[Measured], shares: Mapping[int, GraphShare], graph_size: int
) -> dict[str, Any]:
    """Returns what ``plan.json`` says of the model and the measurement."""
    return {
        "source": recipe.module_name,
        "potential": measured[0].potential.path,
        "device": str(recipe.device),
        "precision": recipe.precision,
        "num_threads": torch.get_num_threads(),
        "repeats": min(one.repeats for one in measured),
        "spread": max(one.spread for one in measured),
        "graph_size": graph_size,
        "graph": [share.to_dict() for share in shares.values()],
    }


def _describe(recipe: Recipe, measured: Sequence[Measured], structures: int, atoms: int, num_microbatches: int) -> None:
    """Prints which potential was measured, and how."""
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
    console.print("Stages are cut by these times. `fit` measures anew when it starts, and may cut elsewhere.")
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


def _answer(text: str) -> None:
    """Prints the answer, before the tables that it comes from."""
    make_console().print(f"→ {text}\n", soft_wrap=True)


def _show(plan: SchedulePlan, given: PlanArguments, about: dict[str, Any], measured: Sequence[Measured]) -> None:
    """Prints the table of schedules, and writes the files."""
    console = make_console()
    if plan.rows:
        console.print()
        console.print(schedule_table(plan))
        console.print(schedule_legend(plan))
    for line in notes(plan):
        console.print(line, soft_wrap=True)
    _write(plan, given, about, measured)


def _write(plan: SchedulePlan, given: PlanArguments, about: dict[str, Any], measured: Sequence[Measured]) -> None:
    """Writes the files, where an output folder is given."""
    console = make_console()
    if given.output is not None and plan.rows:
        console.print("\nWritten:")
        for path in write_plan(plan, given.output, given.format, about, measured):
            console.print(f"  {path}", soft_wrap=True)
