"""Verifies that a potential with stages of its own is sharded right: by all graph ranks together, as in training.

Its parts run as they are, exchanges included, so that no process can stand for several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.validate.against_eager import rounding_tolerance
from lightning_januspipe.capture.validate.probe_loss import probe_seeds
from lightning_januspipe.engine.loss import LossLeaves
from lightning_januspipe.engine.single_process import run_single_process
from lightning_januspipe.engine.specs import LossGradients
from lightning_januspipe.errors import CaptureError, PipelineError, quoted
from lightning_januspipe.graph.axis import GraphAxis
from lightning_januspipe.graph.sharded_potential import RankPotential
from lightning_januspipe.graph.verify_captured import GRADIENT, require_same


def verify_explicit_sharding(
    axis: GraphAxis, staged: StagedPotential, potential: nn.Module, tensors: Sequence[Tensor]
) -> None:
    """Compares a micro-batch that is sharded over graph ranks with the whole one, which each rank computes for itself.

    It is sharded twice: with neighbouring atoms on different ranks, so that all exchanges are needed, and sums over
    atoms are sums over ranks; and with all atoms on the first rank and none on the others.

    Args:
        axis: this rank's place; all graph ranks have to call this.
        staged: the potential in stages.
        potential: the live potential; its parts run several times.
        tensors: its inputs, the same on all graph ranks.

    Raises:
        CaptureError: they differ, on every rank; or a part failed on this rank, where others may still wait.
        PipelineError: another rank did not answer.
    """
    staged.bind_sizes(tensors)
    expected = _results(staged, staged, potential, tensors, None)
    for over in (None, 1):
        try:
            own = axis.scatter_inputs(tensors, over).tensors
            found = _results(axis.potential, staged, potential, own, axis)
        except (PipelineError, torch.OutOfMemoryError):
            raise
        except (IndexError, RuntimeError) as error:
            raise CaptureError(
                f"graph_size > 1 is not possible: on graph rank {axis.rank} of {axis.size}, a part of the potential "
                f"{quoted(staged.path)} failed: {error}. Usual causes: a part looks up features of source atoms "
                "without with_halo(features, inputs), or stage_edges has source and target the wrong "
                "way round, or a part does not work without any atoms. Or use graph_size=1."
            ) from error
        for what, gradient in found:
            if what.startswith(GRADIENT):
                axis.sum_over_ranks(gradient)
        require_same([(expected, found)], rounding_tolerance(staged, potential), staged.path, axis.size, _CAUSES)


_CAUSES = (
    "Results for structures have to be sums over atoms, which are added up over the ranks: add constants for each "
    "atom, and square or average nothing. Features of other atoms come from with_halo."
)


def _results(
    chain: StagedPotential | RankPotential,
    staged: StagedPotential,
    potential: nn.Module,
    tensors: Sequence[Tensor],
    axis: GraphAxis | None,
) -> list[tuple[str, Tensor]]:
    """Returns observables, derivatives and parameter gradients of a force loss, each with its name.

    Args:
        chain: the stages that run, on all rows or on one rank's own.
        staged: the potential in stages.
        potential: the live potential.
        tensors: the inputs of the stages.
        axis: the graph axis of stages on one rank's own rows.
    """
    outputs: list[tuple[str, Tensor]] = []
    names = [f"the result {name!r}" for name in staged.observable_names]
    names += [f"the derivative by {name!r}" for name in staged.coordinate_names]

    def loss(observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        if axis is not None:
            observables, derivatives = axis.gather_results(0, observables, derivatives)
        from_loss = LossLeaves(observables, derivatives)
        values = [*from_loss.observables, *from_loss.derivatives]
        outputs.extend((name, v.detach()) for name, v in zip(names, values, strict=True))
        seeds = probe_seeds(from_loss)
        return seeds if axis is None else axis.own_gradients(0, seeds)

    functions = [chain.stage(i, potential) for i in range(chain.num_stages)]
    result = run_single_process(functions, staged.chain, tensors, loss)
    for name, p in potential.named_parameters():
        if p.requires_grad:
            g = result.gradients.get(p)
            # Only other stages may read the parameter, and collectives take contiguous tensors only.
            found = torch.zeros_like(p) if g is None else g
            outputs.append((f"{GRADIENT}{name!r}", found.clone(memory_format=torch.contiguous_format)))
    return outputs
