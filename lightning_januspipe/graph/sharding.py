"""Shards a potential over graph ranks, whether its stages were captured or are its own, and verifies that."""

from __future__ import annotations

from collections.abc import Sequence
from functools import singledispatch
from typing import Any

from torch import Tensor, nn

from lightning_januspipe.capture.find.grad_call import StepFunction, call_arguments
from lightning_januspipe.capture.side_effects import unchanged
from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.stages.explicit import ExplicitPotential
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.graph.insert_exchanges import shard_captured
from lightning_januspipe.graph.shard_explicit import shard_explicit
from lightning_januspipe.graph.sharded_potential import ShardedPotential


@singledispatch
def shard_potential(staged: StagedPotential, potential: nn.Module) -> ShardedPotential:
    """Shards a potential over graph ranks.

    Args:
        staged: the potential in stages.
        potential: the live potential.

    Raises:
        CaptureError: it cannot be sharded; the message says why.
    """
    raise TypeError(f"there is no way to shard a {type(staged).__name__}; expected a captured or an explicit potential")


@shard_potential.register
def _(staged: CapturedPotential, potential: nn.Module) -> ShardedPotential:
    return shard_captured(staged)


@shard_potential.register
def _(staged: ExplicitPotential, potential: nn.Module) -> ShardedPotential:
    return shard_explicit(staged, potential)


def verify_sharding(
    staged: StagedPotential,
    module: nn.Module,
    step: StepFunction,
    batch: Any,
    num_ranks: int,
    gradient_bytes: float | None = None,
) -> Sequence[Tensor]:
    """Verifies that a potential can be sharded over graph ranks, on its call in one step.

    Args:
        staged: the potential in stages.
        module: the LightningModule, which is left as it was.
        step: its step, from a batch to its output.
        batch: one micro-batch.
        num_ranks: G.
        gradient_bytes: The most bytes of parameter gradients that are there at once, twice; None for all.

    Returns:
        The potential's inputs where all ranks have to verify it together, with
        :func:`~lightning_januspipe.graph.verify_explicit.verify_explicit_sharding`; nothing where it is verified.

    Raises:
        CaptureError: it cannot be sharded; the message says why.
    """
    potential = module.get_submodule(staged.path)
    sharded = shard_potential(staged, potential)
    tensors = call_tensors(staged, module, step, batch)
    return () if sharded.verify(potential, tensors, num_ranks, gradient_bytes) else tensors


def call_tensors(staged: StagedPotential, module: nn.Module, step: StepFunction, batch: Any) -> list[Tensor]:
    """Returns the tensors of the potential's call in a step; the module is left as it was."""
    with unchanged(module):
        args, kwargs = call_arguments(module, staged.path, step, batch, staged.replaced is not None)
        return staged.inputs(module.get_submodule(staged.path))(args, kwargs)
