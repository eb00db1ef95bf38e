"""Compares the ways to share devices between pipeline, replicas and graph ranks, for ``januspipe plan --meshes``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import nn

from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.plan.compare import PlanOptions, SchedulePlan, best_plan, plan_cuts
from lightning_januspipe.plan.graph_share import GraphLink, GraphShare, costs_of_share
from lightning_januspipe.plan.measure import Measured, TooManyRanks
from lightning_januspipe.runtime.state_share import LEVELS, levels_of
from lightning_januspipe.schedule.state_actions import ShardLevel

# Predictions are off by some percent: a mesh with more exchanges, or more stages, has to gain more than that.
_LEAST_GAIN = 0.03


@dataclass(frozen=True)
class MeshRow:
    """Holds the prediction for one mesh.

    Attributes:
        shape: Sizes of pipeline × data × graph.
        plan: The plan of one of its replicas, with the level of sharing that training takes.
        levels: The same with each level that replicas and graph ranks can share state at, the simplest first.
        weights: Bytes of the parameters of the largest rank.
    """

    shape: MeshShape
    plan: SchedulePlan
    levels: tuple[SchedulePlan, ...]
    weights: int

    @property
    def fits(self) -> bool:
        """Tells whether a schedule keeps within the memory limit."""
        return self.plan.choice is not None

    @property
    def step_time(self) -> float | None:
        """Returns the seconds of a training step, without loading data and the optimizer; None where nothing fits."""
        chosen = self.plan.choice
        return None if chosen is None else chosen.step_time

    @property
    def after(self) -> float | None:
        """Returns the seconds at the end of the step that sum gradients or gather parameters; None if nothing fits."""
        return None if self.plan.choice is None else self.plan.choice.after

    @property
    def structures(self) -> float:
        """Returns the number of structures in a step, over all replicas."""
        return self.shape.data * self.plan.options.num_microbatches * (self.plan.structures or 1)

    @property
    def structures_per_second(self) -> float | None:
        """Returns the number of structures per second over all replicas; None where nothing fits."""
        return None if self.step_time is None else self.structures / self.step_time

    @property
    def memory(self) -> float | None:
        """Returns the most bytes that a rank holds for its micro-batches and its state.

        Where nothing fits, it is the least of any schedule.
        """
        chosen = self.plan.choice
        if chosen is not None:
            return None if chosen.peak_memory is None else chosen.peak_memory + self.plan.options.share.in_phases
        return min((row.needed for row in self.plan.rows if row.needed is not None), default=None)

    def arguments(self) -> str:
        """Returns the call that makes the strategy for this mesh."""
        chosen, options, shape = self.plan.choice, self.plan.options, self.shape
        assert chosen is not None
        limit = "" if options.memory_limit is None else f", memory_limit={options.memory_limit:g}"
        shard = "" if options.level == "none" else f', shard="{options.level}"'
        return (
            f"JanusPipeStrategy(pipeline_size={shape.pipeline}, data_size={shape.data}, graph_size={shape.graph}, "
            f'num_microbatches={options.num_microbatches}, schedule="{chosen.name}"{shard}{limit})'
        )

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers, for JSON."""
        chosen = self.plan.choice
        return {
            "pipeline_size": self.shape.pipeline,
            "data_size": self.shape.data,
            "graph_size": self.shape.graph,
            "schedule": None if chosen is None else chosen.name,
            "fits": self.fits,
            "step_time": self.step_time,
            "after": self.after,
            "shard": self.plan.options.level,
            "levels": [
                {
                    **asdict(plan.options.share),
                    "fits": plan.choice is not None,
                    "step_time": None if plan.choice is None else plan.choice.step_time,
                }
                for plan in self.levels
            ],
            "structures": self.structures,
            "structures_per_second": self.structures_per_second,
            "memory": self.memory,
            "weights": self.weights,
        }


