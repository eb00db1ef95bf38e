"""Several files, as a list or a pattern, are the same data as one file with all of their structures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import disk_workers as workers
import numpy as np
import pytest
import torch
from ase import Atoms

from lightning_januspipe.data import ASEDataModule


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Atoms]:
    """Writes structures into one file, and into three; the elements of the first are not those of the others."""
    monkeypatch.chdir(tmp_path)
    found = workers.frames(9)
    copper = [atoms for atoms in found if set(atoms.symbols) <= {"Cu", "Ni"}]
    others = [atoms for atoms in found if not set(atoms.symbols) <= {"Cu", "Ni"}]
    assert len(copper) > 1 and len(others) > 3
    workers.write_file(tmp_path / "all.extxyz", [*copper, *others])
    os.mkdir("parts")
    for name, part in (("a", copper), ("b", others[:2]), ("c", others[2:])):
        workers.write_file(tmp_path / f"parts/{name}.extxyz", part)
    return [*copper, *others]


def module_of(train_file: Any, **options: Any) -> ASEDataModule:
    module = ASEDataModule(
        train_file,
        cutoff=4.0,
        batch_size=3,
        dtype="float64",
        weight_key="config_weight",
        config_type_weights={"odd": 2.0},
        stratify=True,
        cache_dir="cache",
        **options,
    )
    module.setup("fit")
    return module


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("more", [{}, {"num_workers": 1}, {"max_edges": 900}])
@pytest.mark.filterwarnings("ignore:the validation data holds no structure")
def test_several_files_are_one(in_folder: list[Atoms], lazy: bool, more: dict[str, Any]) -> None:
    options = {"val_size": 3, "lazy": lazy, "shuffle": False, **more}
    one = module_of("all.extxyz", **options)
    several = module_of(["parts/a.extxyz", Path("parts/b.extxyz"), "parts/[c-z].extxyz"], **options)
    assert several.species == one.species == ["Al", "Ni", "Cu"]
    assert several.statistics() == one.statistics()
    for split in ("train", "val"):
        batches = [list(getattr(module, f"{split}_dataloader")()) for module in (one, several)]
        for batch, other in zip(*batches, strict=True):
            assert batch.keys() == other.keys()
            for name in batch:
                torch.testing.assert_close(other[name], batch[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("lazy", [False, True])
def test_structures_have_the_names_of_their_files(in_folder: list[Atoms], lazy: bool) -> None:
    source: Any = module_of("parts/*.extxyz", lazy=lazy).dataset("train")
    dataset = source.dataset
    num = [len(dataset) - 1, 0, 2, len(dataset) - 2, 1]
    table = dataset.facts(num)
    assert [table.name(k) for k in range(len(num))] == [dataset.describe(k) for k in num]
    assert dataset.describe(1) == "parts/a.extxyz, frame 1" and dataset.describe(-1).startswith("parts/c.extxyz, ")
    assert [file.name for file in dataset.files] == ["a.extxyz", "b.extxyz", "c.extxyz"]
    for index, atoms in enumerate(in_folder):
        np.testing.assert_allclose(dataset.atoms(index).positions, atoms.positions, rtol=0, atol=1e-7)
    with pytest.raises(ValueError, match=r"parts/b.extxyz, frame \d holds the unknown species"):
        module_of("parts/*.extxyz", lazy=lazy, species=["Cu", "Ni"])


@pytest.mark.parametrize("given", ["", [], ["a.extxyz", ""], None, 3, ["a.extxyz", None]])
@pytest.mark.parametrize("name", ["train_file", "val_file", "test_file", "predict_file", "replay_file"])
def test_what_is_no_file(name: str, given: Any) -> None:
    if given is None and name != "train_file":
        return
    with pytest.raises(ValueError, match=rf"{name}=.*; expected a file, a pattern such as 'folder/\*.extxyz', or a"):
        ASEDataModule(**{"train_file": "a.extxyz", name: given})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("parts/*.db", r"train_file: no file matches parts/\*.db \(looked in .*\); check the pattern"),
        ("parts", r"data file parts is a folder; expected a file, or a pattern such as 'parts/\*.extxyz'"),
        (["parts/*.extxyz", "parts/../parts/a.extxyz"], r"train_file names .*parts/a.extxyz twice; expected each"),
        (["parts/a.extxyz", "absent.extxyz"], r"no such data file: absent.extxyz"),
    ],
)
@pytest.mark.parametrize("lazy", ["auto", True])
def test_files_that_are_not_there(in_folder: list[Atoms], given: Any, message: str, lazy: Any) -> None:
    with pytest.raises(ValueError, match=message):
        module_of(given, lazy=lazy)


def test_a_file_whose_name_is_a_pattern(in_folder: list[Atoms]) -> None:
    os.rename("all.extxyz", "a[l]*.extxyz")
    assert len(module_of("a[l]*.extxyz").dataset("train") or ()) == len(in_folder)
