"""Arguments of the potential's call are matched by their place."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch

from lightning_januspipe.capture.find.call_format import CallFormat, call_leaves
from lightning_januspipe.errors import CaptureError

A, B, C = torch.zeros(1), torch.ones(2), torch.full((3,), 2.0)


def bind(form: CallFormat, *args: object, **kwargs: object) -> list[torch.Tensor]:
    return form.bind("potential", args, kwargs)


def test_order_of_entries_does_not_matter() -> None:
    form = CallFormat.of(({"b": B, "a": A},), {"mask": C, "kind": "x"})
    found = bind(form, {"a": A, "b": B}, kind="x", mask=C)
    assert [x.data_ptr() for x in found] == [x.data_ptr() for x in bind(form, {"b": B, "a": A}, mask=C, kind="x")]
    assert {id(x) for x in found} == {id(A), id(B), id(C)}
    assert form.constants == {"kwargs['kind']": "x"}


def test_positions_matter() -> None:
    form = CallFormat.of((A, [B, C]), {})
    assert [id(x) for x in bind(form, B, [A, C])] == [id(B), id(A), id(C)]


def test_entries_that_were_not_there_are_ignored() -> None:
    assert bind(CallFormat.of(({"a": A},), {}), {"a": A, "new": B}) == [A]


def test_missing_entries() -> None:
    form = CallFormat.of(({"a": A, "b": B},), {})
    with pytest.raises(CaptureError, match=r"captured with.*without \[\"args\[0\]\['b'\]\"\].*same entries"):
        bind(form, {"a": A})
    with pytest.raises(CaptureError, match="without"):
        bind(form, {"a": A, "b": 3})


@pytest.mark.parametrize(("traced", "given"), [("x", "y"), (None, 1), (True, False), (0.5, A), (1, 2)])
def test_changing_constants(traced: object, given: object) -> None:
    form = CallFormat.of((A, traced), {})
    assert bind(form, B, traced) == [B]
    with pytest.raises(CaptureError, match=r"captured with args\[1\] = .*have to be tensors or integers"):
        bind(form, B, given)
    with pytest.raises(CaptureError, match="captured with"):
        bind(form, B)


def test_integers_are_inputs_as_lengths() -> None:
    form = CallFormat.of((A, 3), {"flag": 1, "changes": 1}, ((A, 3), {"flag": 1, "changes": 4}))
    assert form.sizes == ["args[1]", "kwargs['changes']"] and form.constants == {"kwargs['flag']": 1}
    found = bind(form, B, 7, flag=1, changes=0)
    assert found[0] is B and [tuple(t.shape) for t in found[1:]] == [(7, 0), (0, 0)]
    args, kwargs = form.unbind((A, 3), {"flag": 1, "changes": 1}, found)
    assert args[0] is B and args[1] == 7 and kwargs == {"flag": 1, "changes": 0}
    with pytest.raises(CaptureError, match=r"calls it without \[\"args\[1\]\"\]|without \['args\[1\]'\]"):
        bind(form, B, -1, flag=1, changes=0)


class Store(UserDict[str, Any]):
    """As PyTorch Geometric keeps entries of a graph; numbers that describe a batch are attributes of it."""


class Graph:
    """As PyTorch Geometric's data of one kind of node."""

    edge_stores: tuple[Store, ...] = ()

    def __init__(self, num_graphs: int, **entries: Any) -> None:
        self._store = Store(entries)
        self._store._num_graphs = num_graphs

    @property
    def stores(self) -> list[Store]:
        return [self._store]

    def to_dict(self) -> dict[str, Any]:
        return dict(self._store)

    def __copy__(self) -> Graph:
        return Graph(self._store._num_graphs, **self._store)


def test_number_of_graphs_in_a_batch_of_graphs() -> None:
    form = CallFormat.of((Graph(2, x=A),), {}, ((Graph(3, x=B),), {}))
    assert form.tensors == ["args[0].x"] and form.sizes == ["args[0]._num_graphs"] and form.constants == {}
    given = Graph(2, x=A)
    ((changed,), _) = form.unbind((given,), {}, bind(form, Graph(5, x=C)))
    assert changed._store._num_graphs == 5 and changed._store["x"] is C
    assert given._store._num_graphs == 2 and given._store["x"] is A


def test_what_differs_between_two_calls_is_no_constant() -> None:
    form = CallFormat.of((A, "a.xyz", "mp"), {}, ((A, "b.xyz", "mp"), {}))
    assert bind(form, B, "c.xyz", "mp") == [B]
    with pytest.raises(CaptureError, match="captured with"):
        bind(form, B, "c.xyz", "other")


def test_evaluation_may_have_other_constants_or_leave_them_out() -> None:
    form = CallFormat.of((A,), {"training": True, "stress": True, "head": "x"})
    form = form.with_evaluation((A,), {"training": False, "head": "x"})
    assert bind(form, B, training=True, stress=True, head="x") == bind(form, B, training=False, head="x") == [B]
    for other in ({"training": None, "head": "x"}, {"training": False, "stress": False, "head": "x"}, {}):
        with pytest.raises(CaptureError, match="captured with"):
            bind(form, B, **other)


def test_leaves_are_sorted_by_place() -> None:
    assert list(call_leaves(({"b": 1, "a": [2, 3]},), {"k": 4})) == [
        "args[0]['a'][0]",
        "args[0]['a'][1]",
        "args[0]['b']",
        "kwargs['k']",
    ]
