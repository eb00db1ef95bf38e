"""Which sizes the graphs of a stage take, and for which sizes they are right."""

from __future__ import annotations

import pytest

from lightning_januspipe.compiled.sizes import StageSizes, agree, compiled_expression


def test_symbols_that_agree_are_one_size() -> None:
    first = {"atoms": 12, "same_atoms": 12, "edges": 40, "structures": 3, "dims": 3}
    second = {"atoms": 7, "same_atoms": 7, "edges": 20, "structures": 3, "dims": 3}
    groups, constants = agree(first, second, {"atoms": True, "structures": True}, {})
    assert groups == [("atoms", "same_atoms"), ("edges",), ("structures",)]
    assert constants == {"dims": 3}


def test_equal_numbers_of_structures_in_both_batches_are_no_constant() -> None:
    groups, constants = agree({"b": 2, "c": 2}, {"b": 2, "c": 2}, {"b": True, "c": True}, {})
    assert groups == [("b",), ("c",)], "two sizes that agree by chance stay apart"
    assert not constants


def test_sizes_of_a_rank_are_no_sizes_of_the_whole() -> None:
    """Atoms of which a graph rank has its own, and labels of all atoms, which it holds whole."""
    first, second = (
        {"atoms": 12, "labels": 12, "same": 12, "edges": 9},
        {"atoms": 7, "labels": 7, "same": 7, "edges": 9},
    )
    groups, constants = agree(first, second, {}, {"atoms": "atoms", "same": "atoms", "edges": "edges"})
    assert groups == [("atoms", "same"), ("labels",), ("edges",)]
    assert not constants


@pytest.fixture
def sizes() -> StageSizes:
    return StageSizes({"s0": ("atoms", "same_atoms"), "s1": ("edges",)}, {"dims": 3}, ("s1 > 1", "Eq(Mod(s1, 2), 0)"))


def test_sizes_in_the_order_of_the_graphs(sizes: StageSizes) -> None:
    bound = {"edges": 40, "atoms": 12, "same_atoms": 12, "dims": 3}
    assert sizes.values(bound) == [12, 40]
    assert sizes.misfit(bound) is None


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"dims": 2}, "a size that was 3 in both example batches is 2"),
        ({"same_atoms": 13}, "sizes that were equal in both example batches are 12 and 13"),
        ({"edges": 1}, "the condition s1 > 1 does not hold for s1 = 1"),
        ({"edges": 41}, "the condition Eq(Mod(s1, 2), 0) does not hold for s1 = 41"),
    ],
)
def test_a_misfit_says_what_does_not_fit(sizes: StageSizes, changed: dict[str, int], words: str) -> None:
    assert sizes.misfit({"edges": 40, "atoms": 12, "same_atoms": 12, "dims": 3} | changed) == words


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2*s0 + 1", 15),
        ("(s0//2)", 3),
        ("FloorDiv(s0 + 1, 3)", 2),
        ("Max(1, s0)", 7),
        ("s0**2", 49),
        ("Ne(s0, 7)", False),
    ],
)
def test_expressions_as_torch_prints_them(text: str, value: int) -> None:
    names, function = compiled_expression(text)
    assert names == ("s0",)
    assert function(7) == value