@dataclass(frozen=True)
class Meshes:
    """Holds the predictions for all meshes.

    Attributes:
        rows: The meshes, the fastest first and those that do not fit last.
        left_out: Reasons why other meshes are missing.
    """

    rows: tuple[MeshRow, ...]
    left_out: tuple[str, ...] = ()

    @property
    def choice(self) -> MeshRow | None:
        """Returns the fastest mesh that fits; equally fast ones rank replicas before stages before graph ranks."""
        fitting = [row for row in self.rows if row.structures_per_second is not None]
        most = max((row.structures_per_second or 0.0 for row in fitting), default=0.0)
        fastest = [row for row in fitting if (row.structures_per_second or 0.0) >= most * (1 - _LEAST_GAIN)]
        return min(fastest, key=lambda row: (row.shape.graph, row.shape.pipeline), default=None)


def shapes(num_devices: int, graph_sizes: Sequence[int]) -> list[MeshShape]:
    """Returns all meshes of a number of devices.

    Args:
        num_devices: Number of devices, the product of the sizes of a mesh.
        graph_sizes: Numbers of graph ranks to try; a number that does not divide the devices is left out.
    """
    return [
        MeshShape(pipeline, num_devices // (graph * pipeline), graph)
        for graph in dict.fromkeys(graph_sizes)
        if num_devices % graph == 0
        for pipeline in range(1, num_devices // graph + 1)
        if (num_devices // graph) % pipeline == 0
    ]


def compare_meshes(
    num_devices: int,
    shares: Mapping[int, GraphShare],
    measure: Callable[[int], Measured],
    shares_of: Callable[[Measured, GraphShare], GraphShare],
    potential: nn.Module,
    options: PlanOptions,
    schedules: Sequence[str],
    link: GraphLink,
    *,
    structures: float,
    atoms: float | None,
    shard: ShardLevel | Literal["auto"] = "auto",
) -> Meshes:
    """Predicts the throughput of every mesh.

    Args:
        num_devices: Number of devices.
        shares: The share of a graph rank, by number of graph ranks.
        measure: Function that captures the potential in a number of stages; it may raise :class:`TooManyRanks`.
        shares_of: Function that gives the share of a graph rank in these stages.
        potential: The live potential.
        options: Micro-batches of each replica, and limits.
        schedules: Names of schedules.
        link: Cost of messages between any ranks.
        structures: Structures in a micro-batch.
        atoms: Atoms in a micro-batch.
        shard: What replicas and graph ranks share; "auto" chooses within a memory limit.
    """
    stages: dict[int, Measured] = {}
    left_out, rows = [], []
    too_many: int | None = None
    for shape in sorted(shapes(num_devices, list(shares)), key=lambda s: (s.pipeline, s.graph)):
        share = shares[shape.graph]
        if share.refused or (too_many is not None and shape.pipeline >= too_many):
            continue
        try:
            if shape.pipeline not in stages:
                stages[shape.pipeline] = measure(shape.pipeline)
        except TooManyRanks as error:
            too_many = shape.pipeline
            left_out.append(f"pipeline_size={shape.pipeline}: {error}")
            continue
        measured = stages[shape.pipeline]
        if shape.graph > 1:
            share = shares_of(measured, share)
        if share.refused:
            left_out.append(f"graph_size={shape.graph}: {share.refused}")
            continue
        weights, sharing = largest_weights(measured, potential), shape.data * shape.graph
        given = replace(options, num_ranks=shape.pipeline, num_sharing=sharing, parameters=weights)
        costs = [costs_of_share(measured, shape.pipeline, share, link)]
        plans = {
            level: plan_cuts(costs, replace(given, level=level), schedules, structures=structures, atoms=atoms)
            for level in (LEVELS if sharing > 1 else LEVELS[:1])
        }
        allowed = levels_of(shard, sharing, options.memory_limit is not None)
        plan = best_plan([plans[level] for level in allowed])
        rows.append(MeshRow(shape, plan, tuple(plans.values()), weights))
    rows.sort(key=lambda row: (-(row.structures_per_second or 0.0), row.memory or 0.0))
    return Meshes(tuple(rows), tuple(left_out))


def largest_weights(measured: Measured, potential: nn.Module) -> int:
    """Returns the bytes of the parameters of the stage that has most."""
    sizes = {name: p.nbytes for name, p in potential.named_parameters()}
    of_stage = [0] * measured.num_stages
    for name, stages in measured.potential.parameter_stages().items():
        for stage in stages:
            of_stage[stage] += sizes.get(name, 0)
    return max(of_stage)
