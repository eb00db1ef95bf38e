"""Proof that a potential with stages of its own is staged right: by all graph ranks together, as in training.

Its parts run as they are, exchanges included, so that no process can stand for several ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.stages.explicit import ExplicitPotential
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.validate.against_eager import rounding_tolerance
from lightning_januspipe.engine.loss import LossLeaves
from lightning_januspipe.engine.single_process import run_single_process
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.errors import CaptureError, PipelineError, shown
from lightning_januspipe.graph.axis import GraphAxis
from lightning_januspipe.graph.sharded_potential import RankPotential
from lightning_januspipe.graph.verify_captured import GRADIENT, draw_weights, force_loss, require_same


def verify_explicit_sharding(
    axis: GraphAxis, staged: StagedPotential, potential: nn.Module, tensors: Sequence[Tensor]
) -> None:
    """Compare a micro-batch staged over graph ranks with the whole one, which each rank computes for itself.

    Once neighbouring atoms are on different ranks, so that all exchanges are needed, and sums over atoms are over ranks
    too. Once the first rank has all atoms, and the others none.

    Args:
        axis: this rank's place; all graph ranks have to call this.
        staged: the potential in stages.
        potential: the live potential; its parts run several times.
        tensors: its inputs, the same on all graph ranks.

    Raises:
        CaptureError: they differ, on every rank; or a part failed on this rank, where others may still wait.
        PipelineError: another rank did not answer.
    """
    given = MicrobatchInput(list(tensors), staged.bind_sizes(tensors))
    weights: list[Tensor] = []
    expected = _results(staged, staged, potential, given, None, weights)
    for over in (None, 1):
        try:
            found = _results(axis.potential, staged, potential, axis.scatter_inputs(0, given, over), axis, weights)
        except (PipelineError, torch.OutOfMemoryError):
            raise
        except (IndexError, RuntimeError) as error:
            raise CaptureError(
                f"graph_size > 1 is not possible: on graph rank {axis.rank} of {axis.size}, a part of the potential "
                f"{shown(staged.path)} failed: {error}. Usual causes: a part looks features up by the atoms that "
                "edges come from without with_halo(features, inputs), or stage_edges has source and target the wrong "
                "way round, or a part does not work without any atoms. Or use graph_size=1."
            ) from error
        for what, gradient in found:
            if what.startswith(GRADIENT):
                axis.sum_over_ranks(gradient)
        require_same(expected, found, rounding_tolerance(staged, potential), staged.path, axis.size, _CAUSES)


_CAUSES = (
    "Results for structures have to be sums over atoms, which are added up over the ranks: add constants for each "
    "atom, and square or average nothing. Features of other atoms come from with_halo."
)


def _results(
    local: StagedPotential | RankPotential,
    staged: StagedPotential,
    potential: nn.Module,
    given: MicrobatchInput,
    axis: GraphAxis | None,
    weights: list[Tensor],
) -> list[tuple[str, Tensor]]:
    """Observables, derivatives and parameter gradients, through all phases."""
    outputs: list[tuple[str, Tensor]] = []
    assert isinstance(staged, ExplicitPotential)
    names = list(staged.features[-1])

    def loss(observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        if axis is not None:
            observables, derivatives = axis.gather_results(0, observables, derivatives)
        words = [f"the result {name!r}" for name in names]
        words += [f"the derivative by {name!r}" for name in staged.coordinates]
        leaves = LossLeaves(observables, derivatives)
        values = [*leaves.observables, *leaves.derivatives]
        outputs.extend((what, v.detach()) for what, v in zip(words, values, strict=True))
        if not weights:
            weights.extend(draw_weights(values))
        with torch.enable_grad():
            terms = force_loss(values, weights)
            gradients = leaves.seeds(torch.autograd.grad(terms, leaves.inputs))
        return gradients if axis is None else axis.own_gradients(0, gradients)

    functions = [local.stage(i, potential) for i in range(local.num_stages)]
    result = run_single_process(functions, staged.chain, given.tensors, loss)
    named = [(n, p, result.gradients.get(p)) for n, p in potential.named_parameters() if p.requires_grad]
    return outputs + [
        (
            f"{GRADIENT}{n!r}",
            torch.zeros(p.shape).to(p) if g is None else g.clone(memory_format=torch.contiguous_format),
        )
        for n, p, g in named
    ]
