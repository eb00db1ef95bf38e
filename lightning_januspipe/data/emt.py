"""Makes data without a download: metals and alloys labelled by ASE's effective medium theory (EMT).

EMT is a classical potential with a few parameters for seven fcc metals. It is fast, smooth and many-body, so its data
is good for tests, examples and measurements of throughput, but not for science.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from typing_extensions import override

from lightning_januspipe.data.datamodule import StructureDataModule
from lightning_januspipe.data.dataset import StructureDataset
from lightning_januspipe.data.splits import Split
from lightning_januspipe.data.statistics import SampleDataset
from lightning_januspipe.data.structures import validate_species
from lightning_januspipe.data.tasks import validate_tasks

EMT_METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")

# Cubic lattice constants of fcc in Å (experiment, as in ase.data.reference_states).
_LATTICE_CONSTANTS = {"Al": 4.05, "Ni": 3.52, "Cu": 3.61, "Pd": 3.89, "Ag": 4.09, "Pt": 3.92, "Au": 4.08}

_ATOMS_PER_CELL = 4  # of the cubic fcc cell

TASKS: dict[str, Callable[[], Any]] = {
    "emt": EMT,
    # A pair potential with about the bond length of these metals: data of another kind and with other energies.
    "morse": lambda: MorsePotential(epsilon=0.35, r0=2.7, rho0=3.9, rcut1=1.7, rcut2=2.2),
}
"""What labels the structures of each task."""


def label_with_emt(atoms: Atoms) -> Atoms:
    """Returns a copy of a structure with the energy (eV), forces (eV/Å) and stress (eV/Å³) of EMT.

    Stress is left out where the structure is not periodic in all directions.
    """
    return _labelled(atoms, EMT())


def _labelled(atoms: Atoms, calculator: Any) -> Atoms:
    labelled = atoms.copy()
    labelled.calc = calculator
    results = {"energy": labelled.get_potential_energy(), "forces": labelled.get_forces()}
    if labelled.pbc.all():
        results["stress"] = labelled.get_stress()
    labelled.calc = SinglePointCalculator(labelled, **results)
    return labelled


def emt_structures(
    num_structures: int,
    *,
    species: Sequence[str] = ("Cu", "Ni", "Al"),
    sizes: Sequence[int] = (4, 8, 16, 32),
    rattle: float = 0.12,
    strain: float = 0.04,
    vacancy_probability: float = 0.2,
    seed: int = 0,
    stream: int = 0,
) -> list[Atoms]:
    """Makes periodic fcc crystals, randomly occupied, strained and rattled, with EMT's labels.

    Each structure has a random size, a random set of elements in random order, the mean lattice constant of these,
    a symmetric strain, normally distributed displacements, and sometimes a vacancy. Structure n depends on ``seed``,
    ``stream`` and n only, not on the number of structures.

    Args:
        num_structures: Number of structures.
        species: Elements to choose from, all in ``EMT_METALS``.
        sizes: Numbers of atoms (without vacancy) to choose from, multiples of 4.
        rattle: Largest standard deviation of the displacements in Å; each structure has its own, between 0 and this.
        strain: Largest strain component.
        vacancy_probability: Probability of a missing atom, for structures of at least 8 atoms.
        seed: Seed of all random choices.
        stream: Index of one of the independent streams of a seed, such as training and validation data.

    Returns:
        Structures with energy, forces and stress in a ``SinglePointCalculator``.

    Raises:
        ValueError: EMT has no such element, a size is not a positive multiple of 4, or a number is out of its range.
    """
    symbols = validate_species(species)
    _check_options(symbols, sizes, num_structures, rattle, strain, vacancy_probability)
    return [
        label_with_emt(
            _random_alloy(
                np.random.default_rng([seed, stream, number]), symbols, sizes, rattle, strain, vacancy_probability
            )
        )
        for number in range(num_structures)
    ]


def _check_options(
    symbols: list[str], sizes: Sequence[int], num_structures: int, rattle: float, strain: float, vacancy: float
) -> None:
    foreign = [symbol for symbol in symbols if symbol not in EMT_METALS]
    if foreign:
        raise ValueError(f"EMT has no fcc metal {foreign}; expected species in {list(EMT_METALS)}")
    if not sizes or any(size < 1 or size % _ATOMS_PER_CELL for size in sizes):
        raise ValueError(f"sizes={list(sizes)}; expected numbers of atoms that are multiples of {_ATOMS_PER_CELL}")
    if num_structures < 0:
        raise ValueError(f"num_structures={num_structures}; expected 0 or more")
    if rattle < 0 or not 0 <= strain < 0.5 or not 0 <= vacancy <= 1:
        raise ValueError(
            f"rattle={rattle} Å, strain={strain}, vacancy_probability={vacancy}; expected rattle >= 0, "
            "0 <= strain < 0.5 and a probability between 0 and 1"
        )


def _random_alloy(
    rng: np.random.Generator,
    symbols: list[str],
    sizes: Sequence[int],
    rattle: float,
    strain: float,
    vacancy_probability: float,
) -> Atoms:
    size = int(rng.choice(list(sizes)))
    elements = rng.choice(symbols, size=int(rng.integers(1, len(symbols) + 1)), replace=False)
    occupation = [str(symbol) for symbol in rng.choice(elements, size=size)]
    lattice_constant = float(np.mean([_LATTICE_CONSTANTS[symbol] for symbol in occupation]))
    atoms = bulk("Cu", "fcc", a=lattice_constant, cubic=True).repeat(cubic_repeats(size // _ATOMS_PER_CELL))
    atoms.set_chemical_symbols(occupation)

    components = rng.uniform(-strain, strain, size=(3, 3))
    deformation = np.eye(3) + (components + components.T) / 2
    atoms.set_cell(atoms.cell.array @ deformation, scale_atoms=True)
    atoms.positions += rng.normal(size=(size, 3)) * rng.uniform(0.0, rattle)
    if rng.random() < vacancy_probability and size >= 2 * _ATOMS_PER_CELL:
        del atoms[int(rng.integers(size))]
    return atoms


def cubic_repeats(num_cells: int) -> tuple[int, int, int]:
    """Returns the three factors of a number of cells whose block is the most cubic."""
    triples = [
        (num_cells // (b * c), b, c)
        for c in range(1, num_cells + 1)
        for b in range(c, num_cells + 1)
        if num_cells % (b * c) == 0 and num_cells // (b * c) >= b
    ]
    return min(triples, key=lambda repeats: repeats[0] - repeats[2])


class EMTDataModule(StructureDataModule):
    """Makes rattled, strained alloys with energies, forces and stress from ASE's EMT.

    Every process makes the same data from ``seed``, a few hundred structures in a few seconds. Files are written only
    if ``save_dir`` is given. The prediction data is the test data.

    .. code-block:: yaml

        data:
          class_path: lightning_januspipe.data.EMTDataModule
          init_args:
            num_train: 200
            cutoff: 5.0
            batch_size: 8
    """

    def __init__(
        self,
        num_train: int = 200,
        num_val: int = 40,
        num_test: int = 40,
        *,
        species: Sequence[str] = ("Cu", "Ni", "Al"),
        sizes: Sequence[int] = (4, 8, 16, 32),
        rattle: float = 0.12,
        strain: float = 0.04,
        vacancy_probability: float = 0.2,
        seed: int = 0,
        cutoff: float = 5.0,
        dtype: Literal["float32", "float64"] | None = None,
        save_dir: str | None = None,
        tasks: Sequence[Literal["emt", "morse"]] = (),
        **loader: Any,
    ) -> None:
        """Keeps the options; ``setup`` makes the structures.

        Args:
            num_train: Number of training structures.
            num_val: Number of validation structures.
            num_test: Number of test structures.
            species: Elements, all in ``EMT_METALS``, in the order of the species index.
            sizes: Numbers of atoms (without vacancy) to choose from, multiples of 4.
            rattle: Largest standard deviation of the displacements in Å.
            strain: Largest strain component.
            vacancy_probability: Probability of a missing atom, for structures of at least 8 atoms.
            seed: Seed of the structures.
            cutoff: Cutoff of the neighbour lists in Å.
            dtype: Type of the floating-point tensors; None for ``torch.get_default_dtype()`` in ``setup``.
            save_dir: Folder for ``train.extxyz``, ``val.extxyz`` and ``test.extxyz``; None to write nothing.
            tasks: What labels the structures, in turns: EMT, or a pair potential with the same bond length for all
                elements. Samples then have ``task``, ``charge`` and ``spin``. Nothing: EMT labels all.
            loader: Options of :class:`StructureDataModule`.

        Raises:
            ValueError: An option is out of its range (see :func:`emt_structures`).
        """
        super().__init__(**loader)
        if num_train < 1 or num_val < 0 or num_test < 0:
            raise ValueError(
                f"num_train={num_train}, num_val={num_val}, num_test={num_test}; expected at least one training "
                "structure and no negative number"
            )
        self._species, self._tasks = validate_species(species), validate_tasks(tasks)
        if unknown := [task for task in self._tasks if task not in TASKS]:
            raise ValueError(f"tasks={list(tasks)} holds {unknown}; expected names in {list(TASKS)}")
        _check_options(self._species, sizes, num_train, rattle, strain, vacancy_probability)
        self._numbers = {"train": num_train, "val": num_val, "test": num_test}
        self._sizes = tuple(sizes)
        self._rattle = rattle
        self._strain = strain
        self._vacancy_probability = vacancy_probability
        self._seed = seed
        self._cutoff = cutoff
        self._dtype = dtype
        self._save_dir = save_dir

    @property
    @override
    def species(self) -> list[str]:
        """Returns the chemical symbols in the order of the species index."""
        return list(self._species)

    @property
    @override
    def cutoff(self) -> float:
        """Returns the cutoff of the neighbour lists in Å."""
        return self._cutoff

    @property
    @override
    def tasks(self) -> list[str]:
        """Returns the names of the tasks in the order of the task index."""
        return list(self._tasks)

    @override
    def prepare_data(self) -> None:
        """Writes the structures to ``save_dir``, if it is given."""
        if self._save_dir is None:
            return
        import ase.io

        folder = Path(self._save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        for split in self._numbers:
            ase.io.write(folder / f"{split}.extxyz", self.structures(split), format="extxyz")

    def structures(self, split: str) -> list[Atoms]:
        """Makes the labelled structures of ``"train"``, ``"val"`` or ``"test"``."""
        made = emt_structures(
            self._numbers[split],
            species=self._species,
            sizes=self._sizes,
            rattle=self._rattle,
            strain=self._strain,
            vacancy_probability=self._vacancy_probability,
            seed=self._seed,
            stream=list(self._numbers).index(split),  # changing the size of one split changes no other
        )
        for number, name in zip(range(len(made)), itertools.cycle(self._tasks)):
            made[number] = made[number] if name == "emt" else _labelled(made[number], TASKS[name]())
            made[number].info["task"] = name
        return made

    @override
    def build_dataset(self, split: Split) -> SampleDataset | None:
        """Makes the dataset of one split."""
        if split == "predict":
            return self.dataset("test")
        if self._numbers[split] == 0:
            return None
        return StructureDataset(
            self.structures(split),
            cutoff=self._cutoff,
            species=self._species,
            dtype=self._dtype,
            precompute=self._precompute,
            tasks=self._tasks,
        )
