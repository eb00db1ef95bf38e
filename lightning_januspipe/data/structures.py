"""Reads structures from files, and turns ASE ``Atoms`` into samples: the tensors of one structure with its labels.

Labels are looked up in the results of the calculator that is attached to the ``Atoms`` (where ``ase.io`` puts energy,
forces and stress), then in ``Atoms.info`` and ``Atoms.arrays`` (where it puts everything else, for instance
``REF_energy``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from numpy.typing import NDArray
from torch import Tensor

from lightning_januspipe import keys
from lightning_januspipe.data.neighbors import neighbor_list

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Return the floating-point type of the samples.

    Args:
        dtype: ``"float32"``, ``"float64"``, the torch types of these names, or None for ``torch.get_default_dtype()``.

    Raises:
        ValueError: Anything else.
    """
    if dtype is None:
        return torch.get_default_dtype()
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in _DTYPES.values():
        raise ValueError(f"dtype={dtype!r}; expected 'float32', 'float64' or None for the default of torch")
    assert resolved is not None
    return resolved


def read_structures(path: str | Path) -> list[Atoms]:
    """Read all frames of a file.

    Args:
        path: An ASE database (``.db``), extended XYZ, or anything else that ``ase.io.read`` reads. The key-value pairs
            and data of database rows are put in ``Atoms.info``.

    Returns:
        The frames in the order of the file (database rows by id); at least one.

    Raises:
        ValueError: There is no such file, it holds no structure, or ASE cannot read it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such data file: {path} (looked in {path.absolute().parent}); check the path")
    if path.stat().st_size == 0:
        raise ValueError(f"data file {path} is empty; expected at least one structure")
    try:
        if path.suffix == ".db":
            frames = _read_database(path)
        else:
            # Without the flag, ASE reads the text after an "@" in a file name as a range of frames.
            read = ase.io.read(path, index=":", do_not_split_by_at_sign=True)
            frames = read if isinstance(read, list) else [read]
    except Exception as error:  # the parsers of the formats raise errors of any type
        raise ValueError(
            f"ASE cannot read {path} ({type(error).__name__}: {error}); expected extended XYZ, an ASE database "
            "(.db) or another format of ase.io"
        ) from error
    if not frames:
        raise ValueError(f"data file {path} holds no structure; expected at least one")
    return frames


def _read_database(path: Path) -> list[Atoms]:
    from ase.db import connect

    frames = []
    with connect(path) as database:
        for row in database.select(sort="id"):
            atoms = row.toatoms()
            atoms.info.update(row.key_value_pairs)
            atoms.info.update(row.data)
            frames.append(atoms)
    return frames


def validate_species(species: Sequence[str]) -> list[str]:
    """Return the chemical symbols as a list, after checks.

    Raises:
        ValueError: The list is empty, names an element twice, or holds a string that is no chemical symbol.
    """
    symbols = list(species)
    if isinstance(species, str) or not symbols:
        raise ValueError(f"species={species!r}; expected a list of chemical symbols such as ['H', 'O'], or 'auto'")
    unknown = [symbol for symbol in symbols if symbol not in chemical_symbols[1:]]
    if unknown:
        raise ValueError(f"species {symbols} holds {unknown}; expected chemical symbols such as 'H' and 'Cu'")
    if len(set(symbols)) < len(symbols):
        raise ValueError(f"species {symbols} names an element more than once; remove the repetition")
    return symbols


def find_species(structures: Sequence[Atoms]) -> list[str]:
    """Return the chemical symbols that occur in the structures, sorted by atomic number."""
    numbers = sorted({int(number) for atoms in structures for number in atoms.numbers})
    return [chemical_symbols[number] for number in numbers]


def atoms_to_sample(
    atoms: Atoms,
    *,
    species: Sequence[str],
    cutoff: float,
    dtype: torch.dtype | str | None = None,
    energy_key: str = "energy",
    forces_key: str = "forces",
    stress_key: str | None = "stress",
    require_labels: bool = True,
    source: str = "structure",
) -> dict[str, Tensor]:
    """Turn one structure into a sample: a batch of one structure, with the keys of ``lightning_januspipe.keys``.

    Args:
        atoms: Structure of N atoms.
        species: Chemical symbols; the index of a symbol in this list is its species index.
        cutoff: Cutoff of the neighbour list in Å.
        dtype: Type of the floating-point tensors; None for ``torch.get_default_dtype()``.
        energy_key: Name of the energy label (eV).
        forces_key: Name of the forces label (N, 3) (eV/Å).
        stress_key: Name of the stress label (eV/Å³, ASE's sign), as (6,) in Voigt order, (3, 3) or (9,). None to
            read no stress. A structure without a stress label or without a periodic direction gets NaN.
        require_labels: Whether energy and forces are required. Otherwise missing ones become NaN.
        source: Name of the structure in error messages, for instance ``"water.extxyz, frame 3"``.

    Returns:
        Tensors of N atoms, E edges and one structure (``batch`` is all zero).

    Raises:
        ValueError: There are no atoms, an element is not in ``species``, a required label is missing, a label has the
            wrong shape, is NaN or infinite, or was computed for other positions, or there is no
            neighbour list (see :func:`~lightning_januspipe.data.neighbors.neighbor_list`).
    """
    real = resolve_dtype(dtype)
    if len(atoms) == 0:
        raise ValueError(f"{source} has no atoms; remove it")
    pbc = np.array(atoms.pbc, dtype=bool)
    cell = np.array(atoms.cell, dtype=np.float64) if pbc.any() else np.zeros((3, 3))
    try:
        edge_index, cell_shifts = neighbor_list(atoms.positions, cell, pbc, cutoff)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error

    energy = _energy_label(atoms, energy_key, require_labels, source)
    forces = _forces_label(atoms, forces_key, require_labels, source)
    stress = _stress_label(atoms, stress_key, source)
    return {
        keys.POSITIONS: torch.tensor(atoms.positions, dtype=real),
        keys.SPECIES: torch.from_numpy(_species_index(atoms, species, source)),
        keys.ATOMIC_NUMBERS: torch.tensor(atoms.numbers, dtype=torch.int64),
        keys.EDGE_INDEX: torch.from_numpy(edge_index),
        keys.CELL_SHIFTS: torch.tensor(cell_shifts, dtype=real),
        keys.CELL: torch.tensor(cell, dtype=real).unsqueeze(0),
        keys.BATCH: torch.zeros(len(atoms), dtype=torch.int64),
        keys.ENERGY: torch.tensor([energy], dtype=real),
        keys.FORCES: torch.tensor(forces, dtype=real),
        keys.STRESS: torch.tensor(stress, dtype=real).unsqueeze(0),
        keys.PBC: torch.tensor(pbc).unsqueeze(0),
    }


def _species_index(atoms: Atoms, species: Sequence[str], source: str) -> NDArray[np.int64]:
    index = {symbol: number for number, symbol in enumerate(species)}
    unknown = [symbol for symbol in find_species([atoms]) if symbol not in index]
    if unknown:
        raise ValueError(
            f"{source} holds the unknown species {', '.join(unknown)}; known: {list(species)}. Add it to `species`, or "
            "leave out the structure."
        )
    return np.array([index[symbol] for symbol in atoms.symbols], dtype=np.int64)


def _energy_label(atoms: Atoms, key: str, required: bool, source: str) -> float:
    value = _find_label(atoms, key, "energy", required, source)
    if value is None:
        return float("nan")
    array = _as_array(value, key, source)
    if array.size != 1:
        raise ValueError(f"{source}: energy label {key!r} has shape {array.shape}; expected one number in eV")
    return float(_finite(array, key, source).reshape(()))


def _forces_label(atoms: Atoms, key: str, required: bool, source: str) -> NDArray[np.float64]:
    value = _find_label(atoms, key, "forces", required, source)
    if value is None:
        return np.full((len(atoms), 3), np.nan)
    array = _as_array(value, key, source)
    if array.shape != (len(atoms), 3):
        raise ValueError(
            f"{source}: forces label {key!r} has shape {array.shape}; expected {(len(atoms), 3)} in eV/Å, one row for "
            "each atom"
        )
    return _finite(array, key, source)


def _stress_label(atoms: Atoms, key: str | None, source: str) -> NDArray[np.float64]:
    # Stress is per volume: a structure without a periodic direction has none, even if a calculator returns one.
    value = _find_label(atoms, key, "stress", False, source) if key is not None and atoms.pbc.any() else None
    if value is None:
        return np.full((3, 3), np.nan)
    array = _finite(_as_array(value, str(key), source), str(key), source)
    if array.shape == (6,):
        xx, yy, zz, yz, xz, xy = array
        return np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]])
    if array.shape in ((3, 3), (9,)):
        return array.reshape(3, 3)
    raise ValueError(
        f"{source}: stress label {key!r} has shape {array.shape}; expected (6,) (xx, yy, zz, yz, xz, xy), (3, 3) or "
        "(9,) in eV/Å³"
    )


def _find_label(atoms: Atoms, key: str, label: str, required: bool, source: str) -> Any:
    results = getattr(atoms.calc, "results", {})
    if results.get(key) is not None:
        _check_not_stale(atoms, key, label, source)
        return results[key]
    for place in (atoms.info, atoms.arrays):
        if place.get(key) is not None:
            return place[key]
    if not required:
        return None
    own_arrays = [name for name in atoms.arrays if name not in ("numbers", "positions")]
    raise ValueError(
        f"{source} has no {label} label {key!r}. Keys found: calculator results {sorted(results)}, info "
        f"{sorted(map(str, atoms.info))}, arrays {sorted(own_arrays)}. Set `{label}_key` to the one that holds the "
        f"{label}."
    )


def _check_not_stale(atoms: Atoms, key: str, label: str, source: str) -> None:
    # A calculator keeps its results when atoms move, and check_state finds that.
    if getattr(atoms.calc, "atoms", None) is None or not hasattr(atoms.calc, "check_state"):
        return
    changes = [change for change in atoms.calc.check_state(atoms) if change in ("positions", "numbers", "cell", "pbc")]
    if changes:
        raise ValueError(
            f"{source}: the calculator's {label} {key!r} was computed for other {', '.join(changes)} than the "
            "structure has. Compute it again, or store it in Atoms.info or Atoms.arrays and remove the calculator."
        )


def _as_array(value: Any, key: str, source: str) -> NDArray[np.float64]:
    try:
        return np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: label {key!r} is {value!r}; expected numbers") from error


def _finite(array: NDArray[np.float64], key: str, source: str) -> NDArray[np.float64]:
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise ValueError(
            f"{source}: label {key!r} has NaN or infinite values ({bad} of {array.size}). Remove the structure or "
            "correct the label."
        )
    return array
