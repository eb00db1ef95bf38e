"""Samples have the task, charge and spin of their structures; data of other tasks than the potential are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ase import Atoms
from ase.io import write

from lightning_januspipe import keys
from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.cli.fit import arguments_from_data
from lightning_januspipe.data import DiskDataset, EMTDataModule, StructureDataset
from lightning_januspipe.data.tasks import read_task
from lightning_januspipe.models import MatRISMoE
from lightning_januspipe.models.data_checks import check_data

TASKS = ["pbe", "r2scan"]


def pair(**info: object) -> Atoms:
    atoms = Atoms("CuNi", [[0.0, 0.0, 0.0], [2.3, 0.2, 0.1]])
    atoms.info |= info
    return atoms


def test_samples_have_what_their_structures_tell(tmp_path: Path) -> None:
    structures = [pair(task="r2scan", charge=-2), pair(task="pbe", spin=1.0)]
    data = StructureDataset(structures, cutoff=4.0, require_labels=False, tasks=TASKS)
    found = [[int(sample[key]) for key in (keys.TASK, keys.CHARGE, keys.SPIN)] for sample in (data[0], data[1])]
    assert found == [[1, -2, 0], [0, 0, 1]]
    write(tmp_path / "pairs.extxyz", structures)
    options = {"cutoff": 4.0, "require_labels": False, "tasks": TASKS, "cache_dir": tmp_path}
    for more in ({}, {"task": "pbe"}):
        disk = DiskDataset(tmp_path / "pairs.extxyz", **options, **more)
        found = [[int(disk[index][key]) for key in (keys.TASK, keys.CHARGE, keys.SPIN)] for index in (0, 1)]
        assert found == [[0 if more else 1, -2, 0], [0, 0, 1]]
    options["tasks"] = ["pbe"]
    with pytest.raises(
        ValueError, match=r"pairs.extxyz, frame 0 has info\['task'\]='r2scan'; expected one of \['pbe'\]"
    ):
        DiskDataset(tmp_path / "pairs.extxyz", **options).facts()
    assert keys.TASK not in StructureDataset(structures, cutoff=4.0, require_labels=False)[0]
    assert int(read_task(pair().info, ["only"], "structure")[keys.TASK]) == 0


def test_bad_values_name_the_structure() -> None:
    data = StructureDataset([pair(), pair(task="pbe", charge=0.5)], cutoff=4.0, require_labels=False, tasks=TASKS)
    with pytest.raises(ValueError, match=r"structure 0 has info\['task'\]=None; expected one of \['pbe', 'r2scan'\]"):
        data[0]
    with pytest.raises(ValueError, match=r"structure 1 has info\['charge'\]=0.5; expected an integer"):
        data[1]
    with pytest.raises(ValueError, match="tasks='pbe'; expected a list of distinct names"):
        StructureDataset([pair()], cutoff=4.0, tasks="pbe")
    with pytest.raises(ValueError, match=r"tasks=\['dft'\] holds \['dft'\]; expected names in \['emt', 'morse'\]"):
        EMTDataModule(tasks=["dft"])


def test_made_data_alternates_between_tasks() -> None:
    data = EMTDataModule(num_train=4, num_val=0, num_test=0, sizes=(4,), tasks=["emt", "morse"], cutoff=4.0)
    dataset = data.dataset("train")
    assert dataset is not None and [int(dataset[i][keys.TASK]) for i in range(4)] == [0, 1, 0, 1]
    plain = EMTDataModule(num_train=4, num_val=0, num_test=0, sizes=(4,), cutoff=4.0).dataset("train")
    assert plain is not None
    same = [torch.equal(dataset[i][keys.FORCES], plain[i][keys.FORCES]) for i in range(4)]
    assert same == [True, False, True, False]
    assert arguments_from_data(data, 4.0, ["tasks"]) == {"tasks": ["emt", "morse"]}


def test_potential_and_data_number_tasks_alike() -> None:
    potential = MatRISMoE.from_size("tiny", species=["Ni", "Cu"], cutoff=4.0, tasks=TASKS)
    make = {"cutoff": 4.0, "require_labels": False}
    check_data(potential, StructureDataset([pair()], tasks=["pbe"], **make))
    with pytest.raises(ValueError, match=r"the data has the tasks \['r2scan'\] and the potential \['pbe', 'r2scan'\]"):
        check_data(potential, StructureDataset([pair()], tasks=["r2scan"], **make))


def test_calculator_tells_tasks_apart() -> None:
    potential = MatRISMoE.from_size("tiny", species=["Cu", "Ni"], cutoff=4.0, tasks=TASKS)
    atoms = pair(task="pbe")
    atoms.calc = JanusPipeCalculator(potential)
    first = atoms.get_potential_energy()
    atoms.info["task"] = "r2scan"
    second = atoms.get_potential_energy()
    atoms.info["charge"] = 1
    assert len({first, second, atoms.get_potential_energy()}) == 3
    atoms.info["task"] = "hf"
    with pytest.raises(ValueError, match="expected one of"):
        atoms.get_potential_energy()
