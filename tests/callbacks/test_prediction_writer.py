"""Files of predictions have each structure once, in order, on any mesh of ranks."""

from __future__ import annotations

import ase.io
import numpy as np
import prediction_workers as workers
import pytest
import tiny
import torch
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.callbacks import PredictionWriter
from lightning_januspipe.callbacks.prediction_writer import predicted_structure
from lightning_januspipe.callbacks.records import Record
from lightning_januspipe.data import StructureDataset
from lightning_januspipe.data.dataset import IndexedDataset
from lightning_januspipe.testing import RankPool, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")

REPLICAS = {"pipeline_size": 1, "num_microbatches": 1}
PIPELINES = {"pipeline_size": 2, "num_microbatches": 1}


def assert_predicted(found: list[Atoms], given: list[Atoms]) -> None:
    """Predictions are those of the calculator, in order; labels and errors stand beside them."""
    calculator = JanusPipeCalculator(tiny.module())
    assert [atoms.info["frame"] for atoms in found] == list(range(len(given)))
    for atoms, label in zip(found, given, strict=True):
        expected = label.copy()
        expected.calc = calculator
        assert str(atoms.symbols) == str(label.symbols)
        np.testing.assert_allclose(atoms.positions, label.positions, rtol=0, atol=1e-7)
        assert atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), expected.get_forces(), rtol=0, atol=1e-6)
        np.testing.assert_allclose(atoms.get_stress(), expected.get_stress(), rtol=0, atol=1e-7)
        assert atoms.info.get("config_type") == label.info.get("config_type")
        if label.calc is None:
            assert "given_energy" not in atoms.info and "force_rmse" not in atoms.info
            continue
        results = label.calc.results
        assert atoms.info["given_energy"] == pytest.approx(results["energy"])
        error = (atoms.get_potential_energy() - results["energy"]) / len(atoms)
        assert atoms.info["energy_error"] == pytest.approx(error, abs=1e-6)
        np.testing.assert_allclose(atoms.arrays["given_forces"], results["forces"], rtol=0, atol=1e-6)
        errors = atoms.get_forces() - results["forces"]
        assert atoms.info["force_rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)), abs=1e-6)
        stress = atoms.info["given_stress"]
        assert stress.shape == (6,)
        np.testing.assert_allclose(stress, label.get_stress(), rtol=0, atol=1e-7)
        errors = voigt_6_to_full_3x3_stress(atoms.get_stress() - stress)
        assert atoms.info["stress_rmse"] == pytest.approx(np.sqrt(np.mean(errors**2)), abs=1e-7)


@pytest.mark.parametrize("ending", ["extxyz", "traj", "db"])
def test_one_process(tmp_path, float64, capsys, ending: str) -> None:
    given = workers.structures(5)
    ase.io.write(tmp_path / "given.extxyz", given)
    output = tmp_path / "new" / f"out.{ending}"
    for _ in range(2):  # the second run replaces the file
        workers.predicted(None, str(tmp_path / "given.extxyz"), str(output), 2, None)
    found = ase.io.read(output, index=":")
    if ending == "extxyz":
        assert "_JSON" not in output.read_text()
        assert_predicted(found, given)
    for atoms, expected in zip(found, predictions(given), strict=True):  # ASE writes no arrays to the other two
        assert atoms.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-6)
        np.testing.assert_allclose(atoms.get_forces(), expected.get_forces(), rtol=0, atol=1e-6)
    assert workers.leftovers(str(output.parent)) == []
    said = capsys.readouterr().out
    assert f"Predicted 5 structures with {sum(map(len, given))} atoms in" in said and "atoms/s" in said
    assert "Errors: by config_type" in said and "third" in said


def predictions(given: list[Atoms]) -> list[Atoms]:
    calculator = JanusPipeCalculator(tiny.module())
    copies = [atoms.copy() for atoms in given]
    for atoms in copies:
        atoms.calc = calculator
    return copies


