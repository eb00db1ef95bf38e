"""Adapters of other projects: found by their entry points, and used for what tracing cannot do by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_models import GraphsAdapter, GraphsPotential, GraphsStep, make_graphs
from capture_models import TRACED, Potential, Step, Traced, assert_parity, make_batch

from lightning_januspipe.capture.adapters import Adapter, adapted, adapters_of, capture_adapter, joined, separated
from lightning_januspipe.capture.capture import capture_module
from lightning_januspipe.capture.find.find_potential import find_potential
from lightning_januspipe.errors import CaptureError

Register = Callable[..., None]


@pytest.fixture
def register(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Installs a package that registers adapters, given as ``package="module:Class"``."""

    def install(**places: str) -> None:
        folder = tmp_path / "a_project-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: a-project\nVersion: 1.0\n")
        lines = [f"{name.replace('__', '.')} = {place}" for name, place in places.items()]
        (folder / "entry_points.txt").write_text("\n".join([f"[{capture_adapter.GROUP}]", *lines, ""]))
        monkeypatch.syspath_prepend(tmp_path)

    return install


def test_list_of_graphs(register: Register) -> None:
    module = GraphsStep(GraphsPotential(3))
    register(adapter_models="adapter_models:GraphsAdapter")
    traced = Traced(module, make_graphs(TRACED))
    assert isinstance(adapters_of(traced.potential)[0], GraphsAdapter)
    for sizes in ((3, 4), (5,), (1, 2, 6, 3)):
        assert_parity(traced.cut(2), module, make_graphs(sizes))


def test_what_the_step_reads_is_counted_in_joined_outputs(register: Register) -> None:
    module = GraphsStep(GraphsPotential(2))
    graphs = make_graphs(TRACED)
    places = len(graphs) + 1  # charges of each structure come before the energies
    assert find_potential(module, module.training_step, graphs).read_outputs == (
        len(graphs),
        *range(places, 2 * places - 1),
    )
    register(adapter_models="adapter_models:GraphsAdapter")
    assert find_potential(module, module.training_step, graphs).read_outputs == (1, 2)
    traced = Traced(module, graphs)
    assert traced.regions.outputs == [1, 2], "charges, with twelve numbers for each atom, are not kept for nothing"


def test_adapters_know_the_number_of_graph_ranks(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    module, seen = GraphsStep(GraphsPotential(1)), []
    register(adapter_models="adapter_models:GraphsAdapter")
    tracing = GraphsAdapter.tracing
    monkeypatch.setattr(GraphsAdapter, "tracing", lambda self, p: seen.append(self.graph_size) or tracing(self, p))
    for size in (1, 2):
        batches = make_graphs(TRACED), make_graphs((3, 3, 4))
        capture_module(module, module.training_step, *batches, [(0,)], graph_size=size)
    assert set(seen) == {1, 2} and seen == sorted(seen)


def test_without_an_adapter_a_list_is_refused() -> None:
    module = GraphsStep(GraphsPotential(1))
    with pytest.raises(CaptureError, match="a loop over structures, or over atoms or edges, in Python"):
        Traced(module, make_graphs(TRACED))


def test_an_adapter_whose_outputs_do_not_come_back_is_refused(register: Register) -> None:
    module = GraphsStep(GraphsPotential(1))
    register(adapter_models="adapter_models:Reversing")
    with pytest.raises(CaptureError, match=r"'forces'\]\[0\] is another value after joined\(\) and separated\(\)"):
        capture_module(module, module.training_step, make_graphs(TRACED), make_graphs((3, 3, 4)), [(0,)])


@pytest.mark.parametrize(
    ("place", "words"),
    [
        (
            "adapter_models:Missing",
            r"'adapter_models:Missing' .* for 'adapter_models' cannot be loaded: AttributeError",
        ),
        ("no_such_module:Some", "cannot be loaded: ModuleNotFoundError.*Repair or uninstall"),
        ("adapter_models:Unfinished", "cannot be loaded: RuntimeError: needs a licence"),
        (
            "adapter_models:NoAdapter",
            "is a NoAdapter; expected a subclass of lightning_januspipe.capture.adapters.Adapt",
        ),
    ],
)
def test_adapters_that_cannot_be_used(register: Register, place: str, words: str) -> None:
    register(adapter_models=place)
    with pytest.raises(CaptureError, match=words):
        adapters_of(GraphsPotential(1))


def test_only_adapters_of_the_potentials_packages_are_loaded(register: Register) -> None:
    register(adapter="no:One", adapter_model="no:Two", adapter_models__graphs="no:Three", other="no:Four")
    assert adapters_of(GraphsPotential(1)) == []
    assert adapters_of(Potential(1)) == []


def test_parts_of_a_potential_and_their_bases_count(register: Register) -> None:
    class Derived(GraphsPotential):
        pass

    Derived.__module__ = "somewhere_else"
    register(adapter_models="adapter_models:GraphsAdapter")
    assert [type(a) for a in adapters_of(Step(Derived(1)))] == [GraphsAdapter]


def test_registered_ones_replace_built_in_ones(register: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    built_in = {"adapter_models": "no_such_module:Some", "capture_models": "adapter_models:Reversing"}
    monkeypatch.setattr(capture_adapter, "BUILT_IN", built_in)
    register(adapter_models="adapter_models:GraphsAdapter")
    assert [type(a).__name__ for a in adapters_of(GraphsPotential(1))] == ["GraphsAdapter", "Reversing"]
    assert [type(a).__name__ for a in adapters_of(Potential(1))] == ["Reversing"]


def test_several_adapters_are_undone_in_the_other_order() -> None:
    class Scaling(Adapter):
        def arguments(self, potential: Any, args: Any, kwargs: Any) -> Any:
            return (args[0] * 2,), kwargs

        def joined(self, potential: Any, returned: Any) -> Any:
            return returned * 2

        def separated(self, potential: Any, args: Any, kwargs: Any, returned: Any) -> Any:
            assert args == (5,) and kwargs == {"a": 1}
            return returned / 2

    class Shifting(Adapter):
        def arguments(self, potential: Any, args: Any, kwargs: Any) -> Any:
            return (args[0] + 1,), {"a": 2}

        def joined(self, potential: Any, returned: Any) -> Any:
            return returned + 1

        def separated(self, potential: Any, args: Any, kwargs: Any, returned: Any) -> Any:
            return returned - 1

    both, module = [Scaling(), Shifting()], torch.nn.Identity()
    assert adapted(both, module, (5,), {"a": 1}) == ((11,), {"a": 2})
    assert joined(both, module, 5) == 11
    assert separated(both, module, (5,), {"a": 1}, 11) == 5
    nothing = Adapter()
    assert adapted([nothing], module, (5,), {}) == ((5,), {}) and nothing.joined(module, both) is both


def test_potentials_without_adapters_are_as_before() -> None:
    module = Step(Potential(1))
    assert adapters_of(module) == []
    assert find_potential(module, module.training_step, make_batch(TRACED)).read_outputs == (0, 1, 2)
