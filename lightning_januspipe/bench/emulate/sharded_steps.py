"""Runs ``januspipe bench shard``: steps that gather parameters and reduce gradients beside their phases."""

from __future__ import annotations

import re
import statistics

from lightning_januspipe.bench.emulate.emulated_mesh import device_pool, emulate_mesh, in_seconds, state_in_seconds
from lightning_januspipe.bench.emulate.mesh_rank import MicrobatchWork
from lightning_januspipe.bench.emulate.schedules import COSTS, suitable_unit
from lightning_januspipe.engine.timeline import recorded_report
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.schedule import StateCosts, build_schedule, simulate
from lightning_januspipe.schedule.build_schedule import ScheduleName
from lightning_januspipe.schedule.state_actions import ShardLevel, with_state_changes
from lightning_januspipe.testing import RankPool

_COLUMNS = (
    *("P, D, G", "simulated (s)", "emulated, median (s)", "range (s)", "difference"),
    *("reduction hidden, simulated", "reduction hidden, emulated", "nothing hidden, simulated (s)"),
)


def emulate_sharded(
    meshes: str = "4x4x1,2x4x2",
    microbatches: int = 8,
    schedule: ScheduleName = "wavek-zb",
    level: ShardLevel = "parameters",
    gather: float = 2.0,
    reduce: float = 2.0,
    repeats: int = 3,
    seconds_per_unit: float | None = None,
    pool: RankPool | None = None,
) -> str:
    """Runs steps with sharded state on emulated devices and compares them with the simulated ones.

    Args:
        meshes: Sizes P x D x G with commas between them, one process for each rank.
        microbatches: Micro-batches of a step of each replica.
        schedule: Name of the schedule.
        level: What the ranks that hold a stage share.
        gather: Time of the gathering of one rank's parameters, in the unit in which FE of a rank's share takes 1.
        reduce: Time of the reduction of one rank's gradients.
        repeats: Steps of each mesh.
        seconds_per_unit: Seconds in one unit; without it, so many that the runtime is small beside them.
        pool: The processes; None starts some for each mesh.

    Returns:
        The table. The last column is a step in which nothing runs beside the collectives.

    Raises:
        ValueError: An argument is not possible.
    """
    if level == "none":
        raise ValueError("level='none' shares nothing; expected 'optimizer' or 'parameters'")
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---" * len(_COLUMNS) + "|"]
    state = StateCosts(gather, reduce)
    for text in meshes.split(","):
        sizes = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text.strip())
        if sizes is None:
            raise ValueError(f"meshes has {text!r}; expected sizes like 4x4x1")
        shape = MeshShape(*map(int, sizes.groups()))
        phases = build_schedule(schedule, shape.pipeline, microbatches, COSTS)
        changed = with_state_changes(phases, level)
        unit = suitable_unit([phases], COSTS, shape) if seconds_per_unit is None else seconds_per_unit
        work = [[MicrobatchWork((1.0,) * shape.graph)] * microbatches] * shape.data
        own = pool or device_pool(shape.size)
        try:
            mesh = emulate_mesh(shape, changed, COSTS, [work] * repeats, seconds_per_unit=unit, pool=own, state=state)
        finally:
            if pool is None:
                own.close()
        seconds, of_stages = in_seconds(COSTS, unit), state_in_seconds(changed, state, unit)
        expected = simulate(changed, seconds, comm=mesh.latency, state=of_stages)
        beside_nothing = reduce + (gather if level == "parameters" else 0.0)
        at_the_end = simulate(phases, seconds, comm=mesh.latency).makespan + unit * beside_nothing
        makespans = [step.makespan for step in mesh.steps]
        hidden = [
            recorded_report(changed, {p: step.actions[shape.rank(p, d, g)] for p in range(shape.pipeline)})
            for step in mesh.steps
            for d in range(shape.data)
            for g in range(shape.graph)
        ]
        shares = [report.hidden_reduction or 0.0 for report in hidden]
        median = statistics.median_low(makespans)
        cells = (
            f"{shape.pipeline}, {shape.data}, {shape.graph}",
            f"{expected.makespan:.3f}",
            f"{median:.3f}",
            f"{min(makespans):.3f} to {max(makespans):.3f}",
            f"{median / expected.makespan - 1:+.1%}",
            f"{expected.hidden_reduction or 0.0:.0%}",
            f"{statistics.mean(shares):.0%}",
            f"{at_the_end:.3f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
