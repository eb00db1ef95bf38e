"""Reads structures from files, and turns ASE ``Atoms`` into samples: the tensors of one structure with its labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ase.io
import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from ase.geometry import wrap_positions
from numpy.typing import NDArray
from torch import Tensor

from lightning_januspipe import keys
from lightning_januspipe.data.labels import Floats, LabelKeys, read_labels
from lightning_januspipe.data.lmdb_rows import LMDB, LmdbRows
from lightning_januspipe.data.neighbors import neighbor_list
from lightning_januspipe.data.units import unit_factor

_FAR = 100.0
"""Positions with components above this, in Å, are moved, because differences of float32 would lose digits."""

ADD_SPECIES = "Add it to `species`, or leave out the structure."

EXTENDED_XYZ = (".extxyz", ".xyz")
"""Endings of extended XYZ files."""

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


def resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """Returns the floating-point type of the samples.

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
    """Reads all frames of a file.

    Args:
        path: An ASE database (``.db``, or ``.aselmdb`` and ``.lmdb`` for rows in LMDB), extended XYZ, or anything else
            that ``ase.io.read`` reads. The key-value pairs and data of database rows are put in ``Atoms.info``.

    Returns:
        The frames in the order of the file (database rows by id); at least one.

    Raises:
        ValueError: There is no such file, it holds no structure, or ASE cannot read it.
    """
    path = require_file(path)
    try:
        if path.suffix == ".db":
            frames = _read_database(path)
        elif path.suffix in LMDB:
            rows = LmdbRows(path)
            frames = [atoms_of_row(rows.row(identity)) for identity in rows.ids()]
        else:
            if path.suffix in EXTENDED_XYZ:
                frame_places(path)
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


def require_file(path: str | Path) -> Path:
    """Returns the path of a file that is there and not empty, or of the folder of an LMDB database.

    Raises:
        ValueError: There is no such file, or it is empty.
    """
    path = Path(path)
    content = path / "data.mdb" if path.is_dir() and path.suffix in LMDB else path
    if content.is_dir():
        raise ValueError(f"data file {path} is a folder; expected a file, or a pattern such as '{path}/*.extxyz'")
    if not content.is_file():
        raise ValueError(f"no such data file: {path} (looked in {path.absolute().parent}); check the path")
    if content.stat().st_size == 0:
        raise ValueError(f"data file {path} is empty; expected at least one structure")
    return path


def frame_places(path: Path) -> list[int]:
    """Returns the byte at which each frame of an extended XYZ file begins, and the byte at which the last one ends.

    Raises:
        ValueError: The file is no extended XYZ, or has an empty line between frames, where ASE would stop reading.
    """
    places, place, num_lines = [0], 0, 0
    with open(path, "rb") as file:
        while (line := file.readline()).strip():
            if not line.strip().isdigit():
                raise ValueError(
                    f"frame {len(places) - 1} begins with {line.decode(errors='replace').strip()[:40]!r}; expected "
                    "its number of atoms"
                )
            lines = [file.readline() for _ in range(int(line) + 1)]
            if not all(lines):
                raise ValueError(f"frame {len(places) - 1} ends too early; expected {int(line)} atoms")
            place += len(line) + sum(map(len, lines))
            num_lines += 1 + len(lines)
            places.append(place)
        if any(rest.strip() for rest in file):
            raise ValueError(
                f"line {num_lines + 1} is empty, and ASE would ignore what follows it; remove the empty lines between "
                "frames"
            )
    return places


def _read_database(path: Path) -> list[Atoms]:
    from ase.db import connect

    with connect(path) as database:
        return [atoms_of_row(row) for row in database.select(sort="id")]


def atoms_of_row(row: Any) -> Atoms:
    """Returns the structure of a row of an ASE database, with its key-value pairs and data in ``Atoms.info``."""
    atoms = row.toatoms()
    atoms.info.update(row.key_value_pairs)
    atoms.info.update(row.data)
    return atoms


