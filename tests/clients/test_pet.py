"""The backend of metatrain's PET in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where metatrain is absent:

    python tests/clients/environments.py pet --folder /some/folder --run
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from ase import Atoms
from factories import factory

from lightning_januspipe.calculator import JanusPipeCalculator, PETAtomsAdapter

from .calculator_checks import check_calculator, crystal
from .compare import ModelConformance, client_marks

pytestmark = client_marks("metatrain")


class TestCrystals(ModelConformance):
    make_module = factory("pet_models", "make_of_crystals")
    datamodules = {"crystals": factory("pet_models", "crystals")}


class TestMolecules(ModelConformance):
    make_module = factory("pet_models", "make_of_molecules")
    datamodules = {"molecules": factory("pet_models", "molecules")}


@pytest.fixture
def model() -> Any:
    """A PET with energies in hartree, and repulsion of atoms that are close."""
    return import_module("pet_models").make_model(unit="hartree", zbl=True)


def test_calculator(model: Any) -> None:
    """The calculator of metatomic, which evaluates the model as metatrain exports it."""
    from metatomic_ase import MetatomicCalculator

    other = MetatomicCalculator(model.eval().export(), device="cpu")

    def own(atoms: Atoms) -> dict[str, Any]:
        names = ["energy", "forces", *(["stress"] if atoms.pbc.all() else [])]
        atoms.calc = other
        found = {name: other.get_property(name, atoms) for name in names}
        return found | ({"stress": atoms.get_stress(voigt=False)} if "stress" in found else {})

    check_calculator(torch.nn.Sequential(model), own)
    atoms = crystal()
    atoms.calc = JanusPipeCalculator(model)
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy(), rel=1e-12)


def test_evaluations_are_eager(model: Any) -> None:
    """PET returns objects of metatensor, in which capture sees no tensors; a compiled calculator says so."""
    atoms = crystal()
    atoms.calc = JanusPipeCalculator(model, compile=True)
    with pytest.raises(ValueError, match="PET cannot be compiled .*an energy that no submodule returned.*compile=Fal"):
        atoms.get_potential_energy()


def test_targets_are_named(model: Any) -> None:
    with pytest.raises(ValueError, match=r"target='other'; the model has the energies \['energy'\]"):
        PETAtomsAdapter(model, "other")
