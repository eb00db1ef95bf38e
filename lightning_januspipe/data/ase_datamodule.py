"""Defines a LightningDataModule of structures in files that ASE reads."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset
from typing_extensions import override

from lightning_januspipe.data.datamodule import StructureDataModule
from lightning_januspipe.data.dataset import StructureDataset
from lightning_januspipe.data.joined_dataset import Files, check_files, find_files, open_datasets
from lightning_januspipe.data.labels import LabelKeys
from lightning_januspipe.data.references import References, choose_references, isolated_energies, of_task
from lightning_januspipe.data.splits import Split, as_count, check_size, split_indices
from lightning_januspipe.data.statistics import DatasetStatistics, SampleDataset, dataset_statistics
from lightning_januspipe.data.structures import validate_species
from lightning_januspipe.data.tasks import validate_tasks


class ASEDataModule(StructureDataModule):
    """Reads structures from files in the formats of ASE: extended XYZ, ASE databases (``.db``) and others.

    Validation and test data are read from files of their own or split off ``train_file``. The split depends on ``seed``
    and the number of structures only, so that it is the same in every process.

    .. code-block:: yaml

        data:
          class_path: lightning_januspipe.data.ASEDataModule
          init_args:
            train_file: water.extxyz
            val_size: 0.1
            cutoff: 5.0
            batch_size: 4
    """

    def __init__(
        self,
        train_file: Files,
        *,
        val_file: Files | None = None,
        test_file: Files | None = None,
        predict_file: Files | None = None,
        replay_file: Files | None = None,
        replay_ratio: float = 1.0,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        seed: int = 0,
        stratify: bool = False,
        cutoff: float = 5.0,
        species: list[str] | Literal["auto"] = "auto",
        reference_energies: References | dict[str, float] | dict[str, dict[str, float]] = "auto",
        energy_key: str | None = "energy",
        forces_key: str | None = "forces",
        stress_key: str | None = "stress",
        virial_key: str | None = None,
        energy_unit: str = "eV",
        forces_unit: str = "eV/Å",
        stress_unit: str = "eV/Å³",
        require_labels: bool = True,
        config_type_weights: dict[str, float] | None = None,
        weight_key: str | None = None,
        tasks: list[str] | None = None,
        predict_task: str | None = None,
        dtype: Literal["float32", "float64"] | None = None,
        lazy: bool | Literal["auto"] = "auto",
        cache_dir: str | None = None,
        **loader: Any,
    ) -> None:
        """Keeps the options; ``setup`` reads the files.

        Args:
            train_file: File with training structures, a pattern such as ``folder/*.extxyz``, or a list of files and
                patterns, whose structures follow one another. The same holds for the files below.
            val_file: File with validation structures.
            test_file: File with test structures.
            predict_file: File with structures to predict, which need no labels. Default: the test data.
            replay_file: File with structures to train on beside those of ``train_file``, such as the ones that the
                initial weights were trained on, so that a potential forgets less of them.
            replay_ratio: How many structures of ``replay_file`` there are for each of ``train_file``. They are chosen
                at random by ``seed``, the same in all epochs and processes, and twice only if the file has too few.
            train_size: Number (int) or fraction (float between 0 and 1) of the structures in ``train_file`` to train
                on; None for all that the other splits leave.
            val_size: Number or fraction of the structures in ``train_file`` for validation, instead of ``val_file``.
            test_size: Number or fraction of the structures in ``train_file`` for testing, instead of ``test_file``.
            seed: Seed of the split.
            stratify: Give each split its share of every kind of structure: of every set of elements, periodic or not,
                and every ``config_type``.
            cutoff: Cutoff of the neighbour lists in Å.
            species: Chemical symbols in the model's order; ``"auto"`` for those in ``train_file``, sorted by atomic
                number.
            reference_energies: Energies of atoms, for ``statistics()``: ``"isolated_atoms"`` takes them from frames of
                one atom with ``config_type=IsolatedAtom`` in ``train_file``, ``"least_squares"`` fits them to the
                training energies, ``"auto"`` fits those that have no such frame, and a mapping from chemical symbols
                gives them in eV. Each task has its own; they may be given as a mapping from tasks to such mappings.
            energy_key: Name of the energy label; None to read no energies.
            forces_key: Name of the forces label; None to read no forces.
            stress_key: Name of the stress label, positive under tension; None to read none.
            virial_key: Name of the virial label, which is -stress × volume in ``energy_unit``; None to read none.
            energy_unit: Unit of energies and virials, such as eV, Hartree or kcal/mol.
            forces_unit: Unit of forces, such as eV/Å, Hartree/Bohr or kcal/mol/Å.
            stress_unit: Unit of stresses, such as eV/Å³, GPa or kbar.
            require_labels: Refuse structures without energy or forces; False leaves missing labels out of the loss.
            config_type_weights: Factors of the loss by ``config_type``; ``Default`` is for structures without one.
            weight_key: Name of a further factor that structures have, such as ``config_weight``; None for none.
            tasks: Names of tasks, such as data sets, in the order of the task index: ``Atoms.info`` then has the
                ``task`` of each structure, and ``charge`` and ``spin`` where they are not 0. None for no tasks.
            predict_task: Task by which the structures of ``predict_file`` are predicted; None for their own.
            dtype: Type of the floating-point tensors; None for ``torch.get_default_dtype()`` in ``setup``.
            lazy: Read structures from the disk when they are used, with neighbour lists that are made once for all
                ranks and jobs; False keeps everything in the memory of each rank. ``"auto"`` does so for extended XYZ,
                ASE databases, LMDB and trajectories of more than 200 MB.
            cache_dir: Folder of these lists; None for ``~/.cache/lightning_januspipe/structures``.
            loader: Options of :class:`StructureDataModule`.

        Raises:
            ValueError: A size is neither a number nor a fraction, a file is given for the same split or is no path,
                ``replay_ratio`` is not positive, or ``predict_task`` is none of the tasks.
        """
        super().__init__(**loader)
        if not 0 < replay_ratio < float("inf"):
            raise ValueError(f"replay_ratio={replay_ratio!r}; expected a positive number, or replay_file=None")
        for name, file, size in (("val", val_file, val_size), ("test", test_file, test_size)):
            if file is not None and size is not None:
                raise ValueError(
                    f"{name}_file={file!r} and {name}_size={size} are both given; expected one of them: give None for "
                    f"the other, on the command line --data.{name}_size null or --data.{name}_file null"
                )
        sizes = {"train": train_size, "val": val_size, "test": test_size}
        self._sizes = {name: as_count(f"{name}_size", size) for name, size in sizes.items()}
        for name, size in self._sizes.items():
            check_size(f"{name}_size", size)
        given = {"val": val_file, "test": test_file, "predict": predict_file, "replay": replay_file}
        self._files = {name: check_files(f"{name}_file", files) for name, files in given.items() if files is not None}
        self._files["train"] = check_files("train_file", train_file)
        self._replay_ratio = replay_ratio
        self._seed = seed
        self._cutoff = cutoff
        self._species = None if species == "auto" else validate_species(species)
        self._references = reference_energies
        self._stratify = stratify
        self._labels = LabelKeys(energy_key, forces_key, stress_key, virial_key, energy_unit, forces_unit, stress_unit)
        self._require_labels = require_labels
        self._config_type_weights, self._weight_key = config_type_weights, weight_key
        self._dtype, self._tasks, self._predict_task = dtype, validate_tasks(tasks), predict_task
        for name in self._tasks or ["default"]:
            choose_references(of_task(reference_energies, name), {}, [])  # names an unknown way
        if predict_task is not None and (predict_file is None or predict_task not in self._tasks):
            raise ValueError(
                f"predict_task={predict_task!r} with tasks={self._tasks} and predict_file={predict_file!r}; expected a "
                "file, and one of the tasks"
            )
        self._lazy, self._cache_dir = lazy, cache_dir
        self._train_source: StructureDataset | None = None

    @property
    @override
    def species(self) -> list[str]:
        """Returns the chemical symbols in the order of the species index; ``"auto"`` reads ``train_file``."""
        return list(self._species if self._species is not None else self._source().species)

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
    def build_dataset(self, split: Split) -> SampleDataset | None:
        """Makes the dataset of one split.

        Raises:
            ValueError: A file or the labels of a structure are not usable, or the sizes of the splits exceed the
                number of structures.
        """
        if split != "train" and split in self._files:
            is_predicted = split == "predict"
            task = self._predict_task if is_predicted else None
            return self._read(split, self.species, require_labels=self._require_labels and not is_predicted, task=task)
        if split == "predict":
            return self.dataset("test")
        if split != "train" and self._sizes[split] is None:
            return None
        source = self._source()
        isolated = self._isolated()
        others = [index for index in range(len(source)) if index not in isolated] or list(isolated)
        of_all = source.kinds() if self._stratify else None
        kinds = None if of_all is None else [of_all[index] for index in others]
        parts = split_indices(len(others), **self._sizes, seed=self._seed, kinds=kinds)
        chosen = {others[i] for i in parts[split]}
        own = Subset(source, sorted(chosen | isolated if split == "train" else chosen))
        return self._with_replay(own) if split == "train" and "replay" in self._files else own

    def _with_replay(self, own: Subset[dict[str, Tensor]]) -> SampleDataset:
        """Returns the training structures with those that are replayed."""
        others = self._read("replay", self.species, require_labels=self._require_labels)
        wanted, rng = round(self._replay_ratio * len(own)), np.random.default_rng([self._seed, 1])
        if not wanted:
            raise ValueError(
                f"replay_ratio={self._replay_ratio} of {len(own)} training structures is less than one structure; "
                "give a larger ratio"
            )
        orders = [rng.permutation(len(others)) for _ in range(-(-wanted // len(others)))]
        chosen = np.sort(np.concatenate(orders)[:wanted])
        return ConcatDataset([own, Subset(others, chosen.tolist())])

    @override
    def splits_of(self, stage: str | None) -> tuple[Split, ...]:
        """Returns the splits of a stage; a fit checks the test data too, before it costs the training."""
        return (*super().splits_of(stage), *(("test",) if stage == "fit" else ()))

    @override
    def statistics(self) -> DatasetStatistics:
        """Returns the statistics of the training data without what is replayed, with the reference energies asked for.

        Raises:
            ValueError: The reference energy of a species is missing, or isolated atoms contradict each other.
        """
        if self._statistics is None:
            lone, references = self._source().facts(sorted(self._isolated())), {}
            for name in self._tasks or ["default"]:
                own = lone.take(lone.of_task(name, alone=True)) if len(self._tasks) > 1 else lone
                given, shown = of_task(self._references, name), name if self._tasks else ""
                references[name] = choose_references(given, isolated_energies(own), self.species, shown)
            train: Any = self.dataset("train")
            train = train.datasets[0] if isinstance(train, ConcatDataset) else train
            self._statistics = dataset_statistics(train, len(self.species), references)
        return self._statistics

    def _isolated(self) -> set[int]:
        """Returns the indices of isolated atoms in the training file, which are all trained on."""
        return set(self._source().isolated_atoms())

    def _source(self) -> StructureDataset:
        if self._train_source is None:
            self._train_source = self._read("train", self._species, require_labels=self._require_labels)
        return self._train_source

    def _read(
        self, name: str, species: list[str] | None, *, require_labels: bool, task: str | None = None
    ) -> StructureDataset:
        """Reads the files of one option."""
        return open_datasets(
            find_files(f"{name}_file", self._files[name]),
            lazy=self._lazy,
            cache_dir=self._cache_dir,
            cutoff=self._cutoff,
            species=species,
            dtype=self._dtype,
            require_labels=require_labels,
            precompute=self._precompute,
            config_type_weights=self._config_type_weights,
            weight_key=self._weight_key,
            tasks=self._tasks,
            task=task,
            **asdict(self._labels),
        )
