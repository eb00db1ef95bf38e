"""LightningDataModules of atomic structures."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from lightning_januspipe.data.budget import BudgetBatchSampler
from lightning_januspipe.data.collate import collate_structures
from lightning_januspipe.data.dataset import StructureDataset
from lightning_januspipe.data.statistics import DatasetStatistics, dataset_statistics
from lightning_januspipe.data.structures import check_species

try:
    from lightning.pytorch import LightningDataModule
except ImportError:  # projects that have the stand-alone package only
    from pytorch_lightning import LightningDataModule  # type: ignore[assignment]

Split = Literal["train", "val", "test", "predict"]
SampleDataset = Dataset[dict[str, Tensor]]
SampleLoader = DataLoader[dict[str, Tensor]]

_SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}


class StructureDataModule(LightningDataModule):
    """Data loaders over four datasets of structures, which subclasses make in :meth:`build_dataset`.

    Datasets are made once, on first use, and in every process of a distributed job: ``build_dataset`` must give
    identical ones everywhere. The order of training structures is left to the sampler, which Lightning replaces by a
    distributed one where needed.

    Attributes:
        batch_size: Structures per batch and replica, without a budget.
    """

    def __init__(
        self,
        *,
        batch_size: int,
        num_workers: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        max_atoms: int | None = None,
        max_edges: int | None = None,
    ) -> None:
        """Keep the options of the loaders.

        Args:
            batch_size: Structures per batch and replica.
            num_workers: Worker processes of each loader. With any, samples are made before the workers start, which
                then share them.
            shuffle: Whether the training structures come in random order.
            drop_last: Whether an incomplete last training batch is left out.
            max_atoms: Most atoms per batch and replica, in place of ``batch_size`` (see
                :class:`~lightning_januspipe.data.budget.BudgetBatchSampler`).
            max_edges: Most edges per batch and replica, in place of ``batch_size`` or beside ``max_atoms``.

        Raises:
            ValueError: ``batch_size``, ``max_atoms`` or ``max_edges`` is below 1, or ``num_workers`` below 0.
        """
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}; expected at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers}; expected at least 0")
        for name, limit in (("max_atoms", max_atoms), ("max_edges", max_edges)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name}={limit}; expected at least 1")
        self.batch_size = batch_size
        self._max_atoms, self._max_edges = max_atoms, max_edges
        self._num_workers = num_workers
        self._shuffle = shuffle
        self._drop_last = drop_last
        self._datasets: dict[Split, SampleDataset | None] = {}
        self._statistics: DatasetStatistics | None = None

    @property
    def species(self) -> list[str]:
        """Chemical symbols in the order of the species index."""
        raise NotImplementedError

    def build_dataset(self, split: Split) -> SampleDataset | None:
        """Make the dataset of one split; None where there is none."""
        raise NotImplementedError

    def dataset(self, split: Split) -> SampleDataset | None:
        """Return the dataset of one split, made on first use; None where there is none.

        Raises:
            ValueError: The data is not usable, or the options do not go together.
        """
        if split not in self._datasets:
            self._datasets[split] = self.build_dataset(split)
        return self._datasets[split]

    def statistics(self) -> DatasetStatistics:
        """Return the statistics of the training data, computed on first use."""
        if self._statistics is None:
            train = self.dataset("train")
            assert train is not None
            self._statistics = dataset_statistics(train, num_species=len(self.species))
        return self._statistics

    def setup(self, stage: str | None = None) -> None:
        """Make the datasets of a stage (``"fit"``, ``"validate"``, ``"test"``, ``"predict"``; None for all)."""
        for split in _SPLITS_OF_STAGE[stage]:
            self.dataset(split)

    def train_dataloader(self) -> SampleLoader | list[SampleLoader]:
        """Return the loader of the training data."""
        return self._loader("train")

    def val_dataloader(self) -> SampleLoader | list[SampleLoader]:
        """Return the loader of the validation data, or an empty list where there is none."""
        return self._loader("val")

    def test_dataloader(self) -> SampleLoader | list[SampleLoader]:
        """Return the loader of the test data, or an empty list where there is none."""
        return self._loader("test")

    def predict_dataloader(self) -> SampleLoader | list[SampleLoader]:
        """Return the loader of the prediction data, or an empty list where there is none."""
        return self._loader("predict")

    def _loader(self, split: Split) -> SampleLoader | list[SampleLoader]:
        dataset = self.dataset(split)
        if dataset is None or len(dataset) == 0:  # type: ignore[arg-type]
            return []  # Lightning's way to say that a loop has nothing to do
        shuffle, drop_last = self._shuffle and split == "train", self._drop_last and split == "train"
        how: dict[str, Any] = {"batch_size": self.batch_size, "shuffle": shuffle, "drop_last": drop_last}
        if self._max_atoms is not None or self._max_edges is not None:
            batches = BudgetBatchSampler(
                dataset,
                max_atoms=self._max_atoms,
                max_edges=self._max_edges,
                shuffle=shuffle,
                drop_last=drop_last,
            )
            how = {"batch_sampler": batches}
        return DataLoader(
            dataset,
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
            collate_fn=collate_structures,
            **how,
        )

    @property
    def _precompute(self) -> bool:
        """Whether datasets make all samples at once: workers share them, and a budget of edges counts them."""
        return self._num_workers > 0 or self._max_edges is not None


class ASEDataModule(StructureDataModule):
    """Structures from files that ASE reads: extended XYZ, ASE databases (``.db``) and others.

    Validation and test data come from files of their own or are split off ``train_file``; the split depends on
    ``seed`` and the number of structures only, so that every process makes the same one.

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
        train_file: str,
        *,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        train_size: int | float | None = None,
        val_size: int | float | None = None,
        test_size: int | float | None = None,
        seed: int = 0,
        cutoff: float = 5.0,
        species: list[str] | Literal["auto"] = "auto",
        energy_key: str = "energy",
        forces_key: str = "forces",
        stress_key: str | None = "stress",
        dtype: Literal["float32", "float64"] | None = None,
        batch_size: int = 8,
        num_workers: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        max_atoms: int | None = None,
        max_edges: int | None = None,
    ) -> None:
        """Keep the options; files are read in ``setup``.

        Args:
            train_file: File with training structures.
            val_file: File with validation structures.
            test_file: File with test structures.
            predict_file: File with structures to predict, which need no labels. Without it, those of the test data.
            train_size: Number (int) or fraction (float between 0 and 1) of ``train_file`` to train on; None for all
                that the other splits leave.
            val_size: Number or fraction of ``train_file`` for validation, in place of ``val_file``.
            test_size: Number or fraction of ``train_file`` for testing, in place of ``test_file``.
            seed: Seed of the split.
            cutoff: Cutoff of the neighbour lists in Å.
            species: Chemical symbols in the model's order; ``"auto"`` for those in ``train_file``, by atomic number.
            energy_key: Name of the energy label (eV).
            forces_key: Name of the forces label (eV/Å).
            stress_key: Name of the stress label (eV/Å³); None to read no stress.
            dtype: Type of the floating-point tensors; None for ``torch.get_default_dtype()`` in ``setup``.
            batch_size: Structures per batch and replica.
            num_workers: Worker processes of each loader.
            shuffle: Whether the training structures come in random order.
            drop_last: Whether an incomplete last training batch is left out.
            max_atoms: Most atoms per batch and replica, in place of ``batch_size``.
            max_edges: Most edges per batch and replica, in place of ``batch_size`` or beside ``max_atoms``.

        Raises:
            ValueError: A size is neither a count nor a fraction, or is given beside a file for the same split.
        """
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            shuffle=shuffle,
            drop_last=drop_last,
            max_atoms=max_atoms,
            max_edges=max_edges,
        )
        for name, file, size in (("val", val_file, val_size), ("test", test_file, test_size)):
            if file is not None and size is not None:
                raise ValueError(f"{name}_file={file!r} and {name}_size={size} are both given; expected one of them")
        self._sizes = {"train": train_size, "val": val_size, "test": test_size}
        for name, size in self._sizes.items():
            _check_size(f"{name}_size", size)
        self._files: dict[str, str | None] = {"val": val_file, "test": test_file, "predict": predict_file}
        self._train_file = train_file
        self._seed = seed
        self._cutoff = cutoff
        self._species = None if species == "auto" else check_species(species)
        self._energy_key = energy_key
        self._forces_key = forces_key
        self._stress_key = stress_key
        self._dtype = dtype
        self._train_source: StructureDataset | None = None

    @property
    def species(self) -> list[str]:
        """Chemical symbols in the order of the species index; reads ``train_file`` where they are ``"auto"``."""
        return list(self._species if self._species is not None else self._source().species)

    def build_dataset(self, split: Split) -> SampleDataset | None:
        """Make the dataset of one split.

        Raises:
            ValueError: A file or the labels of a structure are not usable, or the splits ask for more than there is.
        """
        file = self._files.get(split)
        if file is not None:
            return self._read(file, self.species, require_labels=split != "predict")
        if split == "predict":
            return self.dataset("test")
        if split != "train" and self._sizes[split] is None:
            return None
        source = self._source()
        indices = split_indices(
            len(source),
            train=self._sizes["train"],
            val=self._sizes["val"],
            test=self._sizes["test"],
            seed=self._seed,
        )[split]
        return Subset(source, indices)

    def _source(self) -> StructureDataset:
        if self._train_source is None:
            self._train_source = self._read(self._train_file, self._species, require_labels=True)
        return self._train_source

    def _read(self, file: str, species: list[str] | None, *, require_labels: bool) -> StructureDataset:
        return StructureDataset(
            file,
            cutoff=self._cutoff,
            species="auto" if species is None else species,
            energy_key=self._energy_key,
            forces_key=self._forces_key,
            stress_key=self._stress_key,
            dtype=self._dtype,
            require_labels=require_labels,
            precompute=self._precompute,
        )


