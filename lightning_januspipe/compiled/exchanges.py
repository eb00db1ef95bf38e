"""Keeps the exchanges between graph ranks in one order: every rank has to run the same ones, one after the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import fx

from lightning_januspipe.compiled.graphs import placeholders
from lightning_januspipe.compiled.kinds_of_work import KindOfWork, work_of
from lightning_januspipe.compiled.torch_internals import expression_of
from lightning_januspipe.schedule.actions import Phase


def exchanges_of(graph: fx.Graph) -> list[fx.Node]:
    """Returns the exchanges of a graph, in their order."""
    return [n for n in graph.nodes if n.op == "call_function" and work_of(n) is KindOfWork.EXCHANGE]


def chain_exchanges(module: fx.GraphModule) -> None:
    """Makes each exchange of a phase wait for the one before it, in place.

    Compilers reorder operations that do not depend on each other, and graph ranks that compile by themselves might not
    do it alike.
    """
    found = exchanges_of(module.graph)
    for before, node in pairwise(found):
        node.kwargs = {**node.kwargs, "after": before}
    if found:
        module.recompile()


def exchange_order(modules: Mapping[Phase, fx.GraphModule]) -> dict[str, list[str]]:
    """Returns for each phase its exchanges in words, the same on two ranks if and only if their messages match."""
    found: dict[str, list[str]] = {}
    for phase, module in modules.items():
        places = {node: place for place, node in enumerate(placeholders(module.graph))}
        found[phase.value] = [_described(node, places) for node in exchanges_of(module.graph)]
    return found


def _described(node: fx.Node, places: Mapping[fx.Node, int]) -> str:
    """Returns the operator, the input with its handle, and the shape and type of an exchange's result."""
    _, handle, *_ = node.args
    assert isinstance(handle, fx.Node)
    value = node.meta["val"]
    shape = ", ".join(map(expression_of, value.shape))
    name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
    return f"{name} of ({shape}) {value.dtype} by input {places[handle]}"


def first_difference(of_ranks: Sequence[Mapping[str, list[str]]]) -> str | None:
    """Returns in words the first exchange in which ranks differ; None if they have the same ones in the same order.

    Args:
        of_ranks: the :func:`exchange_order` of each rank.
    """
    first = of_ranks[0]
    for rank, other in enumerate(of_ranks):
        for phase in dict.fromkeys((*first, *other)):
            a, b = first.get(phase, []), other.get(phase, [])
            for place in range(max(len(a), len(b))):
                mine, its = (found[place] if place < len(found) else "none" for found in (a, b))
                if mine != its:
                    return f"exchange {place} of {phase} is {mine!r} on the first rank and {its!r} on rank {rank}"
    return None