def check_database_units(path: str | Path, labels: LabelKeys) -> None:
    """Compares the units that an ASE database names, as SchNetPack writes them, with those that are expected.

    Raises:
        ValueError: Lengths are not in Å, or a label has another unit than ``labels`` says.
    """
    from ase.db import connect

    with connect(path) as database:
        metadata = database.metadata
    length = metadata.get("_distance_unit", "Ang")
    if length not in ("Ang", "Angstrom", "Å", "A"):
        raise ValueError(f"{path} has lengths in {length}; expected Å, as everything that ASE reads")
    found = metadata.get("_property_unit_dict", {})
    for kind in ("energy", "forces", "stress"):
        name, unit = getattr(labels, f"{kind}_key"), getattr(labels, f"{kind}_unit")
        given = found.get(name)
        if given and not np.isclose(unit_factor(kind, _spelled_out(given)), labels.factor(kind), rtol=1e-6):
            raise ValueError(f"{path} has {name!r} in {given}, and {kind}_unit={unit!r}; set {kind}_unit={given!r}")


def _spelled_out(unit: str) -> str:
    """Returns a unit of SchNetPack, such as ``eV/Ang/Ang/Ang``, as it is written here."""
    energy, *lengths = unit.split("/")
    return f"{energy}/{lengths[0]}^3" if len(lengths) == 3 and len(set(lengths)) == 1 else unit


