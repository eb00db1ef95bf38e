from __future__ import annotations

import numpy as np
import pytest
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from lightning_januspipe import keys
from lightning_januspipe.data import ASEDataModule, emt_structures

ATOMS = {"Cu": -3.0, "Ni": -4.0, "Al": -1.5}
SPECIES = ["Al", "Ni", "Cu"]


def isolated(symbol: str, energy: float, kind: str) -> Atoms:
    atom = Atoms(symbol, positions=[[0, 0, 0]])
    if kind == "boxed":
        atom.set_cell([20, 20, 20])
        atom.pbc = True
    if kind != "unnamed":
        atom.info["config_type"] = "IsolatedAtom"
    results = {} if kind == "no forces" else {"forces": np.zeros((1, 3))}
    atom.calc = SinglePointCalculator(atom, energy=energy, **results)
    return atom


@pytest.fixture
def make_file(tmp_path):
    """Function that writes alloys and isolated atoms, of which energies are measured, to a file."""

    def make(kind: str, symbols=tuple(ATOMS), extra=()) -> str:
        alloys = emt_structures(20, sizes=(4, 8), seed=1)
        for atoms in alloys:
            atoms.calc.results["energy"] += sum(ATOMS[symbol] for symbol in atoms.symbols)
            atoms.info["config_type"] = "bulk"
        frames = [*(isolated(symbol, ATOMS[symbol], kind) for symbol in symbols), *extra, *alloys]
        write(tmp_path / "train.extxyz", frames)
        return str(tmp_path / "train.extxyz")

    return make


@pytest.mark.parametrize("kind", ["no forces", "with forces", "boxed", "unnamed"])
@pytest.mark.parametrize("how", ["auto", "isolated_atoms"])
def test_isolated_atoms_give_the_reference_energies(make_file, kind, how):
    module = ASEDataModule(make_file(kind), val_size=0.3, test_size=2, cutoff=4.0, reference_energies=how)
    module.setup("fit")
    assert dict(zip(module.species, module.statistics().energy_shifts, strict=True)) == pytest.approx(ATOMS)
    sizes = [[len(sample[keys.SPECIES]) for sample in module.dataset(split)] for split in ("train", "val", "test")]
    assert [len(found) for found in sizes] == [3 + 12, 6, 2]  # isolated atoms are trained on, whatever the split
    assert sizes[0].count(1) == 3 and 1 not in sizes[1] + sizes[2]
    forces = [sample[keys.FORCES] for sample in module.dataset("train") if len(sample[keys.SPECIES]) == 1]
    assert all((one == 0).all() for one in forces)


def test_others_are_fitted_to_what_isolated_atoms_leave(make_file):
    module = ASEDataModule(make_file("boxed", ["Cu", "Al"]), cutoff=4.0)
    shifts = dict(zip(module.species, module.statistics().energy_shifts, strict=True))
    assert (shifts["Cu"], shifts["Al"]) == (-3.0, -1.5)
    assert -4.0 < shifts["Ni"] < -3.0  # with the binding energy of alloys
    with pytest.raises(ValueError, match="no isolated atom of Ni in the training file.*config_type=IsolatedAtom"):
        ASEDataModule(make_file("boxed", ["Cu", "Al"]), cutoff=4.0, reference_energies="isolated_atoms").statistics()


def test_least_squares_and_given_energies(make_file):
    fitted = ASEDataModule(make_file("boxed"), cutoff=4.0, reference_energies="least_squares").statistics()
    without = ASEDataModule(make_file("boxed", []), cutoff=4.0).statistics()
    assert fitted == without
    given = ASEDataModule(make_file("boxed"), cutoff=4.0, reference_energies={"Al": 1.0, "Ni": 2.0, "Cu": 3.0})
    assert given.statistics().energy_shifts == (1.0, 2.0, 3.0)


def test_errors(make_file):
    with pytest.raises(ValueError, match="reference_energies='isolated'; expected 'auto', 'isolated_atoms'"):
        ASEDataModule("any.extxyz", reference_energies="isolated")
    with pytest.raises(ValueError, match=r"reference_energies=.* has no energy of Ni, Cu"):
        ASEDataModule(make_file("boxed"), cutoff=4.0, reference_energies={"Al": 1.0}).statistics()
    pair = Atoms("Cu2", [[0, 0, 0], [2.5, 0, 0]])
    pair.info["config_type"] = "IsolatedAtom"
    pair.calc = SinglePointCalculator(pair, energy=-3.0, forces=np.zeros((2, 3)))
    with pytest.raises(ValueError, match=r"train.extxyz, frame 3 is an isolated atom by its config_type, but has 2"):
        ASEDataModule(make_file("boxed", extra=[pair]), cutoff=4.0).statistics()
    close = isolated("Cu", -3.0, "boxed")
    close.set_cell([3, 3, 3])
    with pytest.raises(ValueError, match="frame 3 .* has periodic images within the cutoff"):
        ASEDataModule(make_file("boxed", extra=[close]), cutoff=4.0).statistics()
    with pytest.raises(ValueError, match="frame 0 and .*frame 3 are isolated atoms of Cu with different energies"):
        ASEDataModule(make_file("boxed", extra=[isolated("Cu", -3.1, "boxed")]), cutoff=4.0).statistics()
