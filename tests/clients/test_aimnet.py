"""AIMNet2 in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where aimnet is absent:

    python tests/clients/environments.py aimnet --folder /some/folder --run
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ase import Atoms
from factories import factory

from lightning_januspipe.calculator import JanusPipeCalculator

from .calculator_checks import check_calculator, cluster, crystal, tiny
from .compare import ModelConformance, client_marks

pytestmark = client_marks("aimnet")


class TestPadded(ModelConformance):
    """Molecules padded to one size, with a Coulomb energy of the charges."""

    make_module = factory("aimnet_models", "make_dense")
    datamodules = {"molecules": factory("aimnet_models", "molecules_padded")}


class TestPacked(ModelConformance):
    """Molecules one after the other, with a matrix of neighbours."""

    make_module = factory("aimnet_models", "make_packed")
    datamodules = {"molecules": factory("aimnet_models", "molecules_packed")}


@pytest.mark.parametrize("make", ["make_dense", "make_packed"])
def test_calculator(make: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """AIMNet2's own calculator, whose inputs are in single precision by themselves."""
    module = factory("aimnet_models", make)().eval()
    from aimnet.calculators import AIMNet2Calculator

    for name in ("keys_in", "keys_in_optional"):
        types = getattr(AIMNet2Calculator, name)
        doubled = {key: torch.float64 if dtype is torch.float else dtype for key, dtype in types.items()}
        monkeypatch.setattr(AIMNet2Calculator, name, doubled)
    other = AIMNet2Calculator(module.model.module, device="cpu")

    def own(atoms: Atoms) -> dict[str, Any]:
        data: dict[str, Any] = {"coord": atoms.positions, "numbers": atoms.numbers, "charge": 0.0}
        periodic = bool(atoms.pbc.any())
        if periodic:
            data["cell"] = atoms.cell.array
        found = other(data, forces=True, stress=periodic)
        return {name: found[name].detach().numpy() for name in ("energy", "forces", *(["stress"] if periodic else []))}

    structures = [cluster] if make == "make_dense" else [crystal, tiny, cluster]
    # AIMNet2 adds 1e-6 to the weights of charges.
    check_calculator(module, own, structures=structures, repeated=1e-4, compiles=True)


def test_charges() -> None:
    """The charge of a structure counts."""
    module = factory("aimnet_models", "make_dense")()
    energies = []
    for charge in (0, 1):
        atoms = cluster()
        atoms.info["charge"] = charge
        atoms.calc = JanusPipeCalculator(module)
        energies.append(atoms.get_potential_energy())
    assert abs(energies[0] - energies[1]) > 1e-3


def test_what_is_not_in_the_forward_is_refused() -> None:
    module = factory("aimnet_models", "make_dense")()
    atoms = crystal()
    atoms.calc = JanusPipeCalculator(module)
    with pytest.raises(ValueError, match="the structure is periodic, and the model of AIMNet2 has terms of long range"):
        atoms.get_potential_energy()
    module.model.module._metadata = {"needs_dispersion": True}
    with pytest.raises(ValueError, match="needs_dispersion of the model of AIMNet2 is only known to its AIMNet2Calc"):
        JanusPipeCalculator(module)
