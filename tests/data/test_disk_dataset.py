"""Datasets that are read from the disk give what datasets in memory give, whatever happens to their files."""

from __future__ import annotations

import pickle
from pathlib import Path

import disk_workers as workers
import numpy as np
import pytest
import torch
from ase.build import molecule
from ase.io import write

from lightning_januspipe import keys
from lightning_januspipe.data import ASEDataModule, DiskDataset, StructureDataset, dataset_statistics, open_dataset
from lightning_januspipe.data import disk_dataset as module
from lightning_januspipe.data.checked_files import read_arrays, write_arrays
from lightning_januspipe.testing import RankPool

OPTIONS = {
    "cutoff": 4.0,
    "require_labels": False,
    "config_type_weights": {"odd": 2.0, "Default": 0.5},
    "weight_key": "config_weight",
}


@pytest.fixture
def file(tmp_path) -> Path:
    return workers.write_file(tmp_path / "alloys.extxyz", workers.frames(8))


@pytest.fixture
def opened(tmp_path, file):
    """Function that opens the file with the cache of this test."""

    def run(path: Path = file, **options) -> DiskDataset:
        return DiskDataset(path, cache_dir=tmp_path / "cache", chunk_size=3, **(OPTIONS | options))

    return run


def assert_same(disk: StructureDataset, memory: StructureDataset) -> None:
    assert len(disk) == len(memory) and disk.species == memory.species
    for index in range(len(memory)):
        assert workers.same(disk[index], memory[index]), index
        assert disk.atoms(index) == memory.atoms(index) and disk.describe(index) == memory.describe(index)
    memory.facts()
    assert [list(sizes) for sizes in disk.sample_sizes()] == [list(sizes) for sizes in memory.sample_sizes()]
    assert disk.isolated_atoms() == memory.isolated_atoms() and disk.kinds() == memory.kinds()
    assert disk.count_labels() == memory.count_labels() and disk.count_labels([2, 1]) == memory.count_labels([2, 1])
    assert dataset_statistics(disk) == dataset_statistics(memory)


@pytest.mark.parametrize("suffix", [".extxyz", ".db", ".traj", ".aselmdb"])
def test_same_as_in_memory(tmp_path, opened, suffix):
    if suffix == ".aselmdb":
        pytest.importorskip("lmdb")
    frames = [*workers.frames(6), molecule("H2O")]
    path = workers.write_file(tmp_path / f"alloys{suffix}", frames)
    for dtype in ("float64", "float32"):
        assert_same(opened(path, dtype=dtype), StructureDataset(path, dtype=dtype, **OPTIONS))
    assert [len(StructureDataset(path, **OPTIONS).atoms(index)) for index in range(8)] == list(map(len, frames))


def test_second_opening_makes_nothing(opened, monkeypatch):
    first = opened()
    assert sorted(first._cache.folder.glob("*.samples")) and len(first) == 9
    monkeypatch.setattr("lightning_januspipe.data.sample_cache.structure_arrays", None)
    monkeypatch.setattr("lightning_januspipe.data.frames.ExtendedXYZ.scan", None)
    again = opened()
    copied = pickle.loads(pickle.dumps(again))
    assert all(workers.same(first[index], one[index]) for index in range(9) for one in (again, copied))
    assert again[3][keys.POSITIONS] is not again[3][keys.POSITIONS]  # nothing is held


@pytest.mark.parametrize("options", [{"cutoff": 3.0}, {"energy_unit": "kcal/mol"}, {"weight_key": None}])
def test_other_options_are_another_cache(opened, options):
    first, other = opened(), opened(**options)
    assert first._cache.folder != other._cache.folder
    assert first._cache.folder == opened(dtype="float64", species=["Ni", "Cu", "Al"])._cache.folder
    assert not workers.same(first[2], other[2])


def test_another_content_is_another_cache(opened, file):
    first = opened()
    frames = workers.frames(8)
    frames[2].positions[0] += 0.1
    write(file, frames)  # of the same size
    assert abs(float(opened()[2][keys.POSITIONS][0, 0] - first[2][keys.POSITIONS][0, 0])) > 0.05
    renamed = file.with_name("other.extxyz")
    file.rename(renamed)
    assert opened(renamed)._cache.folder == opened(renamed)._cache.folder
    assert opened(renamed).describe(1).endswith("other.extxyz, frame 1")


def damaged(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * (len(content) - 1))] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", ["table", "000001.facts", "000001.samples", "frames"])
def test_one_wrong_bit_anywhere_is_made_anew(opened, tmp_path, name, place):
    expected = [opened()[index] for index in range(9)]
    table = opened()._cache.folder / "table"
    path = next((tmp_path / "cache" / "frames").glob("*[!.lock]")) if name == "frames" else table.with_name(name)
    damaged(path, place)
    if name == "000001.facts":
        damaged(table, 0.3)  # otherwise nobody reads it
    if name.endswith("samples"):
        with pytest.warns(UserWarning, match=r"000001.samples is damaged, and is made anew"):
            found = [one[index] for one in [opened()] for index in range(9)]
    else:
        found = [one[index] for one in [opened()] for index in range(9)]
    assert all(map(workers.same, found, expected))
    assert all(workers.same(opened()[index], expected[index]) for index in range(9))


@pytest.mark.parametrize("name", ["table", "000000.facts", "000002.samples"])
def test_missing_and_short_files_are_made_anew(opened, name):
    expected = [opened()[index] for index in range(9)]
    path = opened()._cache.folder / name
    for content in (None, path.read_bytes()[:-5], b""):
        held = opened()
        path.unlink(missing_ok=True)  # the table stands for the facts of the chunks
        if content is not None:
            path.write_bytes(content)
        assert all(workers.same(opened()[index], expected[index]) for index in range(9)), name
        assert all(workers.same(held[index], expected[index]) for index in range(9)), name


