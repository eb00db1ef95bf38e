"""What the ranks of tests on datasets that are read from the disk run."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import tiny
import torch
from ase import Atoms

from lightning_januspipe.data import emt_structures


def write_file(path: Path, frames: list[Atoms]) -> Path:
    """Writes structures in the format that the ending of the file names."""
    if path.suffix in (".aselmdb", ".lmdb"):
        write_lmdb(path, frames)
    elif path.suffix == ".db":
        from ase.db import connect

        with connect(path) as database:
            for atoms in frames:
                database.write(atoms, data=dict(atoms.info))
    else:
        ase.io.write(path, frames)
    return path


def write_lmdb(path: Path, frames: list[Atoms]) -> None:
    """Writes rows of ASE into LMDB, with an id that was deleted between them."""
    import lmdb
    from ase.db.row import atoms2dict
    from ase.io.jsonio import encode

    with lmdb.open(str(path), subdir=False, map_size=1 << 26) as database, database.begin(write=True) as transaction:
        for index, atoms in enumerate(frames):
            row = atoms2dict(atoms) | {
                "mtime": 1.0,
                "ctime": 1.0,
                "user": "",
                "key_value_pairs": {},
                "data": atoms.info,
            }
            row |= dict((atoms.calc.results if atoms.calc else {}).items())
            row |= {"calculator": "unknown", "calculator_parameters": {}} if atoms.calc else {}
            transaction.put(str(index + 1 + (index > 1)).encode(), zlib.compress(encode(row).encode()))
        transaction.put(b"3", zlib.compress(encode({}).encode()))
        transaction.put(b"nextid", zlib.compress(encode(len(frames) + 2).encode()))
        transaction.put(b"deleted_ids", zlib.compress(encode([3]).encode()))
        transaction.put(b"metadata", zlib.compress(encode({}).encode()))


def frames(number: int) -> list[Atoms]:
    """Returns alloys with kinds and weights, and isolated atoms."""
    found = emt_structures(number, species=["Cu", "Ni", "Al"], sizes=(4, 8), seed=3)
    for index, atoms in enumerate(found):
        atoms.info.update({"config_type": "odd"} if index % 2 else {}, config_weight=1.0 + index % 3)
    lone = Atoms("Cu")
    lone.info.update(energy=-3.0, config_type="IsolatedAtom", config_weight=1.0)
    return [*found, lone]


def trained(strategy: dict[str, Any] | None, file: str, lazy: bool, cache: str) -> dict[str, torch.Tensor]:
    """Returns the parameters, the statistics and the logged validation loss after two epochs."""
    from lightning_januspipe.data import ASEDataModule
    from lightning_januspipe.testing import quiet_trainer

    data = ASEDataModule(
        file,
        val_size=4,
        stratify=True,
        species=["Cu", "Ni", "Al"],
        batch_size=4,
        dtype="float64",
        config_type_weights={"odd": 2.0},
        weight_key="config_weight",
        lazy=lazy,
        cache_dir=cache,
    )
    torch.manual_seed(5)
    trainer = quiet_trainer(strategy, max_epochs=2)
    module = tiny.module(num_layers=2, learning_rate=1e-3)
    trainer.fit(module, data)
    found = data.statistics()
    numbers = [*found.energy_shifts, found.energy_rms, found.force_rms, found.avg_num_neighbors]
    loss = trainer.callback_metrics["val_loss"].detach().clone()
    return {"val_loss": loss, "statistics": torch.tensor(numbers)} | {
        name: value.detach().clone() for name, value in module.named_parameters()
    }


def opened(file: str, cache: str) -> tuple[float, list[str]]:
    """Opens a file at about the same time as other ranks; returns a sum over all samples, and the cache's files."""
    from lightning_januspipe.data import DiskDataset

    dataset = DiskDataset(file, cutoff=4.0, dtype="float64", cache_dir=cache, chunk_size=3)
    total = sum(float(dataset[index]["positions"].sum()) for index in range(len(dataset)))
    return total, sorted(path.name for path in dataset._cache.folder.iterdir() if path.suffix != ".lock")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Returns whether two samples or results are the same, bit by bit."""
    return first.keys() == second.keys() and all(
        np.array_equal(value.numpy(), second[name].numpy(), equal_nan=True) and value.dtype == second[name].dtype
        for name, value in first.items()
    )
