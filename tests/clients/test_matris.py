"""MatRIS in an ordinary LightningModule, trained in a pipeline, and its adapter on what its graphs may be.

Slow, and skipped where MatRIS is absent:

    pip install matris==0.1.0 && python -m pytest -m slow tests/clients/test_matris.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from capture_models import Step, assert_parity
from factories import data_of, module_of
from torch import Tensor, nn

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.capture import capture_module
from lightning_januspipe.errors import CaptureError

from .calculator_checks import boxed, check_calculator
from .compare import THREE_STAGES, TWO_STAGES, ClientConformance, assert_same, client_marks, pipeline, train

pytestmark = client_marks("matris")

PROGRAM = "matris_program.py"


def test_whole_batches(tmp_path: Path) -> None:
    """With validation."""
    reference = train(PROGRAM, tmp_path, "plain", "--structures", "mixed")
    assert_same(
        reference,
        train(PROGRAM, tmp_path, "pipeline", "--structures", "mixed", "--strategy", "januspipe", *pipeline(1)),
    )


def test_microbatches_are_accumulation(tmp_path: Path) -> None:
    common = ["--structures", "mixed"]
    reference = train(PROGRAM, tmp_path, "plain", *common, "--batch-size", "1", "--accumulate", "4")
    found = train(PROGRAM, tmp_path, "pipeline", *common, "--strategy", "januspipe", *pipeline(4))
    assert_same(reference, found, losses=False)  # those of single structures there, of batches here


class TestMatRIS(ClientConformance):
    """Attention over line graphs."""

    make_module = module_of("matris_program")
    datamodules = {kind: data_of("matris_program", "--structures", kind) for kind in ("periodic", "molecules", "mixed")}


class TestFourLayers(ClientConformance):
    make_module = module_of("matris_program", "--layers", "4")
    datamodules = {"periodic": data_of("matris_program")}
    strategies = THREE_STAGES


class TestBatchesOfOneAtom(ClientConformance):
    test_structures_differ_in_size = None  # they do not
    make_module = module_of("matris_program")
    datamodules = {"single": data_of("matris_program", "--structures", "single", "--batch-size", "1")}
    strategies = TWO_STAGES


# -- the adapter, in this process -------------------------------------------------------------------------------------


@pytest.fixture
def _double() -> Iterator[None]:
    """MatRIS's graphs in float64."""
    from matris.graph import converter

    before = converter.datatype
    converter.datatype = torch.float64
    torch.set_default_dtype(torch.float64)
    yield
    converter.datatype = before


def small(**arguments: Any) -> Any:
    """Returns a MatRIS of one layer."""
    from matris.model.model import MatRIS

    torch.manual_seed(0)
    width = {f"{part}_feat_dim": 6 for part in ("node", "edge", "three_body")}
    cutoffs = {"pairwise_cutoff": 5.0, "three_body_cutoff": 3.2}
    return MatRIS(**{"num_layers": 1, "mlp_hidden_dims": (6, 6), **width, **cutoffs, **arguments}).double()


@dataclass
class Graphs:
    """Makes graphs; potassium's atoms are too far apart for an angle."""

    converter: Callable[..., Any]
    seed: int = 0

    def __call__(self, *names: str) -> list[Any]:
        return [self.one(name) for name in names]

    def one(self, name: str) -> Any:
        from matris.graph import RadiusGraph
        from pymatgen.io.ase import AseAtomsAdaptor

        if name == "lone":
            none = torch.zeros(0, dtype=torch.int32)
            atoms = torch.tensor([29], dtype=torch.int32), torch.zeros(1, 3), 12.0 * torch.eye(3), torch.zeros(0, 3)
            return RadiusGraph(None, None, "Cu1", *atoms, none.reshape(0, 2), 5.0, none, 3.2, none, none)
        self.seed += 1
        rng = np.random.default_rng(self.seed)
        atoms: Atoms = bulk(name.rstrip("2"), cubic=True) * ((2, 1, 1) if name.endswith("2") else (1, 1, 1))
        atoms.rattle(0.05, rng=rng)
        atoms.set_cell(atoms.cell + 0.05 * rng.standard_normal((3, 3)), scale_atoms=True)
        return self.converter(AseAtomsAdaptor.get_structure(atoms))


