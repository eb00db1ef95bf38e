"""Writes sums of slices that lie side by side as concatenations, and takes concatenations apart where that is possible.

The features of an equivariant potential are slices of one tensor, one for each degree. The gradient of that tensor is a
sum of tensors of zeros, into each of which the gradient of one slice is written, and inductor evaluates all summands
for each number of the sum, with masks. A concatenation of the gradients has the same numbers. Where it is summed into
rows or sliced again, its parts are used by themselves, and each part has loops of its own.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from lightning_januspipe.compiled import graphs
from lightning_januspipe.compiled.joint import Joint
from lightning_januspipe.compiled.torch_internals import FakeTensorMode, as_traced, expression_of

_ATEN = torch.ops.aten


def join_slices(joint: Joint) -> Joint:
    """``joint -> joint`` in which sums of slices are concatenations, and concatenations are used part by part.

    Args:
        joint: a joint graph without mutations, which is changed; but one that names places in memory stays as it is.
    """
    graph = joint.graph
    if graph.find_nodes(op="call_function", target=_ATEN.as_strided.default):
        return joint
    make = _Maker(graph, joint.mode)
    moved: set[fx.Node] = set()
    with as_traced():
        for change in (_use_whole_slices, _use_parts_of_sums, _sum_parts_into_rows, _use_parts_of_slices):
            for node in graphs.operations(graph):
                with graph.inserting_before(node):
                    found = change(make, node)
                if found is not None:
                    node.replace_all_uses_with(found)
                    moved |= {found} if _strides(found) != _strides(node) else set()
            graph.eliminate_dead_code()
        _follow(make, graph, moved)
    graph.lint()
    return replace(joint, graph=graph)


def _follow(make: _Maker, graph: fx.Graph, moved: set[fx.Node]) -> None:
    """Finds the shapes in memory anew of what is computed from values that have others than before."""
    for node in graphs.operations(graph):
        if moved.isdisjoint(node.all_input_nodes):
            continue
        if node.target is _ATEN.view.default:
            node.target = _ATEN.reshape.default  # a view of the new values may not exist
        before = _strides(node)
        node.meta["val"] = make.value(node.target, node.args, node.kwargs)
        if before is None or _strides(node) != before:
            moved.add(node)


def _strides(node: fx.Node) -> list[str] | None:
    """Returns how a node's tensor lies in memory; None for anything else."""
    value = node.meta.get("val")
    return [expression_of(stride) for stride in value.stride()] if isinstance(value, Tensor) else None


class _Maker:
    """Adds operations to a graph, with the shapes of their results."""

    def __init__(self, graph: fx.Graph, mode: FakeTensorMode) -> None:
        self._graph, self._mode = graph, mode

    def __call__(self, target: Any, *arguments: Any, **options: Any) -> fx.Node:
        node = self._graph.call_function(target, arguments, options)
        node.meta["val"] = self.value(target, arguments, options)
        return node

    def value(self, target: Any, arguments: Any, options: Any) -> Any:
        """Returns the result of an operation in the example call."""
        values, more = fx.map_arg((arguments, options), lambda n: n.meta["val"])
        with self._mode:
            return target(*values, **more)

    def resized(self, constant: fx.Node, dim: int, length: int) -> fx.Node:
        """Returns a tensor that ``aten.full`` or ``aten.expand`` made, of another length along one dimension."""
        place = 0 if constant.target is _ATEN.full.default else 1
        given: Any = constant.args[place]
        shape = [*given]
        shape[dim] = length
        arguments = (*constant.args[:place], shape, *constant.args[place + 1 :])
        return self(constant.target, *arguments, **constant.kwargs)

    def side_by_side(self, parts: Sequence[fx.Node], dim: int) -> fx.Node:
        """Returns the concatenation of tensors; a single one as it is."""
        return parts[0] if len(parts) == 1 else self(_ATEN.cat.default, [*parts], dim)


@dataclass(frozen=True)
class _Interval:
    """Describes an interval of known places in a tensor, ``tensor[..., start:end, ...]``."""

    dim: int
    start: int
    end: int


def _interval(tensor: Tensor, dim: Any = 0, start: Any = None, end: Any = None, step: Any = 1) -> _Interval | None:
    """Returns the interval that the arguments of a slice name; None where it is not known or has gaps."""
    size = tensor.shape[dim]
    start, end = 0 if start is None else start, sys.maxsize if end is None else end
    if step != 1 or not all(isinstance(n, int) for n in (size, start, end)):
        return None
    start, end = (min(n + size if n < 0 else n, size) for n in (start, end))
    return _Interval(dim % tensor.ndim, start, end) if 0 <= start < end else None


def _use_whole_slices(_: _Maker, node: fx.Node) -> fx.Node | None:
    """Returns what is sliced as a whole, or written into the whole of another tensor, in the place of the result."""
    if node.target not in (_ATEN.slice.Tensor, _ATEN.slice_scatter.default) or node.kwargs:
        return None
    source = node.args[0 if node.target is _ATEN.slice.Tensor else 1]
    assert isinstance(source, fx.Node)
    is_whole = graphs.sizes_of(source) == graphs.sizes_of(node)  # then it begins with the first row
    return source if is_whole and source.meta["val"].dtype == node.meta["val"].dtype else None


@dataclass(frozen=True)
class _Slice:
    """Describes a tensor of zeros with another one written into an interval."""

    values: fx.Node
    zeros: fx.Node
    place: _Interval


def _slice_of(node: fx.Node) -> _Slice | None:
    """Returns what a node writes into zeros; None if it does something else."""
    while node.target is _ATEN.clone.default:  # the gradient of a slice that takes all rows
        (node,) = node.all_input_nodes
    if node.target is not _ATEN.slice_scatter.default or node.kwargs:
        return None
    zeros, values, *where = node.args
    assert isinstance(zeros, fx.Node) and isinstance(values, fx.Node)
    place = _interval(zeros.meta["val"], *where)
    return _Slice(values, zeros, place) if place is not None and _is_zeros(zeros) else None


