"""``januspipe bench largest``: the search, and the peak of a step of a small structure."""

from __future__ import annotations

import pytest
from pools import slow

from lightning_januspipe.bench.largest import largest, largest_size
from lightning_januspipe.bench.work import Work


@pytest.mark.parametrize("power", [1.0, 1.1])
@pytest.mark.parametrize("first", [32, 512, 4096])
def test_the_largest_size_is_found_in_few_attempts(first: int, power: float) -> None:
    tried: list[int] = []

    def peak(num_atoms: int) -> int:
        tried.append(num_atoms)
        return int(6e8 + 2e5 * num_atoms**power)

    most, found = largest_size(peak, 4e9, first, 0.03)
    assert len(tried) <= 12
    assert found == peak(most) <= 4e9 < peak(int(1.04 * most))


def test_not_even_the_first_fits() -> None:
    assert largest_size(lambda n: 10, 5.0, 8, 0.1) == (0, 0)


@pytest.mark.parametrize("rows", [slow(["plain"]), slow(["eager-recompute", "graph"])])
def test_attempts(rows: list, capsys: pytest.CaptureFixture[str]) -> None:
    work = Work(num_atoms=32, num_layers=2, num_features=4)
    lines = largest(work, rows=rows, limit=1e6).splitlines()
    assert [line.split(" | ")[1] for line in lines[2:]] == ["fewer"] * len(rows)
    assert "32 atoms take" in capsys.readouterr().out
