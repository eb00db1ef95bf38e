from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_januspipe.schedule.stage_placement import cut_evenly, snake


@pytest.mark.parametrize(
    ("num_ranks", "num_stages", "expected"),
    [
        (3, 3, (0, 1, 2)),
        (3, 6, (0, 1, 2, 2, 1, 0)),
        (2, 7, (0, 1, 1, 0, 0, 1, 1)),
        (1, 3, (0, 0, 0)),
        (4, 6, (0, 1, 2, 3, 3, 2)),
    ],
)
def test_snake_goes_down_and_up_again(num_ranks, num_stages, expected):
    assert snake(num_ranks, num_stages) == expected


@given(
    st.lists(st.floats(0.1, 10.0) | st.integers(1, 4).map(float), min_size=1, max_size=9).flatmap(
        lambda costs: st.tuples(st.just(costs), st.integers(1, len(costs)))
    )
)
def test_cut_evenly_is_optimal(case):
    costs, num_parts = case
    parts = cut_evenly(costs, num_parts)
    assert len(parts) == len(costs)
    assert parts == sorted(parts) and set(parts) == set(range(num_parts))
    largest = max(sum(c for c, part in zip(costs, parts, strict=True) if part == p) for p in range(num_parts))
    borders = ((0, *inner, len(costs)) for inner in combinations(range(1, len(costs)), num_parts - 1))
    best = min(max(sum(costs[a:b]) for a, b in pairwise(cut)) for cut in borders)
    assert largest == pytest.approx(best, rel=1e-6)


def test_cut_evenly_leaves_no_part_empty():
    assert cut_evenly([100.0, 1.0, 1.0], 3) == [0, 1, 2]
    assert cut_evenly([1.0, 1.0, 100.0], 3) == [0, 1, 2]
    with pytest.raises(AssertionError, match="every part"):
        cut_evenly([1.0], 2)
