"""The report of a test: its numbers are those that the module logs, its pictures show all labels."""

from __future__ import annotations

import csv

import ase.io
import numpy as np
import prediction_workers as workers
import pytest
import tiny
import torch
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_januspipe.callbacks import EvaluationReport
from lightning_januspipe.callbacks.parity_plots import draw_learning_curves, draw_parity
from lightning_januspipe.data import ASEDataModule, EMTDataModule, StructureDataset, emt_structures
from lightning_januspipe.testing import RankPool, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Images(TensorBoardLogger):
    """Keeps the pictures that it gets as Weights & Biases does."""

    def __init__(self, folder) -> None:
        super().__init__(folder)
        self.keys: list[str] = []

    def log_image(self, key: str, images: list[str]) -> None:
        self.keys.append(key)


def test_test(tmp_path, float64, capsys) -> None:
    structures = emt_structures(7, sizes=(4, 8))
    for index, atoms in enumerate(structures):
        atoms.info["config_type"] = "bulk" if index < 4 else "strained"
        if index == 2:
            atoms.calc.results.pop("stress")
    ase.io.write(tmp_path / "test.extxyz", structures)
    data = ASEDataModule(
        str(tmp_path / "test.extxyz"), test_file=str(tmp_path / "test.extxyz"), species=["Cu", "Ni", "Al"], batch_size=3
    )
    boards, images = TensorBoardLogger(tmp_path / "boards"), Images(tmp_path / "images")
    report = EvaluationReport(str(tmp_path / "report"), num_hardest=3)
    trainer = quiet_trainer(logger=[boards, images], callbacks=[report])
    (logged,) = trainer.test(tiny.module(), data, verbose=False)

    rows = list(csv.DictReader((tmp_path / "report" / "errors.csv").open(encoding="utf-8")))
    for name in ("energy_mae", "energy_rmse", "forces_mae", "forces_rmse", "stress_mae", "stress_rmse"):
        assert float(rows[0][name]) == pytest.approx(logged[f"test_{name}"], rel=1e-6)
    groups = {(row["grouping"], row["group"]): row for row in rows}
    assert groups["config_type", "bulk"]["structures"] == "4"
    pictures = [f"parity-{name}.png" for name in ("energy", "forces", "stress")]
    found = {path.name: path.stat().st_size for path in (tmp_path / "report").iterdir()}
    assert found.keys() == {"errors.csv", "hardest.extxyz", *pictures}
    assert min(found[name] for name in pictures) > 20_000
    assert images.keys == [f"evaluation/{name[:-4]}" for name in pictures]
    (events,) = (tmp_path / "boards").rglob("events*")
    assert events.stat().st_size > sum(found[name] for name in pictures) / 2

    hardest = ase.io.read(tmp_path / "report" / "hardest.extxyz", index=":")
    errors = [np.sqrt(np.mean((a.get_forces() - a.arrays["given_forces"]) ** 2)) for a in hardest]
    assert errors == sorted(errors, reverse=True) and len(errors) == 3
    for atoms in hardest:
        np.testing.assert_allclose(atoms.positions, structures[atoms.info["test_index"]].positions, atol=1e-7)
    text = capsys.readouterr().out
    assert "Errors: by config_type" in text and "Hardest structures" in text and "strained" in text


def test_structures_without_a_config_type(tmp_path, float64, capsys) -> None:
    """No table has a column without entries."""
    ase.io.write(tmp_path / "test.extxyz", emt_structures(2, sizes=(4,)))
    path, species = str(tmp_path / "test.extxyz"), ["Cu", "Ni", "Al"]
    data = ASEDataModule(path, test_file=path, species=species, batch_size=2)
    trainer = quiet_trainer(logger=False, callbacks=[EvaluationReport(str(tmp_path / "report"), suffix="svg")])
    trainer.test(tiny.module(1), data, verbose=False)
    text = capsys.readouterr().out
    assert "Hardest structures" in text and "config_type" not in text


def test_fit_draws_learning_curves(tmp_path, float64) -> None:
    data = EMTDataModule(4, 2, 0, sizes=(4,), dtype="float64")
    report = EvaluationReport(str(tmp_path / "report"), suffix="svg")
    trainer = quiet_trainer(max_epochs=3, callbacks=[report], default_root_dir=tmp_path)
    trainer.fit(tiny.module(num_layers=1), data)
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["learning-curves.svg"]
    assert len(report._history) == 3 and report._history[-1]["val_forces_mae"] > 0


def test_other_data_gives_a_warning(tmp_path, float64) -> None:
    dataset = StructureDataset(emt_structures(2, sizes=(4,)), cutoff=5.0, species=["Cu", "Ni", "Al"])
    trainer = quiet_trainer(callbacks=[EvaluationReport(str(tmp_path / "report"))])
    with pytest.warns(UserWarning, match="returns no predictions with 'sample_index'.*there is no report"):
        trainer.test(tiny.module(), torch.utils.data.DataLoader(dataset, batch_size=None), verbose=False)


@pytest.mark.parametrize("number", [1, 20, 2000])
def test_pictures_of_few_and_many_values(tmp_path, number: int) -> None:
    rng = np.random.default_rng(0)
    given = rng.normal(size=number)
    for quantity in ("energy", "forces", "stress"):
        draw_parity(quantity, given, given + 0.1 * rng.normal(size=number), tmp_path / f"{quantity}.svg", "title")
        text = (tmp_path / f"{quantity}.svg").read_text()
        assert text.startswith("<?xml") and len(text) > 10_000
    draw_parity("forces", np.zeros(5), np.zeros(5), tmp_path / "zero.png", "no errors")
    draw_learning_curves([{"epoch": 0.0, "val_loss": 1.0}, {"epoch": 1.0, "val_loss": 0.5}], tmp_path / "c.png", "few")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="suffix='pdf'; expected one of png, svg"):
        EvaluationReport(suffix="pdf")
    with pytest.raises(ValueError, match="num_hardest=-1"):
        EvaluationReport(num_hardest=-1)


@pytest.mark.slow
def test_two_pipelines_report_what_one_process_does(pool: RankPool, tmp_path) -> None:
    ase.io.write(tmp_path / "test.extxyz", workers.structures(5))
    meshes = {"one": (None, 1), "four": ({"pipeline_size": 2, "num_microbatches": 1}, 4)}
    tables = {}
    for name, (strategy, world) in meshes.items():
        args = str(tmp_path / "test.extxyz"), str(tmp_path / name)
        logged = pool.run(workers.reported, strategy, *args, world_size=world)
        rows = list(csv.reader((tmp_path / name / "errors.csv").open(encoding="utf-8")))
        tables[name] = [[float(cell) if cell and i > 1 else cell for i, cell in enumerate(row)] for row in rows[1:]]
        assert tables[name][0][6] == pytest.approx(logged[0], rel=1e-6)
        assert workers.leftovers(str(tmp_path / name)) == []
    for mine, other in zip(tables["four"], tables["one"], strict=True):
        assert mine[:2] == other[:2]
        assert [c for c in mine[2:] if c != ""] == pytest.approx([c for c in other[2:] if c != ""], rel=1e-9)