class Training(Step):
    """A loss of all that MatRIS returns."""

    def __init__(self, model: nn.Module, task: str = "efsm") -> None:
        super().__init__(model)
        self.task = task

    def training_step(self, batch: Any) -> Tensor:
        out = self.potential(batch, self.task, True)
        values = [out["e"], *(x for key in "fsm" if key in out for x in out[key])]
        targets = [torch.linspace(0, 1, x.numel()).reshape(x.shape) for x in values]
        return sum((((x - t) ** 2).mean() for x, t in zip(values, targets, strict=True)), torch.zeros(()))


def captured(module: nn.Module, traced: Any, other: Any, num_stages: int = 2, potential: str | None = None) -> Any:
    return capture_module(module, module.training_step, traced, other, [tuple(range(num_stages))], potential).potential


def changed_state(model: nn.Module) -> dict[str, Any]:
    """Returns what capture replaces for a while."""
    from matris.model import functions, interaction_block, reference_energy
    from matris.model import model as main

    names = {n: vars(m) for m in (functions, interaction_block, main, reference_energy) for n in [m.__name__]}
    forwards = {n: "forward" in vars(m) for n, m in model.named_modules()}
    return {"modules": {n: dict(v) for n, v in names.items()}, "forwards": forwards}


@pytest.mark.usefixtures("_double")
def test_batched_graphs_are_those_of_matris() -> None:
    from matris.model.processgraph import process_graphs

    from lightning_januspipe.capture.adapters.matris import batched, process

    graphs = Graphs(small().graph_converter)("Cu2", "K", "lone", "Al")
    for stress in (True, False):
        expected, found = process_graphs(graphs, stress), process(batched(graphs), stress)
        for name in ("edge_lengths", "unit_edge_vectors", "volumes", "batch_cart_coords", "lattice", "atom_segment"):
            torch.testing.assert_close(found[name], expected[name], rtol=1e-14, atol=1e-14)
        for name in ("atomic_numbers", "directed2undirected", "undirected2directed"):
            assert torch.equal(found[name], expected[name])
        for part in ("atom_graph_dict", "line_graph_dict"):
            of_matris = expected[part]
            assert found[part].keys() - of_matris.keys() <= {"has_angles"}
            assert of_matris.keys() - found[part].keys() <= {"atom_graph", "num_segment"}
            for name in found[part].keys() & of_matris.keys() - {"line_graph"}:
                ours, theirs = found[part][name], of_matris[name]
                padding = ours[len(theirs) :] if "bincount" in name else ours[:0]
                assert torch.equal(ours[: len(ours) - len(padding)], theirs) and bool((padding == 1).all())


@pytest.mark.usefixtures("_double")
def test_graphs_without_angles_and_without_edges() -> None:
    module = Training(small(num_layers=2))
    graphs = Graphs(module.potential.graph_converter)
    before = changed_state(module)
    found = captured(module, graphs("Cu", "Al"), graphs("Al2", "K", "Ni"))
    assert changed_state(module) == before, "the live model and MatRIS are as they were"
    for names in (["Cu", "lone", "Ni"], ["K", "K2"], ["K"], ["K", "lone"], ["Cu2"]):
        assert_parity(found, module, graphs(*names))


