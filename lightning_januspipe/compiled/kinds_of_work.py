"""Tells which kind of work an operation of a traced stage does: the one table that decides what is computed again."""

from __future__ import annotations

import math
from enum import Enum

import torch
from torch import Tensor, fx

from lightning_januspipe.compiled.small_products import MOST_TERMS


class KindOfWork(Enum):
    """Names the kind of work that an operation does."""

    SIZE = "arithmetic of sizes"
    VIEW = "a view"
    MAKE = "a constant tensor"
    POINTWISE = "pointwise"
    GATHER = "rows that are looked up"
    SUM = "products, sums and scatters"
    EXCHANGE = "an exchange between graph ranks"


_VIEW = (
    "getitem view reshape permute t transpose expand slice select squeeze unsqueeze split_with_sizes split unbind "
    "as_strided alias diagonal view_as_real view_as_complex"
)
_POINTWISE = "where clone cat constant_pad_nd _to_copy stack slice_scatter select_scatter copy"
_GATHER = "index index_select embedding gather"
_MAKE = (
    "full zeros ones empty scalar_tensor new_zeros new_ones new_full new_empty zeros_like ones_like full_like "
    "empty_like empty_strided arange iota eye lift_fresh_copy"
)
_NAMED = {
    name: work
    for work, names in (
        (KindOfWork.VIEW, _VIEW),
        (KindOfWork.POINTWISE, _POINTWISE),
        (KindOfWork.GATHER, _GATHER),
        (KindOfWork.MAKE, _MAKE),
    )
    for name in names.split()
}

LONGEST = 16
"""The longest row that is multiplied again rather than that its products are kept."""
LENGTHENED_BY = 4
"""The least number of columns for each entry of such a row."""
EXCHANGES = "januspipe"
"""Namespace of operators, of which those that take a handle exchange rows between graph ranks."""


def work_of(node: fx.Node) -> KindOfWork:
    """Returns the kind of work that a node does.

    Pointwise operations are known by torch's own tag. Sums of a few numbers and products that make long rows of short
    ones count as pointwise, as they cost little more.
    """
    if node.op == "get_attr":
        return KindOfWork.MAKE
    if not isinstance(node.meta.get("val"), (Tensor, tuple, list)):
        return KindOfWork.SIZE
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        if target.namespace == EXCHANGES and any(a.name == "handle" for a in target._schema.arguments):
            return KindOfWork.EXCHANGE
        name = target._schema.name.split("::")[1]
        if name not in _NAMED and (
            torch.Tag.pointwise in target.tags or _is_short_sum(node, name) or _lengthens_rows(node, name)
        ):
            return KindOfWork.POINTWISE
    else:
        name = getattr(target, "__name__", str(target))
    return _NAMED.get(name, KindOfWork.SUM)


def _is_short_sum(node: fx.Node, name: str) -> bool:
    """Tells whether each result of a node is a sum of as few numbers as those of a product that is written out."""
    if name != "sum" or len(node.args) < 2:
        return False
    source, dims = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(dims, (tuple, list))
    sizes = [source.meta["val"].shape[dim] for dim in dims]
    return bool(sizes) and all(isinstance(s, int) for s in sizes) and math.prod(sizes) <= MOST_TERMS


def _lengthens_rows(node: fx.Node, name: str) -> bool:
    """Tells whether a node makes long rows of short ones by a matrix, as the last layer of a radial network does.

    The weights of tensor products are made like this, for every edge, and are most of what would be kept.
    """
    if name not in ("mm", "addmm"):
        return False
    matrix = node.args[-1]
    assert isinstance(matrix, fx.Node)
    terms, columns = matrix.meta["val"].shape
    return isinstance(terms, int) and isinstance(columns, int) and 0 < terms <= min(LONGEST, columns // LENGTHENED_BY)
