"""Graph ranks that run phase graphs of which one keeps something wrong: run with ``RankPool.run``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial

import graph_models as models
import torch
import torch.distributed as dist
from capture_models import OTHER, TRACED, Batch, Potential, Step, Traced, eager_gradients, make_batch
from compiled_models import factory, graphs_of, kept_values_of, with_zeros
from torch import Tensor

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.compiled.minimum_cut import Activation
from lightning_januspipe.compiled.phase_graphs import PhaseGraphs, phase_graphs
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.single_process import run_single_process
from lightning_januspipe.engine.specs import LossGradients
from lightning_januspipe.graph import GraphAxis, GraphGroup
from lightning_januspipe.runtime.user_step import CapturedStep

BATCH = models.angles_of(make_batch((2, 5, 3), seed=1))


class ReadsAll(Step):
    """Has a loss of all that the potential returns: what is kept for an output that nothing reads does not matter."""

    def loss(self, out: dict[str, Tensor], batch: Batch) -> Tensor:
        return super().loss(out, batch) + out["charges"].square().mean()


def zeros_that_are_not_found(
    kind: type[Potential], num_stages: int, activation: Activation, defer: bool
) -> tuple[int, list[str]]:
    """Replaces each value that a phase keeps by zeros, on all graph ranks, one value after the other.

    Args:
        kind: The potential.
        num_stages: Its stages, of one layer each.
        activation: What phases keep.
        defer: Leave what only parameters wait for to WF and WE.

    Returns:
        How many values are kept, and the names of those whose loss leaves parameter gradients right to 1e-9.
    """
    dist.init_process_group("gloo")
    group = dist.new_group(timeout=timedelta(seconds=60))
    traced = Traced(ReadsAll(kind(num_layers=num_stages)), models.angles_of(make_batch(TRACED)))
    captured = traced.cut(num_stages)
    axis = GraphAxis(captured, traced.potential, GraphGroup(dist.get_world_size(), dist.get_rank(), group))
    examples = [models.angles_of(make_batch(sizes)) for sizes in (TRACED, OTHER)]
    graphs = [phase_graphs(j, activation, defer) for j in graphs_of(traced, captured, axis.potential, examples)]
    _, expected = eager_gradients(traced.module, BATCH)
    error = partial(_error, expected, partial(_gradients, traced, captured, axis, defer))
    assert error(graphs) <= 1e-9, "the phases are wrong as they are"
    kept, missed = kept_values_of(graphs), []
    for stage, phase, name in kept:
        broken = list(graphs)
        broken[stage] = with_zeros(graphs[stage], phase, name)
        if error(broken) <= 1e-9:
            missed.append(f"{name}, which {phase.value} of stage {stage} keeps")
    axis.close()
    return len(kept), missed


def _error(
    expected: Mapping[str, Tensor],
    gradients: Callable[[list[PhaseGraphs]], dict[str, Tensor]],
    graphs: list[PhaseGraphs],
) -> float:
    """Returns the largest error of a parameter gradient, relative to the largest gradient; infinite for NaN."""
    try:
        found = gradients(graphs)
    except FloatingPointError:  # of the loss, which all ranks evaluate alike
        return math.inf
    scale = max(float(g.abs().max()) for g in expected.values())
    errors = [float((g - expected.get(n, torch.zeros_like(g))).abs().max()) / scale for n, g in found.items()]
    return max(math.inf if math.isnan(e) else e for e in errors)


def _gradients(
    traced: Traced, captured: CapturedPotential, axis: GraphAxis, defer: bool, graphs: list[PhaseGraphs]
) -> dict[str, Tensor]:
    """Returns the parameter gradients of the module's step, summed over the graph ranks."""
    runner = CapturedStep(captured, traced.module, GradientBuffers().add)
    whole = runner.prepare(0, traced.module.training_step, BATCH).tensors

    def loss(observables: Sequence[Tensor], derivatives: Sequence[Tensor]) -> LossGradients:
        _, seeds = runner.loss(0, 1.0, *axis.gather_results(0, observables, derivatives))
        return axis.own_gradients(0, seeds)

    stages = [axis.potential.stage(i, traced.potential) for i in range(axis.potential.num_stages)]
    own = axis.scatter_inputs(whole).tensors
    result = run_single_process(stages, axis.potential.chain, own, loss, defer=defer, make_stage=factory(graphs))
    found = {}
    for name, parameter in traced.module.named_parameters():
        gradient = result.gradients.get(parameter)
        found[name] = torch.zeros_like(parameter) if gradient is None else gradient.clone()
        axis.sum_over_ranks(found[name])
    return found