def test_damage_after_the_file_has_changed_is_an_error(opened, file):
    held = opened()
    damaged(held._cache.folder / "000001.samples", 0.2)
    write(file, workers.frames(5))
    with (
        pytest.warns(UserWarning, match="is damaged"),
        pytest.raises(ValueError, match="alloys.extxyz has changed since the run began"),
    ):
        [held[index] for index in range(9)]


def test_a_file_is_not_taken_for_another(tmp_path):
    write_arrays(tmp_path / "first", {"a": np.arange(3)}, {"n": 1})
    arrays, info = read_arrays(tmp_path / "first")
    assert arrays["a"].tolist() == [0, 1, 2] and info == {"n": 1}
    (tmp_path / "first").rename(tmp_path / "second")
    assert read_arrays(tmp_path / "second") is None and read_arrays(tmp_path / "first") is None


def test_errors_name_file_and_frame(tmp_path, opened, file):
    with pytest.raises(
        ValueError, match=r"alloys.extxyz, frame \d holds the unknown species Al; known: \['Cu', 'Ni'\]"
    ):
        opened(species=["Cu", "Ni"]).facts()
    dataset = opened(species=["Cu", "Ni"])
    with pytest.raises(ValueError, match=r"alloys.extxyz, frame \d holds the unknown species Al; known"):
        [dataset[index] for index in range(9)]
    with pytest.raises(ValueError, match=r"alloys.extxyz, frame 8 has no forces label"):
        write(file, [*workers.frames(8)[:8], molecule("H2O")], append=False)
        opened(require_labels=True, energy_key=None)
    text = file.read_text()
    (tmp_path / "short.extxyz").write_text(text[:-200])
    with pytest.raises(ValueError, match=r"short.extxyz cannot be read \(ValueError: frame 8 ends too early"):
        opened(tmp_path / "short.extxyz")
    (tmp_path / "bad.extxyz").write_text("five\n")
    with pytest.raises(ValueError, match=r"frame 0 begins with 'five'; expected its number of atoms"):
        opened(tmp_path / "bad.extxyz")
    (tmp_path / "bad.cif").write_text("x")
    with pytest.raises(ValueError, match=r"lazy=True, but .*bad.cif cannot be read structure by structure; expected"):
        open_dataset(tmp_path / "bad.cif", lazy=True, cutoff=4.0)
    with pytest.raises(ValueError, match=r"no such data file: .*absent.extxyz"):
        opened(tmp_path / "absent.extxyz")


def test_large_files_are_read_from_the_disk(monkeypatch, tmp_path, file):
    options = {"cutoff": 4.0, "require_labels": False, "cache_dir": tmp_path / "cache"}
    assert type(open_dataset(file, **options)) is StructureDataset
    monkeypatch.setattr(module, "LARGE", 100)
    assert type(open_dataset(file, **options)) is DiskDataset
    assert type(open_dataset(file, lazy=False, **options)) is StructureDataset
    assert ASEDataModule(str(file), cutoff=4.0, require_labels=False, cache_dir=str(tmp_path)).species


def test_statistics_in_blocks(opened, monkeypatch):
    expected = dataset_statistics(opened(dtype="float64"))
    monkeypatch.setattr("lightning_januspipe.data.statistics._BLOCK", 2)
    found = dataset_statistics(opened(dtype="float64"))
    assert found.energy_shifts == pytest.approx(expected.energy_shifts, abs=1e-10)
    assert found.energy_rms == pytest.approx(expected.energy_rms, abs=1e-10)


def test_ranks_that_open_a_file_at_once_share_the_work(pool: RankPool, file, tmp_path):
    found = pool.run(workers.opened, str(file), str(tmp_path / "cache"), world_size=2)
    assert found[0] == found[1] and found[0][1] == sorted(
        ["table", *(f"{chunk:06d}.{kind}" for chunk in range(3) for kind in ("facts", "samples"))]
    )


@pytest.mark.parametrize(("strategy", "world_size"), [(None, 1), ({"pipeline_size": 2, "num_microbatches": 2}, 2)])
@pytest.mark.filterwarnings("ignore")
def test_same_training(pool: RankPool, file, tmp_path, strategy, world_size):
    arguments = strategy, str(file)
    memory, disk = (
        pool.run(workers.trained, *arguments, lazy, str(tmp_path / "cache"), world_size=world_size)
        for lazy in (False, True)
    )
    for one, other in zip(memory, disk, strict=True):
        # Cuts follow measured times, and with them the order in which gradients are summed.
        torch.testing.assert_close(other, one, rtol=0, atol=1e-9 if strategy else 0)
    assert torch.isfinite(disk[0]["val_loss"])


@pytest.mark.parametrize("lazy", [False, True])
def test_a_database_that_this_process_has_open(tmp_path, lazy):
    lmdb = pytest.importorskip("lmdb")
    path = workers.write_file(tmp_path / "alloys.aselmdb", workers.frames(3))
    options = {"lazy": lazy, "cutoff": 3.0, "cache_dir": tmp_path / "cache"}
    with (
        lmdb.open(str(path), subdir=False),
        pytest.raises(ValueError, match=r"alloys.aselmdb .*this process has it open: close the connection"),
    ):
        open_dataset(path, **options)
    assert len(open_dataset(path, **options)) == 4
