"""``januspipe bench largest``: the search, and the peak of a step of a small structure."""

from __future__ import annotations

import pytest
from pools import slow

from lightning_januspipe.bench.largest import compact_size, largest, largest_size
from lightning_januspipe.bench.work import Work
from lightning_januspipe.data.emt import cubic_repeats


@pytest.mark.parametrize("power", [1.0, 1.1])
@pytest.mark.parametrize(("first", "most_attempts"), [(32, 7), (500, 5), (4000, 4)])
def test_the_largest_size_is_found_in_few_attempts(first: int, most_attempts: int, power: float) -> None:
    tried: list[int] = []

    def peak(num_atoms: int) -> int:
        tried.append(num_atoms)
        return int(6e8 + 2e5 * num_atoms**power)

    most, found = largest_size(peak, 4e9, first, 0.03)
    assert len(tried) <= most_attempts
    assert 0.95 * 4e9 <= found == peak(most) <= 4e9


def test_boxes_are_nearly_cubic() -> None:
    """Two graph ranks would cut a box of prime length at a small face."""
    for size in (4, 500, 4 * 997, 4 * 1009):
        most = compact_size(size)
        assert 0.95 * size <= most <= size and most % 4 == 0
        sides = cubic_repeats(most // 4)
        assert max(sides) < 2 * min(sides)


def test_not_even_the_first_fits() -> None:
    assert largest_size(lambda n: 10, 5.0, 8, 0.1) == (0, 0)


@pytest.mark.parametrize("rows", [slow(["plain"]), slow(["eager-recompute", "graph"])])
def test_attempts(rows: list, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work(num_atoms=32, num_layers=2, num_features=4)
    lines = largest(work, rows=rows, limit=1e6).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["fewer"] * len(rows)
    assert "32 atoms take" in capsys.readouterr().out
