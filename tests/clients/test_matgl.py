"""MatGL's PotentialLightningModule over TensorNet, M3GNet and CHGNet, unmodified, trained in a pipeline.

Slow, and skipped where MatGL is absent:

    pip install matgl==4.1.2 && python -m pytest -m slow tests/clients/test_matgl.py
"""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_models import assert_parity
from factories import data_of, module_of
from torch import nn

from lightning_januspipe.capture import capture_module
from lightning_januspipe.errors import CaptureError

from .calculator_checks import check_calculator
from .compare import THREE_STAGES, TWO_STAGES, ClientConformance, assert_same, client_marks, pipeline, train

pytestmark = client_marks("matgl")

PROGRAM = "matgl_program.py"
MODELS = ["tensornet", "m3gnet", "chgnet"]


@pytest.mark.parametrize("model", MODELS)
def test_whole_batches(model: str, tmp_path: Path) -> None:
    common = ["--model", model, "--validate", "--steps", "6"]  # one epoch
    reference = train(PROGRAM, tmp_path, "plain", *common)
    found = train(PROGRAM, tmp_path, "pipeline", *common, "--strategy", "januspipe", *pipeline(1))
    assert_same(reference, found)
    expected, metrics = (torch.load(p, weights_only=False)["metrics"] for p in (reference, found))
    assert {"train_Total_Loss", "val_Total_Loss"} <= expected.keys()
    assert metrics == pytest.approx(expected, rel=1e-9)


def test_microbatches_are_accumulation(tmp_path: Path) -> None:
    common = ["--structures", "mixed", "--lone-atom"]
    reference = train(PROGRAM, tmp_path, "plain", *common, "--batch-size", "1", "--accumulate", "4")
    found = train(PROGRAM, tmp_path, "pipeline", *common, "--strategy", "januspipe", *pipeline(4))
    assert_same(reference, found, losses=False)  # those of single structures there, of batches here


class TestTensorNet(ClientConformance):
    make_module = module_of("matgl_program")
    datamodules = {
        "periodic": data_of("matgl_program"),
        "mixed": data_of("matgl_program", "--structures", "mixed", "--lone-atom"),
    }


class TestM3GNet(ClientConformance):
    """Has three-body terms."""

    make_module = module_of("matgl_program", "--model", "m3gnet")
    datamodules = {
        "periodic": data_of("matgl_program", "--model", "m3gnet"),
        "mixed": data_of("matgl_program", "--model", "m3gnet", "--structures", "mixed", "--lone-atom"),
    }


class TestCHGNet(ClientConformance):
    """Has line graphs."""

    make_module = module_of("matgl_program", "--model", "chgnet")
    datamodules = {
        "periodic": data_of("matgl_program", "--model", "chgnet"),
        "mixed": data_of("matgl_program", "--model", "chgnet", "--structures", "mixed", "--lone-atom"),
    }


class TestFourLayers(ClientConformance):
    make_module = module_of("matgl_program", "--layers", "4")
    datamodules = {"periodic": data_of("matgl_program")}
    strategies = THREE_STAGES


class TestBatchesOfOne(ClientConformance):
    make_module = module_of("matgl_program", "--model", "m3gnet")
    datamodules = {
        "molecules": data_of("matgl_program", "--model", "m3gnet", "--structures", "molecules", "--batch-size", "1")
    }
    strategies = TWO_STAGES


class Client:
    """A module of the program, and batches of its structures."""

    def __init__(self, model: str, layers: int = 3) -> None:
        arguments = {"model": model, "layers": layers, "structures": "mixed", "frames": 12, "lone_atom": True}
        program: Any = import_module("matgl_program")
        args = argparse.Namespace(**arguments, batch_size=1, loss="mse_loss")
        loader, self.module = program.make_data(args).train_dataloader(), program.make_module(args)
        self.collate, self.dataset = loader.collate_fn, loader.dataset
        self.module.log_dict = lambda *_, **__: None
        step = self.module.training_step
        self.module.training_step = lambda batch: step(batch, 0)

    def batch(self, *indices: int) -> Any:
        return self.collate([self.dataset[i] for i in indices])

    def capture(self, **options: Any) -> Any:
        """Returns the potential in two stages, traced on crystals and tried on one molecule."""
        step = self.module.training_step
        return capture_module(self.module, step, self.batch(2, 4), self.batch(1), [[0, 1]], **options).potential


ATOMS, BONDS = ("kwargs['g'].batch", 0), ("kwargs['g'].edge_index", 1)
CLOSE_BONDS, ANGLES = ("kwargs['l_g']['kept_edge_ids']", 0), ("kwargs['l_g']['line_edge_index']", 1)


@pytest.mark.parametrize(
    ("model", "allowed"), [("tensornet", []), ("m3gnet", [BONDS]), ("chgnet", [BONDS, CLOSE_BONDS, ANGLES])]
)
def test_boundaries(model: str, allowed: list[tuple[str, int]]) -> None:
    """Features of atoms alone in TensorNet; also of what else a model updates."""
    client = Client(model)
    captured = client.capture()
    symbols = {place: symbol for symbol, place in captured.program.symbols.items()}
    rows = {captured.program.by_name[n].spec.shape[0] for n in captured.cut.boundaries[0]}
    atoms, *others = (symbols[captured.call.tensors.index(name), dim] for name, dim in [ATOMS, *allowed])
    assert atoms in rows and rows <= {atoms, *others}
    for indices in ((0, 1, 2), (3,), (3, 1)):  # the fourth structure is one atom
        assert_parity(captured, client.module, client.batch(*indices))


class Wrapped(nn.Module):
    """A user's module around MatGL's Potential."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        self.inner = potential

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


@pytest.mark.parametrize("model", ["tensornet", "m3gnet"])
def test_potential_in_a_module_of_the_user(model: str) -> None:
    client = Client(model, layers=2)
    potential = client.module.model
    client.module.model = Wrapped(potential)
    client.module.model.calc_charge, client.module.model.calc_magmom = False, False
    client.module.model.calc_stresses = True
    if model == "m3gnet":
        with pytest.raises(CaptureError, match=r"Wrapped calls MatGL's Potential in its 'inner'.*ends in 'inner'"):
            client.capture()
    assert client.capture(potential="model.inner").path == "model.inner"


@pytest.mark.parametrize("model", ["tensornet", "m3gnet", "chgnet"])
def test_calculator(model: str) -> None:
    """The potential's own forward on the graphs that MatGL makes."""
    import matgl
    from matgl.ext.ase import Atoms2Graph

    module = module_of("matgl_program", "--model", model)()
    potential = module.model.eval()
    potential.data_std.fill_(1e3)  # forces of a new model are too small to be compared with finite differences
    converter = Atoms2Graph(("Al", "Cu", "Ni"), 4.0)

    def own(atoms: Any) -> dict[str, Any]:
        graph, lattice, state = converter.get_graph(atoms)
        energy, forces, stress = (v.detach().numpy() for v in potential(graph, lattice, torch.tensor(state))[:3])
        return {"energy": energy, "forces": forces, "stress": stress / matgl.apps.pes.EV_PER_ANG3_TO_GPA}

    check_calculator(module, own, compiles=True)
