"""Compiled stages of small potentials for tests: their graphs, traced once, and what makes stages of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from capture_models import OTHER, TRACED, Batch, Traced, make_batch
from torch import Tensor

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.compiled.blueprint import blueprint
from lightning_januspipe.compiled.compiled_stage import CompiledStage, PhaseRunners
from lightning_januspipe.compiled.joint import Joint, trace_joint
from lightning_januspipe.compiled.phase_graphs import PhaseGraphs
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec
from lightning_januspipe.schedule import Phase


def joint_graphs(
    traced: Traced, captured: CapturedPotential, batches: tuple[Batch, Batch] | None = None
) -> list[Joint]:
    """The joint graphs of all stages."""
    return graphs_of(traced, captured, captured, batches or (make_batch(TRACED), make_batch(OTHER)))


def graphs_of(
    traced: Traced, captured: CapturedPotential, with_stages: CapturedPotential, batches: Sequence[Batch]
) -> list[Joint]:
    """The joint graphs of the stages of a potential, which may have exchanges, for two batches of the whole one."""
    calls = [traced.call_on(b) for b in batches]
    inputs = captured.inputs(traced.potential)
    first, second = (captured.bind_sizes(inputs(c.args, c.kwargs)) for c in calls)
    stages = [with_stages.stage(i, traced.potential) for i in range(captured.num_stages)]
    return [trace_joint(blueprint(stage, with_stages.chain, first, second, "cpu")) for stage in stages]


def factory(graphs: Sequence[PhaseGraphs], made: list[CompiledStage] | None = None) -> Callable[..., CompiledStage]:
    """Makes stages of phase graphs, as ``run_single_process`` wants them; ``made`` gets them too."""

    def make(function: Any, gradients: GradientBuffers, chain: ChainSpec) -> CompiledStage:
        own = graphs[function.index]
        stage = CompiledStage(function, PhaseRunners(own.phases, own.modules), gradients, chain)
        if made is not None:
            made.append(stage)
        return stage

    return make


def kept_values_of(graphs: Sequence[PhaseGraphs]) -> list[tuple[int, Phase, str]]:
    """Returns the tensors that phases keep, without sizes: the stage, the phase that computes it, and its name."""
    return [
        (stage, phase, node.name)
        for stage, own in enumerate(graphs)
        for phase, signature in own.phases.signatures.items()
        for node in own.modules[phase].graph.nodes
        if node.name in signature.kept and isinstance(node.meta["val"], Tensor)
    ]


def with_zeros(graphs: PhaseGraphs, phase: Phase, name: str) -> PhaseGraphs:
    """Returns the same phases, one of which keeps zeros in the place of a value; ones in the place of zeros."""
    signature, module = graphs.phases.signatures[phase], graphs.modules[phase]
    place = len(signature.results) + signature.kept.index(name)

    def run(*inputs: Any) -> list[Tensor]:
        out = list(module(*inputs))
        value = out[place]
        out[place] = torch.full_like(value, 0 if value.any() else 1)
        return out

    modules: Mapping[Phase, Any] = {**graphs.modules, phase: run}
    return replace(graphs, modules=modules)
