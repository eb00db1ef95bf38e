"""Lists the passes over a captured program, which run between its trace and its cut.

A pass is a function ``Program -> Program``: it changes the program that it is given, and returns it. After every pass
the program gives the same results for every batch, within rounding. Passes may add inputs (random numbers, in the order
in which the forward draws them, and lists of indices) with their symbols and guards; other inputs stay. Tracing
applies no pass, and the cache holds programs after all passes.

These functions run after the passes; they read the program and do not change it::

    find_regions(Program, read outputs) -> Regions                 which operations are geometry, body, epilogue
    measure(Program, Regions, tensors) -> Profile                  seconds and bytes of each operation
    find_cut(Program, Regions, Profile, num_stages) -> Cut         which stage owns, repeats and sends what
    dependence_of(Program, Regions) -> {name: Dependence}          what depends on each value that is sent
    shard_captured(CapturedPotential) -> ShardedPotential          a copy with exchanges between graph ranks
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_januspipe.capture.cut.simplify import simplify
from lightning_januspipe.capture.cut.split_shared_linear import split_shared_linear
from lightning_januspipe.capture.trace.index_lists import make_lists_outside
from lightning_januspipe.capture.trace.means import split_means
from lightning_januspipe.capture.trace.pair_lookups import split_pair_lookups
from lightning_januspipe.capture.trace.program import Program
from lightning_januspipe.capture.trace.random_draws import draw_outside

PASSES: tuple[Callable[[Program], Program], ...] = (
    draw_outside,
    split_means,
    simplify,
    make_lists_outside,
    split_pair_lookups,
    split_shared_linear,
)
"""The passes in their order.

``draw_outside`` comes first, so that all random numbers of the forward are drawn, used or not. ``simplify`` comes
before the passes that recognize patterns of operations: a view between two operations would hide a pattern.
"""


def apply_passes(program: Program) -> Program:
    """Returns the program after all :data:`PASSES`; it is changed."""
    for apply in PASSES:
        program = apply(program)
    return program