def split_indices(
    num_structures: int,
    *,
    train: int | float | None = None,
    val: int | float | None = None,
    test: int | float | None = None,
    seed: int = 0,
) -> dict[Split, list[int]]:
    """Split structures at random into disjoint sets; the same arguments give the same split in every process.

    Args:
        num_structures: Number of structures to split.
        train: Number (int) or fraction (float, rounded to the nearest number) for training; None for the rest.
        val: Number or fraction for validation; None for none.
        test: Number or fraction for testing; None for none.
        seed: Seed of the permutation.

    Returns:
        Sorted indices of ``"train"``, ``"val"`` and ``"test"``.

    Raises:
        ValueError: The sizes are not valid, are more than there is together, or leave nothing to train on.
    """
    for name, size in (("train", train), ("val", val), ("test", test)):
        _check_size(name, size)
    num_val, num_test = _count(val, num_structures), _count(test, num_structures)
    num_train = num_structures - num_val - num_test if train is None else _count(train, num_structures)
    if num_train < 1 or num_train + num_val + num_test > num_structures:
        raise ValueError(
            f"cannot split {num_structures} structures into train={train}, val={val}, test={test}: {num_train} + "
            f"{num_val} + {num_test} must not be more than {num_structures}, with at least one to train on"
        )
    order = np.random.default_rng(seed).permutation(num_structures)
    # Validation and test come first, so that a smaller training set keeps them.
    parts = np.split(order, np.cumsum([num_val, num_test, num_train]))
    val_part, test_part, train_part = (sorted(part.tolist()) for part in parts[:3])
    return {"train": train_part, "val": val_part, "test": test_part}


def _check_size(name: str, size: int | float | None) -> None:
    is_count = isinstance(size, int) and not isinstance(size, bool) and size >= 0
    is_fraction = isinstance(size, float) and 0 <= size < 1
    if size is not None and not is_count and not is_fraction:
        raise ValueError(f"{name}={size!r}; expected a number of structures (int) or a fraction below 1 (float)")


def _count(size: int | float | None, total: int) -> int:
    if size is None:
        return 0
    return round(size * total) if isinstance(size, float) else size
