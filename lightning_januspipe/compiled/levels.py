"""Decides with passes over the joint graph in which phase each operation runs."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from lightning_januspipe.compiled import graphs
from lightning_januspipe.compiled.joint import Joint
from lightning_januspipe.compiled.kinds_of_work import KindOfWork, work_of
from lightning_januspipe.compiled.ports import GIVEN, WANTED, Kind, Port
from lightning_januspipe.compiled.torch_internals import without_repetitions
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.schedule.actions import Phase

ORDER = (Phase.FE, Phase.FF, Phase.BF, Phase.BE, Phase.WF, Phase.WE)
"""The phases; WF may run before BE."""

_LINEAR = {
    torch.ops.aten.t.default,
    torch.ops.aten.transpose.int,
    torch.ops.aten.permute.default,
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.squeeze.dims,
    torch.ops.aten.unsqueeze.default,
    torch.ops.aten.sum.dim_IntList,
}
"""Operations of one tensor that may be applied to the summands of a sum instead."""

BEFORE: dict[Phase, tuple[Phase, ...]] = {
    phase: ORDER[: min(i, 3)] if phase is not Phase.WE else ORDER[:5] for i, phase in enumerate(ORDER)
}
"""The phases that have run before each phase; WF and BE do not wait for each other."""

Levels = dict[fx.Node, Phase]
"""The phase in which each node of the joint graph runs first."""

_UNCHANGED = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten.lift_fresh_copy.default)


def without_mutations(joint: Joint) -> Joint:
    """``joint -> joint``: a copy in which no operation writes to its input.

    Autograd's own formulas write to tensors that they have just made. A later phase that ran such an operation again,
    on a value that was kept, would write to it twice.

    Raises:
        CaptureError: an operation writes to a tensor that others may read.
    """
    graph = fx.Graph()
    graph.output(graph.graph_copy(joint.graph, {}))
    order = {node: place for place, node in enumerate(graph.nodes)}
    for node in graphs.operations(graph):
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
            continue
        written, name = (node.args or (None,))[0], target._schema.name.split("::")[1]
        is_own = False
        if isinstance(written, fx.Node) and written.op == "call_function":
            readers = [user for user in written.users if user is not node]
            is_own = not _is_view(written) and all(order[r] < order[node] and not _is_view(r) for r in readers)
        if not is_own or not name.endswith("_"):
            raise CaptureError(f"the operation {target} writes to a tensor that other operations may read")
        node.target = getattr(getattr(getattr(torch.ops, target.namespace), name[:-1]), target._overloadname)
    return replace(joint, graph=graph)


def _is_view(node: fx.Node) -> bool:
    """Returns whether a node shares memory with its input."""
    return work_of(node) is KindOfWork.VIEW or node.target in _UNCHANGED


def drop_repetitions(joint: Joint) -> Joint:
    """``joint -> joint``: drops operations that return their input, occur twice, or are needed by nothing."""
    graph = without_repetitions(joint.graph)
    for node in list(graph.nodes):
        if node.target in _UNCHANGED:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph = without_repetitions(graph)
    graph.eliminate_dead_code()
    return replace(joint, graph=graph)


def natural_levels(joint: Joint) -> Levels:
    """``joint -> levels``: finds the phase in which the last input of a node arrives (FE, FF, BF or BE)."""
    levels = {node: GIVEN[port.kind] for node, port in joint.ports_of.items()}
    for node in graphs.operations(joint.graph):
        levels[node] = max((levels[i] for i in node.all_input_nodes), key=ORDER.index, default=Phase.FE)
    return levels


def split_sums(joint: Joint) -> Joint:
    """``joint -> joint``: returns parameter gradients in summands, each from the first phase that has it.

    A gradient is the sum of what BF and what BE find. Returned as one sum, the first part would be kept for every
    micro-batch between the two; the gradients' buffers add the summands anyway.
    """
    levels = natural_levels(joint)
    wanted: list[tuple[fx.Node, Port]] = []
    for node, port in joint.wanted:
        parts = _Summands(joint, levels).of(node) if port.kind is Kind.PARAMETER_GRADIENT else [node]
        wanted += [(part, port) for part in parts]
    joint.graph.output_node().args = (tuple(node for node, _ in wanted),)
    joint.graph.eliminate_dead_code()
    joint.graph.lint()
    return replace(joint, outputs=[port for _, port in wanted])


class _Summands:
    """Finds the summands of a value that phases find one after the other."""

    def __init__(self, joint: Joint, levels: Levels) -> None:
        self._graph, self._mode, self._levels = joint.graph, joint.mode, levels

    def of(self, node: fx.Node) -> list[fx.Node]:
        """Returns the summands of a value, the value itself if there is only one."""
        if node.target is torch.ops.aten.add.Tensor:
            return self._of_sum(node)
        if node.target in _LINEAR:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            parts = self.of(source)
            return [node] if len(parts) == 1 else [self._applied(node, part) for part in parts]
        return [node]

    def _of_sum(self, node: fx.Node) -> list[fx.Node]:
        sizes = graphs.sizes_of(node)
        terms = [a for a in node.args if isinstance(a, fx.Node)]
        is_plain = len(terms) == 2 and not node.kwargs and all(graphs.sizes_of(t) == sizes for t in terms)
        if not is_plain or self._levels[terms[0]] is self._levels[terms[1]] is self._levels[node]:
            return [node]
        return [part for term in terms for part in self.of(term)]

    def _applied(self, node: fx.Node, part: fx.Node) -> fx.Node:
        """Returns the operation of a node, applied to a summand of its operand."""
        target: Any = node.target
        with self._graph.inserting_before(self._graph.output_node()):
            found = self._graph.call_function(target, (part, *node.args[1:]), node.kwargs)
        sizes = fx.map_arg(node.args[1:], lambda size: size.meta["val"])  # some may follow from a batch
        with self._mode:
            found.meta["val"] = target(part.meta["val"], *sizes, **node.kwargs)
        self._levels[found] = self._levels[part]
        return found


def assign_phases(joint: Joint, defer: bool) -> Levels:
    """``(joint, defer) -> levels``: finds the phase in which each operation runs first.

    It is the natural one, with two changes. What FE's own results do not need goes to FF: in the last stage no input
    tells them apart. With ``defer``, what only parameter gradients need leaves BF and BE for WF and WE. Arithmetic of
    sizes stays: a number is kept instead of the tensor whose size it is.

    Args:
        joint: the joint graph; its levels are found anew.
        defer: leave what only parameters wait for to WF and WE.
    """
    levels = natural_levels(joint)
    of_energy = graphs.closure(node for node, port in joint.wanted if WANTED.get(port.kind) is Phase.FE)
    on_path = graphs.closure(node for node, port in joint.wanted if port.kind is not Kind.PARAMETER_GRADIENT)
    later = {Phase.BF: Phase.WF, Phase.BE: Phase.WE}
    for node in graphs.operations(joint.graph):
        if work_of(node) is KindOfWork.SIZE:
            continue
        # One of several results of an operation is taken where the operation runs: they are kept one by one.
        needs: Any = node.args[0] if node.target is operator.getitem else node
        if levels[node] is Phase.FE and needs not in of_energy:
            levels[node] = Phase.FF
        elif defer and levels[node] in later and needs not in on_path:
            levels[node] = later[levels[node]]
    return levels


def returned_in(joint: Joint, levels: Levels) -> list[Phase]:
    """``(joint, levels) -> the phase that returns each result``; a parameter gradient comes from BF at the earliest."""
    found = []
    for node, port in joint.wanted:
        phase = WANTED.get(port.kind)
        if phase is None:
            level = levels[node]
            is_late = ORDER.index(level) >= ORDER.index(Phase.BF)
            phase = level if is_late else Phase.BF
        found.append(phase)
    return found


def seeds_of_gradients(joint: Joint) -> list[frozenset[Port] | None]:
    """``joint -> for each result the inputs that decide whether it exists``.

    A parameter has a gradient if the loss reads something that leads to it. ``v`` and ``u`` always count as read; so a
    gradient that depends on them always exists. For the others these are the λ and Ē that they depend on, of which the
    loss may read none: then the parameter's gradient is None, as in a single process, and not zero.

    Returns:
        The inputs, or None where the result always exists.
    """
    deciding = (Kind.BOUNDARY_COTANGENT, Kind.OBSERVABLE_COTANGENT)
    always = (Kind.FORCE_COTANGENT, Kind.DERIVATIVE_COTANGENT)
    ports = joint.ports_of
    found: list[frozenset[Port] | None] = []
    for node, port in joint.wanted:
        seeds = None
        if port.kind is Kind.PARAMETER_GRADIENT:
            needed = [ports[n] for n in graphs.closure([node]) if n in ports]
            if not any(p.kind in always for p in needed):
                seeds = frozenset(p for p in needed if p.kind in deciding) or None
        found.append(seeds)
    return found