@pytest.mark.parametrize(
    ("strategy", "world", "num", "batch_size", "budget"),
    [
        (REPLICAS, 2, 5, 2, None),  # three and two structures
        pytest.param(REPLICAS, 2, 5, 8, 16, marks=pytest.mark.slow),  # batches by atoms, which mix the order
        pytest.param(PIPELINES, 4, 5, 1, None, marks=pytest.mark.slow),  # two pipelines
    ],
)
def test_any_mesh(
    pool: RankPool, tmp_path, float64, strategy: dict, world: int, num: int, batch_size: int, budget: int | None
) -> None:
    given = workers.structures(num)
    ase.io.write(tmp_path / "given.extxyz", given)
    output = tmp_path / "out.extxyz"
    pool.run(
        workers.predicted, strategy, str(tmp_path / "given.extxyz"), str(output), batch_size, budget, world_size=world
    )
    assert_predicted(ase.io.read(output, index=":"), given)
    assert workers.leftovers(str(tmp_path)) == []


def test_fewer_structures_than_replicas_are_refused(pool: RankPool, tmp_path) -> None:
    file = str(tmp_path / "given.extxyz")
    ase.io.write(file, workers.structures(1))
    with pytest.raises(AssertionError, match="1 samples to predict for 2 replicas: each replica needs at least one"):
        pool.run(workers.predicted, REPLICAS, file, str(tmp_path / "out.extxyz"), 1, None, world_size=2, timeout=60)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.unknown", "ASE knows no format of this ending"),
        ("POSCAR.vasp", "writes no list of structures in the format 'vasp'"),
    ],
)
def test_other_formats_are_refused_at_once(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PredictionWriter(name)


def test_files_that_would_be_lost_are_refused(tmp_path, float64) -> None:
    """The file of the labels, also by another name, and a folder; what cannot be written leaves nothing behind."""
    file = tmp_path / "given.extxyz"
    ase.io.write(file, [*workers.structures(1), Atoms("Cu", cell=[2.4, 0, 0], pbc=[True, False, False])])
    (tmp_path / "link.extxyz").symlink_to(file)
    text = file.read_text()
    for name in ("given.extxyz", "link.extxyz"):
        with pytest.raises(ValueError, match="is a file that the structures are read from"):
            workers.predicted(None, str(file), str(tmp_path / name), 2, None)
    assert file.read_text() == text
    with pytest.raises(ValueError, match="is a folder; expected a file"):
        PredictionWriter(str(tmp_path))
    with pytest.raises(ValueError, match=r"out\.cif could not be written as 'cif' \(ValueError: CIF"):
        workers.predicted(None, str(file), str(tmp_path / "out.cif"), 2, None)
    assert workers.leftovers(str(tmp_path)) == []


def test_errors_of_earlier_predictions_are_removed() -> None:
    atoms = Atoms("Cu", info={"energy_error": 1.0, "force_rmse": 2.0, "stress_rmse": 3.0, "other": 4.0})
    none = np.full((3, 3), np.nan)
    record = Record(0, np.array([29]), 1.0, np.zeros((1, 3)), none, np.nan, none[:1], none)
    assert predicted_structure(atoms, record).info == {"other": 4.0}


def test_data_without_indices_is_refused(tmp_path, float64) -> None:
    dataset = StructureDataset(workers.structures(1), cutoff=5.0, species=["Cu", "Ni", "Al"])
    writer = PredictionWriter(str(tmp_path / "out.extxyz"))
    trainer = quiet_trainer(callbacks=[writer])
    with pytest.raises(ValueError, match=r"returned \['energy', 'forces', 'stress'\]; expected .* 'sample_index'"):
        trainer.predict(tiny.module(), torch.utils.data.DataLoader(dataset, batch_size=None))


def test_samples_with_indices() -> None:
    dataset = IndexedDataset([{"value": torch.tensor([i])} for i in (7, 8, 9)])
    assert len(dataset) == 3
    assert [(int(s["value"]), s["sample_index"].tolist()) for s in dataset.__getitems__([2, 0])] == [(9, [2]), (7, [0])]
