"""Decides what a phase keeps for later ones: the fewest bytes from which these can compute what they need.

A value that is needed later is either kept or computed again from values that are kept. A minimum cut between what is
at hand and what is needed finds the cheapest set, as in the recomputation of AOTAutograd's min-cut partitioner; here
there are several cuts in a row, one after each phase.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, get_args

from torch import fx

from lightning_januspipe.compiled import graphs
from lightning_januspipe.compiled.kinds_of_work import KindOfWork, work_of

Activation = Literal["keep", "pointwise", "recompute", "offload"]
"""What phases keep: everything, all but pointwise operations and gathers, boundaries only, everything on the host."""

ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)

_CHEAP = {KindOfWork.SIZE, KindOfWork.VIEW, KindOfWork.MAKE}
_POINTWISE = _CHEAP | {KindOfWork.POINTWISE, KindOfWork.GATHER}
RECOMPUTED: Mapping[Activation, Collection[KindOfWork]] = {
    "keep": _CHEAP,
    "pointwise": _POINTWISE,
    "recompute": _POINTWISE | {KindOfWork.SUM},
    "offload": _POINTWISE,
}
"""What later phases may compute again. Exchanges between graph ranks are never computed again: each costs messages."""


def kept_values(
    region: Collection[fx.Node],
    needed: Collection[fx.Node],
    is_early: Callable[[fx.Node], bool],
    held: Collection[fx.Node],
    free: Collection[fx.Node],
    activation: Activation,
) -> list[fx.Node]:
    """``(what later phases need, what is at hand) -> what is kept``.

    Args:
        region: the nodes that later results need, back to ``held`` and ``free``.
        needed: later results themselves.
        is_early: whether a node can be computed by the end of the phase.
        held: values that were kept before.
        free: values that are at hand in every phase, at no cost.
        activation: what may be computed again.

    Returns:
        The values to keep, some of which may have been kept before, in execution order.
    """
    import networkx

    early = sorted((n for n in region if is_early(n)), key=lambda n: n._sort_key)  # alike in every process
    recomputed = RECOMPUTED[activation]
    flow = networkx.DiGraph()
    flow.add_nodes_from(("source", "sink"))
    for node in early:
        is_given = node in held or node in free or node.op == "placeholder"
        _add_node(flow, node, is_given, node in free)
        if is_given or work_of(node) not in recomputed:
            flow.add_edge("source", (node, "in"))  # without a capacity: it cannot be cut
        if node in needed or any(user in region and not is_early(user) for user in node.users):
            flow.add_edge((node, "out"), "sink")
        for user in node.users:
            if user in region and is_early(user) and user not in held:
                flow.add_edge((node, "out"), (user, "in"))
    _, (reached, rest) = networkx.minimum_cut(flow, "source", "sink")
    return [n for n in early if (n, "in") in reached and (n, "out") in rest and n not in free]


def _add_node(flow: Any, node: fx.Node, is_given: bool, is_free: bool) -> None:
    """Adds the cost of keeping a value. Several tensors are kept one by one, and rather a tensor than a view of it."""
    cost: dict[str, int] = {}
    if is_free:
        cost = {"capacity": 0}
    elif not isinstance(node.meta.get("val"), (tuple, list)):
        is_new_view = not is_given and work_of(node) is KindOfWork.VIEW
        cost = {"capacity": graphs.num_bytes(node) + 1 + 8 * is_new_view}
    flow.add_edge((node, "in"), (node, "out"), **cost)