def validate_species(species: Sequence[str]) -> list[str]:
    """Returns the chemical symbols as a list, after checks.

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
    """Returns the chemical symbols in the structures, sorted by atomic number, without placeholders (``X``)."""
    numbers = sorted({int(number) for atoms in structures for number in atoms.numbers if number})
    return [chemical_symbols[number] for number in numbers]


class StructureArrays(NamedTuple):
    """Holds what a sample of N atoms and E edges is made of, whatever its type and its list of species.

    Attributes:
        positions: (N, 3) positions in Å.
        numbers: (N,) atomic numbers.
        cell: (3, 3) cell vectors in Å as rows.
        pbc: (3,) whether each direction is periodic.
        edge_index: (2, E) sources and targets, sorted by target.
        cell_shifts: (E, 3) integer multiples of the cell vectors.
        energy: Energy in eV.
        forces: (N, 3) forces in eV/Å.
        stress: (3, 3) stress in eV/Å³.
    """

    positions: Floats
    numbers: NDArray[np.int64]
    cell: Floats
    pbc: NDArray[np.bool_]
    edge_index: NDArray[np.int64]
    cell_shifts: NDArray[np.int64]
    energy: float
    forces: Floats
    stress: Floats

    def sample(self, index: NDArray[np.int64], dtype: torch.dtype) -> dict[str, Tensor]:
        """Returns the sample.

        Args:
            index: (N,) index of each atom's species.
            dtype: Type of the floating-point tensors.
        """
        return {
            keys.POSITIONS: torch.tensor(self.positions, dtype=dtype),
            keys.SPECIES: torch.from_numpy(index),
            keys.ATOMIC_NUMBERS: torch.tensor(self.numbers, dtype=torch.int64),
            keys.EDGE_INDEX: torch.from_numpy(self.edge_index),
            keys.CELL_SHIFTS: torch.tensor(self.cell_shifts, dtype=dtype),
            keys.CELL: torch.tensor(self.cell, dtype=dtype).unsqueeze(0),
            keys.BATCH: torch.zeros(len(self.numbers), dtype=torch.int64),
            keys.ENERGY: torch.tensor(self.energy, dtype=torch.float64).reshape(1),
            keys.FORCES: torch.tensor(self.forces, dtype=dtype),
            keys.STRESS: torch.tensor(self.stress, dtype=dtype).unsqueeze(0),
            keys.PBC: torch.tensor(self.pbc).unsqueeze(0),
        }


def atoms_to_sample(
    atoms: Atoms,
    *,
    species: Sequence[str],
    cutoff: float,
    dtype: torch.dtype | str | None = None,
    labels: LabelKeys | None = None,
    require_labels: bool = True,
    source: str = "structure",
) -> dict[str, Tensor]:
    """Turns one structure into a sample: a batch of one structure, with the keys of ``lightning_januspipe.keys``.

    Args:
        atoms: Structure of N atoms.
        species: Chemical symbols; the index of a symbol in this list is its species index.
        cutoff: Cutoff of the neighbour list in Å.
        dtype: Type of the floating-point tensors; None for ``torch.get_default_dtype()``.
        labels: Names and units of the labels; None for ``LabelKeys()``.
        require_labels: Whether energy and forces are required. Otherwise missing ones become NaN.
        source: Name of the structure in error messages, for instance ``"water.extxyz, frame 3"``.

    Returns:
        Tensors of N atoms, E edges and one structure (``batch`` is all zero).

    Raises:
        ValueError: There are no atoms, an element is not in ``species``, a label is not usable (see
            :func:`~lightning_januspipe.data.labels.read_labels`), or there is no neighbour list (see
            :func:`~lightning_januspipe.data.neighbors.neighbor_list`).
    """
    real = resolve_dtype(dtype)
    index = species_index(atoms, species, source)
    names = labels or LabelKeys()
    return structure_arrays(atoms, cutoff, names, require_labels=require_labels, source=source).sample(index, real)


def structure_arrays(
    atoms: Atoms, cutoff: float, labels: LabelKeys, *, require_labels: bool, source: str
) -> StructureArrays:
    """Reads the labels of one structure and finds its neighbours; for arguments and errors see atoms_to_sample."""
    if len(atoms) == 0:
        raise ValueError(f"{source} has no atoms; remove it")
    pbc = np.array(atoms.pbc, dtype=bool)
    cell = np.array(atoms.cell, dtype=np.float64) if pbc.any() else np.zeros((3, 3))
    try:
        positions = _near_origin(atoms.positions, cell, pbc)
        edge_index, cell_shifts = neighbor_list(positions, cell, pbc, cutoff)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    values = read_labels(atoms, labels, required=require_labels, source=source)
    return StructureArrays(
        positions=positions,
        numbers=np.array(atoms.numbers, dtype=np.int64),
        cell=cell,
        pbc=pbc,
        edge_index=edge_index,
        cell_shifts=cell_shifts,
        energy=float(values[keys.ENERGY]),
        forces=values[keys.FORCES],
        stress=values[keys.STRESS],
    )


def _near_origin(positions: Floats, cell: Floats, pbc: NDArray[np.bool_]) -> Floats:
    """Returns positions that float32 resolves: atoms that have moved far, as in long trajectories, are brought back."""
    if len(positions) == 0 or not np.isfinite(positions).all() or np.abs(positions).max() < _FAR:
        return positions
    if pbc.any() and np.linalg.matrix_rank(cell[pbc]) == pbc.sum():
        positions = np.asarray(wrap_positions(positions, cell, pbc))
    return np.asarray(positions - positions.mean(axis=0))


def species_index(
    atoms: Atoms,
    species: Sequence[str],
    source: str,
    remedy: str = ADD_SPECIES,
) -> NDArray[np.int64]:
    """Returns the species index (N,) of each atom.

    Args:
        atoms: Structure of N atoms.
        species: Chemical symbols by species index.
        source: Name of the structure in error messages.
        remedy: What the error message tells to do about an unknown species.

    Raises:
        ValueError: An element is not in ``species``.
    """
    index = {symbol: number for number, symbol in enumerate(species)}
    symbols = [chemical_symbols[number] for number in np.unique(atoms.numbers)]
    require_known(symbols, species, source, remedy)
    return np.array([index[symbol] for symbol in atoms.symbols], dtype=np.int64)


def require_known(symbols: Sequence[str], species: Sequence[str], source: str, remedy: str = ADD_SPECIES) -> None:
    """Refuses elements that are not among the species; for the arguments see :func:`species_index`.

    Raises:
        ValueError: An element is not in ``species``.
    """
    unknown = [symbol for symbol in symbols if symbol not in species]
    if unknown:
        raise ValueError(f"{source} holds the unknown species {', '.join(unknown)}; known: {list(species)}. {remedy}")
