"""What a cut sends and repeats is told in atoms, edges and structures, and agrees with the sizes of the tensors."""

from __future__ import annotations

import math

import pytest
from capture_models import OTHER, TRACED, Potential, Step, Traced, make_batch
from cut_models import AtomNetwork, Dense, EdgeFeatures, LateReadouts, LearnableBasis, SharedFilters, traced
from explicit_models import SelfDividing

from lightning_januspipe.capture import capture_module
from lightning_januspipe.capture.report import Boundary, Sent, describe_boundaries, report, summary


@pytest.fixture(scope="module")
def shared_filters() -> Traced:
    return traced(SharedFilters(3))


def test_numbers_are_those_of_the_example_batch(shared_filters: Traced) -> None:
    captured = shared_filters.cut(3)
    found = report(captured, shared_filters.profile)
    num_atoms = 15
    assert len(found.boundaries) == 2 and len(found.repeated) == 3
    for boundary, names, num_bytes in zip(
        found.boundaries, captured.cut.boundaries, captured.cut.boundary_bytes, strict=True
    ):
        assert [tensor.name for tensor in boundary.tensors] == names
        assert list(boundary.bytes_per) == ["atom"]
        assert num_atoms * boundary.bytes_per["atom"] == num_bytes
        assert all(tensor.shape.count("atoms") == 1 for tensor in boundary.tensors)
        assert str(boundary) == f"{num_bytes // num_atoms} B per atom"
    assert summary(captured) == "boundaries of 48 B per atom"
    assert found.defined == {"edge": "args[0]['edges']"}


def test_what_is_computed_again(shared_filters: Traced) -> None:
    captured = shared_filters.cut(3)
    found = report(captured, shared_filters.profile)
    for stage, repeated in enumerate(found.repeated):
        assert repeated.again == len(captured.cut.replicated[stage])
        assert (repeated.again > 0) == (stage > 0)
        assert repeated.geometry > 20  # vectors, distances, radial functions
        assert [value.per for value in repeated.values] == (["edge"] if stage else [])
        assert repeated.geometry_share is not None and repeated.again_share is not None
        assert 0 <= repeated.geometry_share + repeated.again_share < 1
    shared = {parameter.name: parameter for parameter in found.shared}
    assert set(shared) == {f"filters.{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")}
    assert all(parameter.stages == (0, 1, 2) for parameter in found.shared)
    assert shared["filters.0.weight"].reason == "(edges, 6) is computed where needed"
    assert shared["filters.2.weight"].reason == "used by layers of these stages"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ([{"atom": 512}], "a boundary of 512 B per atom"),
        ([{"atom": 1024}] * 3, "boundaries of 1,024 B per atom"),
        ([{"atom": 256}, {"atom": 768}, {"atom": 768}], "boundaries of 256 B per atom, 768 B per atom, 768 B per atom"),
        ([{"atom": 512}, {"structure": 8}], "boundaries of 512 B per atom, 8 B per structure"),
        (
            [{"atom": 8, "edge": 4}, {"atom": 16, "edge": 4}, {"atom": 8}],
            "boundaries of 8 B per atom + 4 B per edge, 16 B per atom + 4 B per edge, 8 B per atom",
        ),
        ([], "no boundary"),
    ],
)
def test_boundaries_in_a_few_words(sizes: list[dict[str, int]], words: str) -> None:
    boundaries = [Boundary(tuple(Sent("h", (what,), "float64", what, n) for what, n in b.items())) for b in sizes]
    assert describe_boundaries(boundaries) == words


def test_features_of_edges() -> None:
    found = traced(EdgeFeatures(3))
    for boundary in report(found.cut(3)).boundaries:
        assert set(boundary.bytes_per) == {"atom", "edge"}
        assert "B per atom + " in str(boundary)
    assert "B per edge" in summary(found.cut(3))


@pytest.mark.parametrize("potential", [LearnableBasis, Dense, LateReadouts, AtomNetwork])
def test_other_sizes_are_words_too(potential: type[Potential]) -> None:
    captured = traced(potential()).cut(2)
    (boundary,) = report(captured).boundaries
    assert list(boundary.bytes_per) == ["atom"]
    for tensor in boundary.tensors:
        assert {size for size in tensor.shape if isinstance(size, str)} == {"atoms"}
        constant = math.prod(size for size in tensor.shape if isinstance(size, int))
        assert tensor.num_bytes == 8 * constant and tensor.dtype == "float64"


def test_one_stage_sends_nothing(shared_filters: Traced) -> None:
    found = report(shared_filters.cut(1))
    assert found.boundaries == () and found.shared == () and found.repeated[0].again == 0
    assert summary(shared_filters.cut(1)) == "no boundary"


def test_report_for_json(shared_filters: Traced) -> None:
    content = report(shared_filters.cut(2)).to_dict()
    assert content["boundaries"][0]["bytes_per"] == {"atom": 96}
    assert content["repeated"][1]["values"][0]["shape"] == ("edges", 6)
    assert content["shared_parameters"][0]["stages"] == (0, 1)
    assert content["repeated"][0]["geometry_share"] is None  # not measured


def test_stages_of_a_potentials_own() -> None:
    module = Step(SelfDividing())
    found = capture_module(module, module.training_step, make_batch(TRACED), make_batch(OTHER), [[0, 1, 2, 3, 4]])
    told = report(found.potential)
    assert [list(boundary.bytes_per) for boundary in told.boundaries] == [["atom"]] * 4
    assert told.repeated == ()
    assert {parameter.name for parameter in told.shared} >= {"parts.0.table.weight", "parts.1.filters.0.weight"}
    assert all(len(parameter.stages) > 1 for parameter in told.shared)
