"""Runs ``januspipe bench uses``: counts how often a step would gather parameters that are released between uses."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from lightning_januspipe.bench.emulate.schedules import COSTS
from lightning_januspipe.schedule import build_schedule, simulate
from lightning_januspipe.schedule.actions import Schedule

_COLUMNS = (
    *("stages of a rank", "P", "micro-batches", "all parameters of a rank in use"),
    *("gathers of a stage", "gathers, if released between uses"),
)


def parameter_uses(ranks: str = "2,4", microbatches: str = "4,16") -> str:
    """Counts for steps of wavek-zb with parameters in shards how long and how often ranks use those of their stages.

    Stages are of equal size. A rank uses the parameters of a stage from its first phase to its last. All parameters of
    a rank are in use from when the last of its stages begins until the first of them ends: no release after the last
    use makes this peak lower. A release between uses frees the parameters of a stage while its rank computes another
    stage.

    Args:
        ranks: Numbers of ranks of the pipeline, with commas between them.
        microbatches: Numbers of micro-batches of a step, with commas between them.

    Returns:
        The table, with ranges over the ranks.
    """
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    for chunks in (1, 2):
        for num_ranks in map(int, ranks.split(",")):
            for num in map(int, microbatches.split(",")):
                schedule = build_schedule("wavek-zb", num_ranks, num, COSTS, chunks=chunks)
                uses = [count_uses(schedule, rank) for rank in range(num_ranks)]
                sizes = str(chunks), str(num_ranks), str(num)
                cells = *sizes, _range(shares_in_use(schedule), ".0%"), "1", _range(uses, ".0f")
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def shares_in_use(schedule: Schedule) -> list[float]:
    """Returns for each rank the share of the step in which it uses the parameters of all its stages."""
    report = simulate(schedule, COSTS)
    found = []
    for order in schedule.actions:
        of_stages = [[a for a in order if a.stage == stage] for stage in {a.stage for a in order}]
        begin = max(report.start[actions[0]] for actions in of_stages)
        end = min(report.end[actions[-1]] for actions in of_stages)
        found.append((end - begin) / report.makespan)
    return found


def count_uses(schedule: Schedule, rank: int) -> float:
    """Returns how often a rank begins to use a stage after another one, on average over its stages."""
    order = [action.stage for action in schedule.actions[rank]]
    return len(list(groupby(order))) / len(set(order))


def _range(values: Sequence[float], form: str) -> str:
    low, high = format(min(values), form), format(max(values), form)
    return low if low == high else f"{low} to {high}"