@pytest.mark.usefixtures("_double")
def test_traced_without_angles() -> None:
    module = Training(small(), task="efs")
    graphs = Graphs(module.potential.graph_converter)
    found = captured(module, graphs("K2", "K"), graphs("K"))
    assert_parity(found, module, graphs("Cu", "K"))


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(
    ("arguments", "task"),
    [
        ({"three_body_expansion": "fourier", "distance_expansion": "gaussian", "is_intensive": False}, "ef"),
        ({"graph_conv_mlp": "mlp", "norm_type": "layer", "use_smoothed_for_delta_edge": True}, "efsm"),
        ({"reference_energy": "mptrj", "learnable_basis": False}, "efsm"),
    ],
)
def test_options(arguments: dict[str, Any], task: str) -> None:
    module = Training(small(**arguments), task)
    if module.potential.reference_energy is not None:  # its compositions are in float32, whatever the rest
        module.potential.reference_energy.float()
    graphs = Graphs(module.potential.graph_converter)
    found = captured(module, graphs("Cu", "Al"), graphs("Ni2", "K", "Al"))
    assert_parity(found, module, graphs("Cu", "Al2", "Ni", "K"))


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"norm_type": "batch"}, "updates buffers in its forward"), ({"dropout": 0.1}, "draws random numbers")],
)
def test_options_that_no_pipeline_can_have(arguments: dict[str, Any], words: str) -> None:
    module = Training(small(**arguments))
    graphs = Graphs(module.potential.graph_converter)
    with pytest.raises(CaptureError, match=words):
        captured(module, graphs("Cu", "Al"), graphs("Ni2", "K", "Al"))


class Wrapper(nn.Module):
    """Passes graphs on."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, graphs: Any, task: str, is_training: bool) -> Any:
        return self.net(graphs, task=task, is_training=is_training)


@pytest.mark.usefixtures("_double")
def test_matris_within_another_module_has_to_be_named() -> None:
    module = Training(Wrapper(small()))
    graphs = Graphs(module.potential.net.graph_converter)
    traced, other = graphs("Cu", "Al"), graphs("Ni2", "K", "Al")
    with pytest.raises(CaptureError, match=r"Wrapper passes graphs.*JanusPipeStrategy\(potential=.*ends in 'net'"):
        captured(module, traced, other)
    found = captured(module, traced, other, potential="potential.net")
    assert_parity(found, module, graphs("Cu"))


@pytest.mark.usefixtures("_double")
def test_many_angles_are_no_limit() -> None:
    """MatRIS checkpoints its layers where there are many angles, which is a branch on their number."""
    from matris.model import interaction_block

    module = Training(small())
    graphs = Graphs(module.potential.graph_converter)
    few, many = graphs("K", "Al"), graphs("Cu2", "Ni2", "Cu2")
    threshold, interaction_block.THRESHOLD_VALUE = interaction_block.THRESHOLD_VALUE, 1000
    try:
        assert few[1].line_graph.shape[0] < 1000 < sum(g.line_graph.shape[0] for g in many)
        assert_parity(captured(module, few, many, num_stages=1), module, many)
    finally:
        interaction_block.THRESHOLD_VALUE = threshold


@pytest.mark.usefixtures("_double")
@pytest.mark.parametrize("intensive", [True, False])
def test_calculator(intensive: bool) -> None:
    """MatRIS's own graphs and forward; its calculator of ASE loads published models only."""
    from pymatgen.io.ase import AseAtomsAdaptor

    model = small(is_intensive=intensive).eval()

    def own(atoms: Atoms) -> dict[str, Any]:
        out = model([model.graph_converter(AseAtomsAdaptor.get_structure(boxed(atoms)))], task="efs")
        energy, forces, stress = (out[name][0].detach().numpy() for name in "efs")
        return {
            "energy": energy * (len(atoms) if intensive else 1),
            "forces": forces,
            "stress": stress * units.GPa,
        }

    check_calculator(nn.Sequential(model), own, unknown="Am", lone=False, compiles=True)
    atom = Atoms("Cu", calculator=JanusPipeCalculator(model))
    with pytest.raises(ValueError, match=r"no two of its 1 atoms are within 5.0 Å.* MatRIS has no energy"):
        atom.get_potential_energy()
