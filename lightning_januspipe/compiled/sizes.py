"""Tells which sizes of a micro-batch the graphs of a stage take as inputs, and for which sizes they are right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from lightning_januspipe.engine.specs import compiled_expression as compiled_expression


@dataclass(frozen=True)
class StageSizes:
    """Holds the sizes of a stage's graphs.

    Export leaves sizes apart that are equal in every batch. Where two example calls agree about two symbols the graphs
    have one size for both, or each use of them together would add a guard.

    Attributes:
        groups: name of a size of the graphs -> the program's size symbols that have to be equal to it.
        constants: size symbols whose value the graphs hold as a number -> that value.
        guards: relations between sizes of the graphs that hold in the calls that they are right for.
    """

    groups: Mapping[str, tuple[str, ...]]
    constants: Mapping[str, int]
    guards: tuple[str, ...] = ()

    def values(self, bound: Mapping[str, int]) -> list[int]:
        """Returns the sizes in the order in which the graphs take them.

        Args:
            bound: values of the program's size symbols for a micro-batch.
        """
        return [bound[symbols[0]] for symbols in self.groups.values()]

    def misfit(self, bound: Mapping[str, int]) -> str | None:
        """Returns in words why the graphs are not right for a micro-batch; None where they are.

        Args:
            bound: values of the program's size symbols for a micro-batch.
        """
        for symbol, value in self.constants.items():
            if bound[symbol] != value:
                return f"a size that was {value} in both example batches is {bound[symbol]}"
        for symbols in self.groups.values():
            found = sorted({bound[s] for s in symbols})
            if len(found) > 1:
                return f"sizes that were equal in both example batches are {found[0]} and {found[1]}"
        sizes = dict(zip(self.groups, self.values(bound), strict=True))
        for guard in self.guards:
            names, function = compiled_expression(guard)
            if not function(*(sizes[n] for n in names)):
                given = ", ".join(f"{n} = {sizes[n]}" for n in names)
                return f"the condition {guard} does not hold for {given}"
        return None

    def with_guards(self, guards: Sequence[str]) -> StageSizes:
        """Returns the same with more guards, as :func:`compiled_expression` reads them."""
        return replace(self, guards=tuple(dict.fromkeys((*self.guards, *guards))))


def agree(
    first: Mapping[str, int], second: Mapping[str, int], leading: Mapping[str, bool], rows: Mapping[str, str]
) -> tuple[list[tuple[str, ...]], dict[str, int]]:
    """Finds the symbols that have one size, from their values in two example calls.

    A symbol with one value in both calls is a constant (3 for the coordinates of a position, say), unless it counts
    the rows of an input: two batches may well have the same number of structures.

    Args:
        first: values of the size symbols in the call whose sizes are the examples of the graphs.
        second: their values in a call with other sizes.
        leading: whether a symbol is the first dimension of an input.
        rows: for symbols that count rows of which a graph rank has its own, the class of these rows: other symbols
            may have the same values in the whole calls, but not on a rank.

    Returns:
        Groups of symbols that have the same values, and the constants.
    """
    groups: dict[tuple[int, int, str], list[str]] = {}
    alone: list[tuple[str, ...]] = []
    constants: dict[str, int] = {}
    for symbol in first:
        if first[symbol] != second[symbol]:
            groups.setdefault((first[symbol], second[symbol], rows.get(symbol, "")), []).append(symbol)
        elif leading.get(symbol, False) or symbol in rows:
            alone.append((symbol,))
        else:
            constants[symbol] = first[symbol]
    return [*(tuple(g) for g in groups.values()), *alone], constants
