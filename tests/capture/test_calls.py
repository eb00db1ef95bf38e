"""Arguments of the potential's call are matched by their place."""

from __future__ import annotations

import pytest
import torch

from lightning_januspipe.capture.calls import CallFormat, call_leaves
from lightning_januspipe.capture.errors import CaptureError

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


def bind(form: CallFormat, *args: object, **kwargs: object) -> list[torch.Tensor]:
    return form.bind("potential", args, kwargs)


def test_order_of_entries_does_not_matter() -> None:
    form = CallFormat.of(({"b": B, "a": A},), {"mask": C, "depth": 2})
    found = bind(form, {"a": A, "b": B}, depth=2, mask=C)
    assert [x.data_ptr() for x in found] == [x.data_ptr() for x in bind(form, {"b": B, "a": A}, mask=C, depth=2)]
    assert {id(x) for x in found} == {id(A), id(B), id(C)}
    assert form.constants == {"[1]['depth']": 2}


def test_positions_matter() -> None:
    form = CallFormat.of((A, [B, C]), {})
    assert [id(x) for x in bind(form, B, [A, C])] == [id(B), id(A), id(C)]


def test_entries_that_were_not_there_are_ignored() -> None:
    assert bind(CallFormat.of(({"a": A},), {}), {"a": A, "new": B}) == [A]


def test_missing_entries() -> None:
    form = CallFormat.of(({"a": A, "b": B},), {})
    with pytest.raises(CaptureError, match=r"captured with.*without \[\"\[0\]\[0\]\['b'\]\"\].*same entries"):
        bind(form, {"a": A})
    with pytest.raises(CaptureError, match="without"):
        bind(form, {"a": A, "b": 3})


@pytest.mark.parametrize(("traced", "given"), [(3, 4), ("x", "y"), (None, 1), (True, False), (0.5, A)])
def test_changing_constants(traced: object, given: object) -> None:
    form = CallFormat.of((A, traced), {})
    assert bind(form, B, traced) == [B]
    with pytest.raises(CaptureError, match=r"captured with \[0\]\[1\] = .*have to be tensors"):
        bind(form, B, given)
    with pytest.raises(CaptureError, match="captured with"):
        bind(form, B)


def test_leaves_are_sorted_by_place() -> None:
    assert list(call_leaves(({"b": 1, "a": [2, 3]},), {"k": 4})) == [
        "[0][0]['a'][0]",
        "[0][0]['a'][1]",
        "[0][0]['b']",
        "[1]['k']",
    ]