def _is_zeros(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is _ATEN.full.default and bool(node.args[1] == 0)


def _is_sum(node: fx.Node) -> bool:
    """Tells whether a node adds two tensors of its own shape and dtype."""
    if node.target is not _ATEN.add.Tensor or node.kwargs:
        return False
    terms = [a for a in node.args if isinstance(a, fx.Node) and isinstance(a.meta.get("val"), Tensor)]
    sizes, dtype = graphs.sizes_of(node), node.meta["val"].dtype
    return len(terms) == 2 and all(graphs.sizes_of(t) == sizes and t.meta["val"].dtype == dtype for t in terms)


def _use_parts_of_sums(make: _Maker, root: fx.Node) -> fx.Node | None:
    """Returns a sum of slices as a concatenation, plus its other terms."""
    if not _is_sum(root) or (len(root.users) == 1 and _is_sum(next(iter(root.users)))):
        return None  # of a longer sum, which is joined as a whole
    slices: dict[int, list[_Slice]] = {}
    others: list[fx.Node] = []
    terms = [root]
    while terms:
        term = terms.pop()
        found = _slice_of(term)
        if _is_sum(term) and (term is root or len(term.users) == 1):
            terms += [a for a in reversed(term.args) if isinstance(a, fx.Node)]
        elif found is None:
            others.append(term)
        else:
            slices.setdefault(found.place.dim, []).append(found)
    if max(map(len, slices.values()), default=0) < 2 or any(map(_overlap, slices.values())):
        return None
    total, *rest = [*(_joined(make, group) for group in slices.values()), *others]
    for term in rest:
        total = make(_ATEN.add.Tensor, total, term)
    return total


def _overlap(slices: Sequence[_Slice]) -> bool:
    """Tells whether some intervals have a part in common, without being the same."""
    places = sorted({(s.place.start, s.place.end) for s in slices})
    return any(before[1] > after[0] for before, after in itertools.pairwise(places))


def _joined(make: _Maker, slices: Sequence[_Slice]) -> fx.Node:
    """Returns the sum of slices of one dimension as a concatenation, with zeros in the gaps."""
    zeros, dim = slices[0].zeros, slices[0].place.dim
    values: dict[tuple[int, int], fx.Node] = {}
    for found in slices:
        place = found.place.start, found.place.end
        values[place] = make(_ATEN.add.Tensor, values[place], found.values) if place in values else found.values
    parts, reached = [], 0
    for (start, end), part in sorted(values.items(), key=lambda item: item[0]):
        if start > reached:
            parts.append(make.resized(zeros, dim, start - reached))
        parts.append(part)
        reached = end
    if reached < zeros.meta["val"].shape[dim]:
        parts.append(make.resized(zeros, dim, zeros.meta["val"].shape[dim] - reached))
    return make.side_by_side(parts, dim)


def _parts_of(node: Any, dim: int) -> list[tuple[fx.Node, int]] | None:
    """Returns the parts of a concatenation along a dimension, each with its length; None for other nodes."""
    if not isinstance(node, fx.Node) or node.target is not _ATEN.cat.default:
        return None
    parts: Any = node.args[0]
    own: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    value, tensors = node.meta["val"], [part.meta["val"] for part in parts]
    if own % value.ndim != dim % value.ndim or any(t.ndim != value.ndim or t.dtype != value.dtype for t in tensors):
        return None
    lengths = [t.shape[dim] for t in tensors]
    return list(zip(parts, lengths, strict=True)) if all(isinstance(n, int) for n in lengths) else None


def _sum_parts_into_rows(make: _Maker, node: fx.Node) -> fx.Node | None:
    """Returns concatenated columns that are summed into rows of zeros as the concatenation of the parts' sums."""
    arguments: Any = node.args
    if node.target is _ATEN.index_put.default and arguments[3:] == (True,):
        zeros, rows, values = arguments[:3]
        is_by_rows = len(rows) == 1 and rows[0].meta["val"].ndim == 1
    elif node.target is _ATEN.scatter_add.default and arguments[1] == 0:
        zeros, _, rows, values = arguments
        is_by_rows = rows.target is _ATEN.expand.default and graphs.sizes_of(rows.args[0])[1:] == ["1"]
    else:
        return None
    parts = _parts_of(values, 1) if is_by_rows and _is_zeros(zeros) and node.meta["val"].ndim == 2 else None
    if parts is None:
        return None
    sums = []
    for part, length in parts:
        own = make.resized(zeros, 1, length)
        if _is_zeros(part):
            sums.append(own)
        elif node.target is _ATEN.index_put.default:
            sums.append(make(node.target, own, rows, part, True))
        else:
            sums.append(make(node.target, own, 0, make.resized(rows, 1, length), part))
    return make.side_by_side(sums, 1)


def _use_parts_of_slices(make: _Maker, node: fx.Node) -> fx.Node | None:
    """Returns the parts of a concatenation that a slice takes whole, in the place of the slice."""
    if node.target is not _ATEN.slice.Tensor or node.kwargs:
        return None
    joined, *where = node.args
    assert isinstance(joined, fx.Node)
    place = _interval(joined.meta["val"], *where)
    parts = None if place is None else _parts_of(joined, place.dim)
    if place is None or parts is None:
        return None
    ends = [0, *itertools.accumulate(length for _, length in parts)]
    if place.start not in ends or place.end not in ends:
        return None
    first, last = ends.index(place.start), ends.index(place.end)
    return make.side_by_side([part for part, _ in parts[first:last]], place.dim)
