"""Cuts fall on layer borders, balance the work, and own every operation once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import cut_models
import pytest
import tiny
import torch
from capture_models import Potential, Step, Traced, assert_parity, make_batch, structures_of
from torch import Tensor, nn

from lightning_januspipe.capture.cut.cut import Profile, find_cut
from lightning_januspipe.errors import CaptureError, TooFewParts


@pytest.fixture(scope="module")
def reference() -> Iterator[Traced]:
    """The reference potential with four layers."""
    dtype = torch.get_default_dtype()
    module = Step(tiny.module(4).potential)
    yield Traced(module, structures_of(tiny.data(8), 3))
    torch.set_default_dtype(dtype)


@pytest.fixture(scope="module")
def four_layers() -> Traced:
    return Traced(Step(Potential(4)))


def atoms_symbol(traced: Traced) -> int | str:
    place = traced.format.tensors.index("args[0]['positions']")
    spec = traced.program.by_name[traced.program.inputs[place]].spec
    assert spec is not None and isinstance(spec.shape[0], str)
    return spec.shape[0]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_boundaries_of_the_reference_potential_are_per_atom(reference: Traced, num_stages: int) -> None:
    cut = reference.cut(num_stages).cut
    assert cut.num_stages == num_stages
    assert len(cut.boundaries) == len(cut.boundary_bytes) == num_stages - 1
    for names in cut.boundaries:
        specs = [reference.program.by_name[n].spec for n in names]
        assert specs
        for spec in specs:
            assert spec is not None
            assert [s for s in spec.shape if isinstance(s, str)] == [atoms_symbol(reference)]


@pytest.mark.parametrize("num_stages", [2, 3, 4])
def test_work_is_balanced(reference: Traced, num_stages: int) -> None:
    costs = reference.cut(num_stages).cut.costs
    mean = sum(costs) / num_stages
    assert max(costs) < 1.35 * mean
    assert min(costs) > 0.5 * mean


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_every_operation_has_one_owner(reference: Traced, num_stages: int) -> None:
    captured = reference.cut(num_stages)
    cut, body = captured.cut, captured.regions.body
    order = [n for names in cut.bodies for n in names]
    assert sorted(order) == sorted(body)
    place = {name: i for i, name in enumerate(order)}
    for name in order:
        assert all(place[i] < place[name] for i in reference.program.by_name[name].inputs() if i in place)
    for stage, names in enumerate(cut.replicated):
        owned_before = {n for b in cut.bodies[:stage] for n in b}
        assert set(names) <= owned_before
        assert not set(names) & set(cut.boundaries[stage - 1] if stage else [])
    for stage, names in enumerate(cut.boundaries):
        assert set(names) <= {n for b in cut.bodies[: stage + 1] for n in b}


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_stages_of_the_reference_potential_train_right(reference: Traced, num_stages: int) -> None:
    for count in (1, 2, 5):
        assert_parity(reference.cut(num_stages), reference.module, structures_of(tiny.data(8), count))


def test_geometry_depends_on_no_parameter(four_layers: Traced) -> None:
    program, regions = four_layers.program, four_layers.regions
    assert not set(regions.body) & set(regions.geometry)
    reached = set(program.parameters)
    for node in program.nodes:
        if node.op != "placeholder" and reached & set(node.inputs()):
            reached.add(node.name)
    assert set(regions.body) <= reached
    assert not set(regions.geometry) & reached
    distances = [n for n in regions.geometry if program.by_name[n].target == "aten.sqrt.default"]
    assert len(distances) == 1


def test_cut_follows_the_costs(four_layers: Traced) -> None:
    traced = four_layers
    body = traced.regions.body
    heavy_start = dict(traced.profile.seconds) | dict.fromkeys(body[: len(body) // 3], 1e-5)
    heavy_end = dict(traced.profile.seconds) | dict.fromkeys(body[-len(body) // 3 :], 1e-5)
    sizes = []
    for seconds in (heavy_start, traced.profile.seconds, heavy_end):
        cut = find_cut(traced.program, traced.regions, Profile(seconds, traced.profile.num_bytes), 2)
        assert max(cut.costs) < 0.75 * sum(cut.costs)
        sizes.append(len(cut.bodies[0]))
    assert sizes[0] < sizes[1] < sizes[2]


def test_wide_values_are_not_sent(four_layers: Traced) -> None:
    """Inside a layer there are messages per edge; with many edges no cut goes there."""
    traced = four_layers
    edges = traced.program.by_name[traced.program.inputs[traced.format.tensors.index("args[0]['edges']")]].spec
    assert edges is not None
    per_edge = {n.name for n in traced.program.nodes if n.spec and edges.shape[1] in n.spec.shape}
    num_bytes = {n: 20 * b if n in per_edge else b for n, b in traced.profile.num_bytes.items()}
    assert per_edge & set(traced.regions.body)
    for num_stages in (2, 3, 4):
        cut = find_cut(traced.program, traced.regions, Profile(traced.profile.seconds, num_bytes), num_stages)
        assert not {n for names in cut.boundaries for n in names} & per_edge


@pytest.mark.parametrize("num_stages", [40, 100])
def test_too_many_stages(four_layers: Traced, num_stages: int) -> None:
    with pytest.raises(CaptureError, match=rf"pipeline_size={num_stages}, .* has only \d+ cuttable") as e:
        four_layers.cut(num_stages)
    most = int(re.findall(r"pipeline_size=(\d+) or less", str(e.value))[0])
    assert 4 <= most < 40
    assert four_layers.cut(most).cut.num_stages == most


def test_parts_without_work_are_none(four_layers: Traced) -> None:
    """Where one operation is nearly all of the work, a second stage would be idle."""
    traced = four_layers
    middle = traced.regions.body[len(traced.regions.body) // 2]
    num_bytes = {name: size * (10**6 if name == middle else 1) for name, size in traced.profile.num_bytes.items()}
    with pytest.raises(CaptureError, match=r"pipeline_size=3, .* only \d cuttable part\(s\) of comparable cost") as e:
        find_cut(traced.program, traced.regions, Profile(traced.profile.seconds, num_bytes), 3)
    assert isinstance(e.value, TooFewParts) and e.value.most < 3


def test_one_layer_has_few_parts() -> None:
    class Linear(Potential):
        def features(self, batch: Any, vectors: Tensor) -> Tensor:
            distance = vectors.square().sum(-1, keepdim=True)
            return torch.zeros(batch["species"].shape[0], 6, dtype=vectors.dtype).index_add(
                0, batch["edges"][0], torch.cat([distance, vectors, distance * distance, vectors[:, :1]], 1)
            )

    traced = Traced(Step(Linear(0)))
    with pytest.raises(CaptureError, match=r"pipeline_size=9, but the potential has only \d cuttable"):
        traced.cut(9)


class Embedded(Potential):
    """The type embedding is read by every layer."""

    def features(self, batch: Any, vectors: Tensor) -> Tensor:
        radial = torch.exp(-vectors.square().sum(-1, keepdim=True) / torch.arange(1, 5, dtype=vectors.dtype))
        h = self.embedding(batch["species"])
        for layer in self.layers:
            h = layer(h, radial, batch["edges"]) * self.embedding(batch["species"]) + h
        return h


@pytest.mark.parametrize(
    ("potential", "shared"),
    [
        (Potential(4, share_filter=True), "layers.0.filter.0.weight"),
        (Embedded(4), "embedding.weight"),
    ],
    ids=["filter", "embedding"],
)
def test_shared_parameters(potential: nn.Module, shared: str) -> None:
    traced = Traced(Step(potential))
    for num_stages in (2, 3, 4):
        captured = traced.cut(num_stages)
        stages = captured.parameter_stages()
        assert stages[shared] == set(range(num_stages))
        assert stages["readout.weight"] == {num_stages - 1}
        assert_parity(captured, traced.module, make_batch((3, 1, 4)))


class EmbeddedOnce(Potential):
    """One embedding of the atoms, alive until the last layer."""

    def features(self, batch: Any, vectors: Tensor) -> Tensor:
        radial = torch.exp(-vectors.square().sum(-1, keepdim=True) / torch.arange(1, 5, dtype=vectors.dtype))
        h = types = self.embedding(batch["species"])
        for layer in self.layers:
            h = layer(h, radial, batch["edges"]) * types + h
        return h


class Broadened(EmbeddedOnce):
    """The embedding is made by much work from few numbers: it is sent."""

    def __init__(self, num_layers: int = 3, hidden: int = 400) -> None:
        super().__init__(num_layers)
        width, dtype = self.embedding.embedding_dim, self.embedding.weight.dtype
        first, last = nn.Linear(width, hidden, dtype=dtype), nn.Linear(hidden, width, dtype=dtype)
        self.embedding = nn.Sequential(self.embedding, first, nn.Tanh(), last)


@pytest.mark.parametrize(("potential", "is_sent"), [(EmbeddedOnce, False), (Broadened, True)])
def test_cheap_values_are_computed_again_instead_of_sent(potential: type[Potential], is_sent: bool) -> None:
    traced = Traced(Step(potential(4)))
    captured = traced.cut(3)
    stages = [s for name, s in captured.parameter_stages().items() if name.startswith("embedding")]
    assert all(found == ({0} if is_sent else {0, 1, 2}) for found in stages)
    assert [bool(again) for again in captured.cut.replicated] == ([False] * 3 if is_sent else [False, True, True])
    assert_parity(captured, traced.module, make_batch((3, 1, 4)))


@pytest.mark.parametrize(
    "potential",
    [
        lambda: cut_models.SharedFilters(how="split"),
        lambda: cut_models.SharedFilters(how="slice"),
        lambda: cut_models.SharedFilters(how="chunk", hidden=False),
        cut_models.WholeFilter,
        cut_models.LearnableBasis,
        cut_models.Dense,
        cut_models.LateReadouts,
        cut_models.LongReadout,
        cut_models.AtomNetwork,
    ],
)
def test_features_of_edges_are_not_sent(potential: Callable[[], Potential]) -> None:
    """Trainables that all layers share are on every stage, with what is made of them for the edges."""
    traced = cut_models.traced(potential())
    captured = traced.cut(3)
    for names in captured.cut.boundaries:
        for spec in (traced.program.by_name[n].spec for n in names):
            assert spec is not None and [s for s in spec.shape if isinstance(s, str)] == [atoms_symbol(traced)]
    assert_parity(captured, traced.module, make_batch((3, 1, 4)))


def test_features_of_edges_that_layers_update_are_sent() -> None:
    traced = cut_models.traced(cut_models.EdgeFeatures(3))
    captured = traced.cut(3)
    assert not any(captured.cut.replicated)
    assert_parity(captured, traced.module, make_batch((3, 1, 4)))


@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_derivative_with_respect_to_a_learned_value() -> None:
    class Learned(Potential):
        def energy(self, batch: Any, positions: Tensor, strain: Tensor) -> Any:
            self.moved = positions + self.embedding(batch["species"])[:, :3]
            return super().energy(batch, self.moved, strain)

        def differentiate(self, energy: Tensor, inputs: list[Tensor]) -> Any:
            return super().differentiate(energy, [self.moved, inputs[1]])

    with pytest.raises(CaptureError, match="depends on a parameter; forces have to be derivatives"):
        Traced(Step(Learned(1)))
