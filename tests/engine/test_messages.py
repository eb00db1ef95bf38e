"""What messages hold, and that both of their ends agree on it."""

from __future__ import annotations

import pytest
import torch
import toy

from lightning_januspipe.engine.messages import MessageForm, Parts, message_specs, rounded_dtype, tensors_to_send
from lightning_januspipe.schedule.actions import Action, Message, Phase

STAGES, CHAIN = toy.chain(toy.CHAINS["observables in several stages"])
FE, FF, BF, BE = Phase.FE, Phase.FF, Phase.BF, Phase.BE


def numbers(source: tuple[Phase, int], target: tuple[Phase, int]) -> tuple[int, int, int]:
    """Returns how many tensors each part of a message holds."""
    receiver = STAGES[target[1]]
    message = Message(Action(*source, 0), Action(*target, 0))
    parts = message_specs(message, CHAIN, len(STAGES), receiver.boundary_in, receiver.boundary_out)
    return len(parts.boundary), len(parts.derivatives), len(parts.observables)


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ((FE, 0), (FE, 1), (1, 0, 1)),  # the observables of the stages before
        ((FE, 1), (FE, 2), (1, 0, 2)),
        ((FF, 2), (FF, 1), (1, 2, 4)),  # running derivatives by positions and strain, and all observables
        ((BF, 0), (BF, 1), (1, 2, 0)),
        ((BE, 1), (BE, 0), (1, 0, 0)),
        ((FE, 1), (FF, 1), (1, 0, 0)),  # between the two ranks of a split stage
        ((FE, 2), (FF, 2), (1, 0, 4)),
        ((BF, 1), (BE, 1), (1, 2, 4)),
    ],
)
def test_parts_of_messages(
    source: tuple[Phase, int], target: tuple[Phase, int], expected: tuple[int, int, int]
) -> None:
    assert len(CHAIN.observables) == 4 and len(CHAIN.coordinates) == 2
    assert numbers(source, target) == expected


@pytest.mark.parametrize("sent_as", [None, torch.bfloat16, torch.float32])
def test_a_message_arrives_as_its_form_says(sent_as: torch.dtype | None) -> None:
    """Boundaries are rounded for the way only; derivatives and observables never."""
    message = Message(Action(FF, 2, 0), Action(FF, 1, 0))
    specs = message_specs(message, CHAIN, len(STAGES), STAGES[1].boundary_in, STAGES[1].boundary_out)
    symbols = {"n": 5, "e": 7, "b": 2}
    form = MessageForm(specs, symbols, sent_as)

    def values(of: object) -> list[torch.Tensor]:
        return [torch.randn(s.sizes(symbols), dtype=s.dtype) for s in of]  # type: ignore[attr-defined]

    sent = Parts(values(specs.boundary), values(specs.derivatives), values(specs.observables))
    tensors = tensors_to_send(sent, sent_as)
    assert [(tuple(t.shape), t.dtype) for t in tensors] == [(tuple(shape), dtype) for shape, dtype in form.shapes()]
    assert tensors[0].dtype == (sent_as or toy.FLOAT)
    came = form.parts(tensors)
    rounded = sent.boundary[0].to(sent_as or toy.FLOAT).to(toy.FLOAT)
    assert torch.equal(came.boundary[0], rounded)
    exact = (*came.derivatives, *came.observables)
    assert all(torch.equal(a, b) for a, b in zip(exact, (*sent.derivatives, *sent.observables), strict=True))


def test_what_is_no_wider_is_sent_as_it_is() -> None:
    assert rounded_dtype(torch.float64, torch.bfloat16) == torch.bfloat16
    assert rounded_dtype(torch.float16, torch.bfloat16) == torch.float16
    assert rounded_dtype(torch.int64, torch.bfloat16) == torch.int64
    assert rounded_dtype(torch.float32, None) == torch.float32
