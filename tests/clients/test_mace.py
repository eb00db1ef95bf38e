"""MACE with e3nn's compiled modules, in the LightningModule that a user writes, trained in a pipeline.

Slow, and skipped where MACE is absent:

    pip install mace-torch==0.3.16 && python -m pytest -m slow tests/clients/test_mace.py
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.stress import voigt_6_to_full_3x3_stress
from capture_models import assert_parity
from factories import data_of, module_of

from lightning_januspipe.capture import capture_module

from .calculator_checks import check_calculator, crystal
from .compare import (
    THREE_STAGES,
    TWO_STAGES,
    ClientConformance,
    InductorConformance,
    assert_same,
    client_marks,
    pipeline,
    train,
)

pytestmark = client_marks("mace")

PROGRAM = "mace_program.py"


@pytest.mark.parametrize("model", ["mace", "scaleshift"])
def test_whole_batches(model: str, tmp_path: Path) -> None:
    """The validation calls the model with another ``training`` than the training does."""
    common = ["--model", model, "--validate"]
    reference = train(PROGRAM, tmp_path, "plain", *common)
    assert_same(reference, train(PROGRAM, tmp_path, "pipeline", *common, "--strategy", "januspipe", *pipeline(1)))


def test_microbatches_are_accumulation(tmp_path: Path) -> None:
    """Also with clipping, and with the moving average that MACE keeps."""
    options = ["--model", "mace", "--structures", "mixed", "--clip", "10", "--ema"]
    reference = train(PROGRAM, tmp_path, "plain", *options, "--batch-size", "1", "--accumulate", "4")
    found = train(PROGRAM, tmp_path, "pipeline", *options, "--strategy", "januspipe", *pipeline(4))
    assert_same(reference, found, losses=False)  # those of single structures there, of batches here


class TestScaleShiftMACE(ClientConformance):
    make_module = module_of("mace_program")
    datamodules = {kind: data_of("mace_program", "--structures", kind) for kind in ("periodic", "molecules", "lone")}


class TestScaleShiftMACEByInductor(InductorConformance):
    make_module = module_of("mace_program")
    datamodules = {"periodic": data_of("mace_program", "--structures", "periodic")}


class TestMACE(ClientConformance):
    make_module = module_of("mace_program", "--model", "mace")
    datamodules = {"mixed": data_of("mace_program", "--structures", "mixed")}


class TestFourLayers(ClientConformance):
    make_module = module_of("mace_program", "--layers", "4")
    datamodules = {"periodic": data_of("mace_program")}
    strategies = THREE_STAGES


class TestBatchesOfOne(ClientConformance):
    make_module = module_of("mace_program")
    datamodules = {"molecules": data_of("mace_program", "--structures", "molecules", "--batch-size", "1")}
    strategies = TWO_STAGES


@pytest.fixture
def program() -> Iterator[Any]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield import_module("mace_program")
    torch.set_default_dtype(before)


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (3, {}),
        (2, {"pair_repulsion": True, "distance_transform": "Agnesi"}),
        (2, {"heads": ["first", "second"], "atomic_energies": [[3.2, 4.7, 3.5], [3.0, 4.0, 3.0]]}),
    ],
)
def test_capture(layers: int, options: dict[str, Any], program: Any) -> None:
    """Compiled modules stay what they are, and only features of atoms are sent."""
    from mace.tools.torch_geometric import Batch

    if "heads" in options:
        options = {**options, "atomic_inter_scale": [0.8, 0.9], "atomic_inter_shift": [0.1, 0.2]}
    module = program.Potential(program.model("scaleshift", layers, 2, **options))
    module.log = lambda *_, **__: None
    structures = program.dataset("mixed", 6) + program.dataset("lone", 2)
    for index, structure in enumerate(structures):
        structure.head = torch.tensor(index % len(module.model.heads))

    def batch(*indices: int) -> Any:
        return Batch.from_data_list([structures[i] for i in indices])

    step, validation = module.training_step, module.validation_step
    module.training_step = lambda batch: step(batch, 0)
    compiled = {n: m for n, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)}
    assert len(compiled) > 5
    before = module.predict(batch(1, 2))
    batches = batch(0, 1, 2), batch(4, 3)
    captured = capture_module(
        module, module.training_step, *batches, [[0, 1]], evaluation_step=lambda batch: validation(batch, 0)
    ).potential
    after = module.predict(batch(1, 2))
    assert all(torch.equal(before[name], after[name]) for name in ("energy", "forces", "stress"))
    assert {n: m for n, m in module.named_modules() if isinstance(m, torch.jit.ScriptModule)} == compiled

    (boundary,) = captured.cut.boundaries
    places = captured.call.tensors
    atoms = {s for s, (i, _) in captured.program.symbols.items() if places[i] in _OF_ATOMS}
    shapes = [captured.program.by_name[n].spec.shape for n in boundary]
    assert shapes and all(shape[0] in atoms for shape in shapes), shapes
    numbers = sum(torch.Size(shape[1:]).numel() for shape in shapes)
    assert numbers <= 120, "features (32 numbers for each atom) and messages (72), with a few more"
    for indices in ((0, 1, 2, 5), (3,), (7,), (7, 3)):  # the last structure is one atom
        assert_parity(captured, module, batch(*indices))


_OF_ATOMS = {f"args[0][{name!r}]" for name in ("positions", "node_attrs", "batch")}


@pytest.mark.parametrize("kind", ["scaleshift", "mace"])
def test_calculator(kind: str, program: Any) -> None:
    from mace.calculators import MACECalculator

    module = program.make_module(program.arguments(["--model", kind, "--out", "unused.pt"]))
    (model,) = [child for child in module.children() if hasattr(child, "r_max")]
    other = MACECalculator(models=[model], device="cpu", default_dtype="float64")

    def own(atoms: Any) -> dict[str, Any]:
        names = ["energy", "forces", *(["stress"] if atoms.pbc.all() else [])]
        found = {name: other.get_property(name, atoms) for name in names}
        return found | ({"stress": voigt_6_to_full_3x3_stress(found["stress"])} if "stress" in found else {})

    check_calculator(module, own, compiles=True)


def test_heads_are_named(program: Any) -> None:
    from lightning_januspipe.calculator import JanusPipeCalculator, MACEAtomsAdapter

    options = {"heads": ["first", "second"], "atomic_energies": [[3.2, 4.7, 3.5], [3.0, 4.0, 3.0]]}
    model = program.model("scaleshift", 2, 2, **options, atomic_inter_scale=[0.8, 0.9], atomic_inter_shift=[0.1, 0.2])
    with pytest.raises(
        ValueError, match=r"head=None; the model has \['first', 'second'\]: give adapter=MACEAtomsAdapter"
    ):
        JanusPipeCalculator(model)
    energies = []
    for head in ("first", "second"):
        atoms = crystal()
        atoms.calc = JanusPipeCalculator(model, adapter=MACEAtomsAdapter(model, head))
        energies.append(atoms.get_potential_energy())
    assert abs(energies[0] - energies[1]) > 1e-3
