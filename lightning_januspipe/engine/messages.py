"""Describes the messages between the actions of a micro-batch.

Stage s of S, in the order of the chain:

============  ==============================================================================
from → to     message
============  ==============================================================================
FE → next FE  boundary h, observables computed so far
FF → next FF  ∂E/∂h, running ∂E/∂x, all observables
BF → next BF  u = ∂L/∂(∂E/∂h), complete ∂E/∂x
BE → next BE  λ = ∂L/∂h
============  ==============================================================================

So every rank has energies and forces before its first BF, and evaluates the user's loss on the same numbers. The two
ranks of a split stage send each other two messages more:

============  ==============================================================================
FE → own FF   the boundary that the stage received; from the last stage also all observables
BF → own BE   μ, the part of ∂L/∂h that comes through the forces, complete ∂E/∂x, all observables
============  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lightning_januspipe.engine.p2p import Shapes
from lightning_januspipe.engine.specs import ChainSpec, TensorSpec
from lightning_januspipe.schedule.actions import Message, Phase

_Entry = TypeVar("_Entry", Tensor, TensorSpec)


@dataclass(frozen=True)
class Parts(Generic[_Entry]):
    """Holds the three parts of a message, or their specs; any part may be empty.

    Attributes:
        boundary: Values of a boundary, or gradients of them.
        derivatives: ∂E/∂x, running or complete.
        observables: Values that the loss reads.
    """

    boundary: Sequence[_Entry] = ()
    derivatives: Sequence[_Entry] = ()
    observables: Sequence[_Entry] = ()


def message_specs(
    message: Message,
    chain: ChainSpec,
    num_stages: int,
    boundary_in: Sequence[TensorSpec],
    boundary_out: Sequence[TensorSpec],
) -> Parts[TensorSpec]:
    """Returns what a message between two ranks holds.

    Args:
        message: The actions that send it and wait for it.
        chain: What the stages share.
        num_stages: Length of the chain.
        boundary_in: The boundary before the stage that receives the message.
        boundary_out: The boundary after it.
    """
    (phase, sender, _), (_, receiver, _) = message
    if sender == receiver:  # the two ranks of a split stage
        if phase is Phase.FE:
            return Parts(boundary_in, (), chain.observables if receiver == num_stages - 1 else ())
        return Parts(boundary_in, chain.coordinates, chain.observables)
    if phase is Phase.FE:
        return Parts(boundary_in, (), [chain.observables[i] for i in chain.observables_before(receiver)])
    if phase is Phase.FF:
        return Parts(boundary_out, chain.coordinates, chain.observables)
    if phase is Phase.BF:
        return Parts(boundary_in, chain.coordinates)
    return Parts(boundary_out)


@dataclass(frozen=True)
class MessageForm:
    """Holds the shapes and dtypes of one message, which the receiver knows before it comes.

    All ranks of a pipeline hold the same batch, so each evaluates the shapes by itself.

    Attributes:
        specs: What the message holds.
        symbols: Values of the micro-batch's size symbols.
        sent_as: The dtype that the boundary is rounded to for the way; None to send it as it is.
    """

    specs: Parts[TensorSpec]
    symbols: Mapping[str, int]
    sent_as: torch.dtype | None = None

    def shapes(self) -> Shapes:
        """Returns shape and dtype of every tensor on the way."""
        specs = self.specs
        boundary = [(s.sizes(self.symbols), rounded_dtype(s.dtype, self.sent_as)) for s in specs.boundary]
        return boundary + [(s.sizes(self.symbols), s.dtype) for s in (*specs.derivatives, *specs.observables)]

    def parts(self, tensors: Sequence[Tensor]) -> Parts[Tensor]:
        """Returns the parts of a message that came, with the boundary in the dtype that the stage computes in."""
        first, second = len(self.specs.boundary), len(self.specs.boundary) + len(self.specs.derivatives)
        boundary = [t.to(s.dtype) for t, s in zip(tensors[:first], self.specs.boundary, strict=True)]
        return Parts(boundary, tensors[first:second], tensors[second:])


def tensors_to_send(parts: Parts[Tensor], sent_as: torch.dtype | None) -> list[Tensor]:
    """Returns the tensors of a message in their order, with the boundary rounded."""
    boundary = [t.to(rounded_dtype(t.dtype, sent_as)) for t in parts.boundary]
    return [*boundary, *parts.derivatives, *parts.observables]


def rounded_dtype(dtype: torch.dtype, sent_as: torch.dtype | None) -> torch.dtype:
    """Returns the dtype that a boundary's tensor is sent as: floating-point types get no wider than ``sent_as``."""
    is_wider = sent_as is not None and dtype.is_floating_point and dtype.itemsize > sent_as.itemsize
    return sent_as if sent_as is not None and is_wider else dtype
