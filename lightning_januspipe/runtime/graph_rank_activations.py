"""Measures on graph ranks what stages take with each activation: there a micro-batch is smaller, and has exchanges."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TypeVar

from torch import Tensor, nn

from lightning_januspipe.capture import ActivationCosts, ActivationFactories, Capture
from lightning_januspipe.capture.activations import measure_activations
from lightning_januspipe.capture.side_effects import unchanged
from lightning_januspipe.capture.validate.probe_loss import probe_seeds
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.loss import LossLeaves
from lightning_januspipe.engine.single_process import SingleProcessResult, StageFactory, run_single_process
from lightning_januspipe.engine.specs import ChainSpec, LossGradients, StageFunction
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.graph import GraphAxis, GraphGroup
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.schedule import MemoryCosts, PhaseCosts

_Costs = TypeVar("_Costs", PhaseCosts, MemoryCosts)


def measure_on_graph_ranks(
    found: Capture,
    module: nn.Module,
    mesh: Mesh,
    tensors: Sequence[Tensor],
    factories: ActivationFactories,
    defer: bool,
) -> dict[str, ActivationCosts]:
    """Runs a micro-batch through all stages on the graph ranks of one rank of a pipeline, with each activation.

    Args:
        found: The captured potential.
        module: The LightningModule, whole on every rank; it is left as it was.
        mesh: This rank's process groups; all graph ranks have to call this.
        tensors: Inputs of the potential, the same on all graph ranks.
        factories: The activations.
        defer: Leave what only parameters wait for to WF and WE.

    Returns:
        What the stages take on the graph rank where they take most, the same on all graph ranks.
    """
    assert mesh.graph_group is not None
    potential = module.get_submodule(found.potential.path)
    axis = GraphAxis(found.potential, potential, GraphGroup(mesh.shape.graph, mesh.graph_rank, mesh.graph_group))
    functions = [axis.potential.stage(i, potential) for i in range(axis.potential.num_stages)]

    def loss(index: int, observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        leaves = LossLeaves(*axis.gather_results(index, observables, derivatives))
        return axis.own_gradients(index, probe_seeds(leaves))

    def run(make_stage: StageFactory, measures_memory: bool) -> SingleProcessResult:
        def make(function: StageFunction, gradients: GradientBuffers, _: ChainSpec) -> Stage:
            return make_stage(function, gradients, axis.potential.chain)

        own = axis.shard_inputs(tensors).tensors
        return run_single_process(
            functions,
            found.potential.chain,
            own,
            lambda y, x: loss(0, y, x),
            defer=defer,
            measure_memory=measures_memory,
            make_stage=make,
        )

    try:
        with unchanged(module):
            mine = measure_activations(run, found.sizes, found.costs, factories)
        of_ranks = mesh.gathered_over_graph(mine, "exchange of what stages keep")
    except BaseException:
        mesh.abort()  # no rank waits for this one
        raise
    finally:
        axis.close()
    return {name: most_of([of_rank[name] for of_rank in of_ranks]) for name in mine}


def most_of(of_ranks: Sequence[ActivationCosts]) -> ActivationCosts:
    """Returns what the stages take on the rank where they take most, value by value.

    Args:
        of_ranks: What they take on each graph rank.
    """
    return ActivationCosts(
        tuple(_largest(of_stage) for of_stage in zip(*(r.costs for r in of_ranks), strict=True)),
        tuple(_largest(of_stage) for of_stage in zip(*(r.memory for r in of_ranks), strict=True)),
        tuple(max(of_stage) for of_stage in zip(*(r.host_bytes for r in of_ranks), strict=True)),
    )


def _largest(costs: Sequence[_Costs]) -> _Costs:
    names = [field.name for field in fields(costs[0])]
    return type(costs[0])(*(max(getattr(c, name) for c in costs) for name in names))
