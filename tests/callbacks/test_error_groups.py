"""Errors of groups are means over the labels of the group, whatever batches they came in."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from rich.console import Console

from lightning_januspipe.callbacks.error_groups import ErrorGroups
from lightning_januspipe.callbacks.records import Record


def record(index: int, num_atoms: int, labels: bool = True) -> Record:
    rng = np.random.default_rng(index)
    forces, stress = rng.normal(size=(num_atoms, 3)), rng.normal(size=(3, 3))
    return Record(
        index=index,
        numbers=np.where(np.arange(num_atoms) % 3 == 0, 13, 29),
        energy=float(rng.normal()),
        forces=forces,
        stress=stress,
        given_energy=float(rng.normal()) if labels else np.nan,
        given_forces=rng.normal(size=(num_atoms, 3)) if labels else np.full((num_atoms, 3), np.nan),
        given_stress=rng.normal(size=(3, 3)) if index % 2 and labels else np.full((3, 3), np.nan),
    )


@pytest.fixture
def records() -> list[Record]:
    return [record(0, 3), record(1, 5), record(2, 5), record(3, 1), record(4, 8, labels=False)]


def test_groups(records: list[Record]) -> None:
    groups = ErrorGroups()
    for one in records:
        groups.add(one, {"config_type": "odd", "task": "pbe"} if one.index % 2 else {"task": "hf"})
    (whole,) = [group for _, group in groups.rows("all")]
    assert (whole.num_structures, whole.num_atoms) == (5, 22)
    known = records[:4]
    errors = np.concatenate([(one.forces - one.given_forces).ravel() for one in known])
    assert whole.mae("forces") == pytest.approx(np.abs(errors).mean())
    assert whole.rmse("forces") == pytest.approx(np.sqrt((errors**2).mean()))
    energies = np.array([(one.energy - one.given_energy) / len(one.numbers) for one in known])
    assert whole.mae("energy") == pytest.approx(np.abs(energies).mean())
    stresses = np.array([one.stress - one.given_stress for one in (records[1], records[3])])
    assert whole.rmse("stress") == pytest.approx(np.sqrt((stresses**2).mean()))

    elements = dict(groups.rows("element"))
    assert list(elements) == ["Al", "Cu"]
    copper = np.concatenate([(one.forces - one.given_forces)[one.numbers == 29].ravel() for one in known])
    assert elements["Cu"].mae("forces") == pytest.approx(np.abs(copper).mean())
    assert elements["Al"].num_structures == 5 and elements["Al"].num_atoms == 9

    assert [(name, group.num_structures) for name, group in groups.rows("task")] == [("hf", 3), ("pbe", 2)]
    types = dict(groups.rows("config_type"))
    assert [types[name].num_structures for name in ("(none)", "odd")] == [3, 2]
    assert np.isnan(types["(none)"].mae("stress"))
    sizes = dict(groups.rows("size"))
    assert list(sizes) == ["1", "3", "5", "8"] and sizes["5"].num_structures == 2
    assert np.isnan(sizes["8"].mae("forces"))


def test_many_sizes_are_put_together() -> None:
    groups = ErrorGroups()
    for size in (1, 2, 3, 4, 5, 8, 9, 16, 17, 33):
        groups.add(record(size, size))
    rows = dict(groups.rows("size"))
    assert list(rows) == ["1–1", "2–2", "3–4", "5–8", "9–16", "17–32", "33–64"]
    assert [group.num_structures for group in rows.values()] == [1, 1, 2, 2, 2, 1, 1]
    errors = np.concatenate([(r.forces - r.given_forces).ravel() for r in (record(3, 3), record(4, 4))])
    assert rows["3–4"].mae("forces") == pytest.approx(np.abs(errors).mean())


def test_tables_have_80_columns_and_say_only_what_differs(records: list[Record]) -> None:
    groups = ErrorGroups()
    for one in records:
        groups.add(one)
    console = Console(width=80, file=io.StringIO())
    for table in groups.tables():
        console.print(table)
    text = console.file.getvalue()
    assert "by element" in text and "by number of atoms" in text and "config_type" not in text
    assert "…" not in text
    assert list(ErrorGroups().tables()) == []


def test_csv(records: list[Record], tmp_path) -> None:
    groups = ErrorGroups()
    for one in records:
        groups.add(one, {"config_type": "liquid"})
    groups.write_csv(tmp_path / "errors.csv")
    rows = list(csv.DictReader((tmp_path / "errors.csv").open(encoding="utf-8")))
    assert {row["grouping"] for row in rows} == {"all", "element", "task", "config_type", "size"}
    whole = rows[0]
    assert float(whole["forces_rmse"]) == dict(groups.rows("all"))["all"].rmse("forces")
    assert next(row for row in rows if row["group"] == "8")["energy_mae"] == ""
    assert next(row for row in rows if row["grouping"] == "config_type")["group"] == "liquid"
