"""Sizes of the mesh, indices of ranks, process groups, and a group as the world."""

from __future__ import annotations

import pytest
from engine_workers import inspect_mesh, use_groups_as_world
from hypothesis import given
from hypothesis import strategies as st

from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.testing import RankPool

SIZE = st.integers(1, 6)


@pytest.mark.parametrize(
    ("pipeline", "data", "graph", "world", "expected"),
    [
        ("auto", "auto", 1, 1, (1, 1, 1)),
        ("auto", "auto", 1, 8, (8, 1, 1)),
        ("auto", "auto", 2, 8, (4, 1, 2)),
        ("auto", 2, 1, 8, (4, 2, 1)),
        ("auto", 2, 2, 8, (2, 2, 2)),
        ("auto", 8, 1, 8, (1, 8, 1)),
        (2, "auto", 1, 8, (2, 4, 1)),
        (2, "auto", 2, 8, (2, 2, 2)),
        (8, "auto", 1, 8, (8, 1, 1)),
        (1, "auto", 1, 8, (1, 8, 1)),
        (2, 4, 1, 8, (2, 4, 1)),
        (2, 2, 2, 8, (2, 2, 2)),
    ],
)
def test_resolve(pipeline: object, data: object, graph: int, world: int, expected: tuple[int, int, int]) -> None:
    shape = MeshShape.resolve(pipeline, data, graph, world)  # type: ignore[arg-type]
    assert (shape.pipeline, shape.data, shape.graph) == expected
    assert shape.size == world


@pytest.mark.parametrize(
    ("pipeline", "data", "graph", "world", "product"),
    [
        (2, 2, 1, 8, "2 × 2 × 1 = 4"),
        (3, "auto", 1, 8, "3 × 2 × 1 = 6"),
        ("auto", 3, 1, 8, "2 × 3 × 1 = 6"),
        (16, "auto", 1, 8, "16 × 1 × 1 = 16"),
        ("auto", 16, 1, 8, "1 × 16 × 1 = 16"),
        ("auto", "auto", 3, 8, "2 × 1 × 3 = 6"),
        (2, 2, 4, 8, "2 × 2 × 4 = 16"),
    ],
)
def test_error_shows_the_product(pipeline: object, data: object, graph: int, world: int, product: str) -> None:
    with pytest.raises(ValueError, match=product) as error:
        MeshShape.resolve(pipeline, data, graph, world)  # type: ignore[arg-type]
    assert f"there are {world} processes" in str(error.value)
    assert f"pipeline_size={pipeline!r}, data_size={data!r}, graph_size={graph}" in str(error.value)
    assert "Trainer(devices=" in str(error.value)


@pytest.mark.parametrize("wrong", [0, -1, True, 2.0, "4", None])
@pytest.mark.parametrize("axis", ["pipeline", "data", "graph"])
def test_sizes_that_are_no_positive_numbers(axis: str, wrong: object) -> None:
    sizes = {"pipeline": 1, "data": 1, "graph": 1, axis: wrong}
    with pytest.raises(ValueError, match=f"{axis}_size={wrong!r}; expected a positive number"):
        MeshShape.resolve(**sizes, world_size=1)  # type: ignore[arg-type]


def test_graph_size_has_no_auto() -> None:
    with pytest.raises(ValueError, match=r"graph_size='auto'; expected a positive number$"):
        MeshShape.resolve(1, 1, "auto", 1)  # type: ignore[arg-type]


@given(SIZE, SIZE, SIZE)
def test_coordinates_and_rank_are_inverse(pipeline: int, data: int, graph: int) -> None:
    shape = MeshShape(pipeline, data, graph)
    indices = [shape.coordinates(r) for r in range(shape.size)]
    assert [shape.rank(*p) for p in indices] == list(range(shape.size))
    assert indices == [(p, d, g) for p in range(pipeline) for d in range(data) for g in range(graph)]


def test_groups(pool: RankPool) -> None:
    first, second, third, fourth = pool.run(inspect_mesh, 2, 2)
    assert [r["indices"] for r in (first, second, third, fourth)] == [(0, 0, 0), (0, 1, 0), (1, 0, 0), (1, 1, 0)]
    for rank, (found, pipeline, replicas) in enumerate(
        ((first, [0, 2], [0, 1]), (second, [1, 3], [0, 1]), (third, [0, 2], [2, 3]), (fourth, [1, 3], [2, 3]))
    ):
        assert found["pipeline_ranks"] == pipeline
        assert all(found[name] == pipeline for name in ("pipeline", "down", "up", "control"))
        assert found["data"] == replicas
        assert found["alone"] == [rank]


def test_a_group_as_the_world(pool: RankPool) -> None:
    for rank, found in enumerate(pool.run(use_groups_as_world)):
        replicas = 1.0 + 10.0 if rank < 2 else 100.0 + 1000.0
        everyone = (4, 1111.0)
        assert found["before"] == found["after"] == found["after an error"] == found["none"] == everyone
        assert found["data"] == found["data again"] == (2, replicas)
        assert found["alone"] == (1, float(10**rank))
        assert found["error"] == ("in the user's step",)
