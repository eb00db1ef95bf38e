"""Defines the LightningDataModule of atomic structures, which makes data loaders from datasets."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_januspipe.data.budget import BudgetBatchSampler
from lightning_januspipe.data.collate import collate_structures
from lightning_januspipe.data.dataset import IndexedDataset
from lightning_januspipe.data.facts_table import FactsTable, facts_of
from lightning_januspipe.data.splits import Split
from lightning_januspipe.data.statistics import DatasetStatistics, SampleDataset, dataset_statistics
from lightning_januspipe.data.suspicions import missing_kinds, num_shared, suspicions

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule
else:
    try:
        from lightning.pytorch import LightningDataModule
    except ImportError:  # projects that have the stand-alone package only
        from pytorch_lightning import LightningDataModule

SampleLoader = DataLoader[dict[str, Tensor]]

_SPLITS_OF_STAGE: dict[str | None, tuple[Split, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("predict",),
    None: ("train", "val", "test", "predict"),
}


class StructureDataModule(LightningDataModule):
    """Makes data loaders over the datasets of structures that a subclass builds in :meth:`build_dataset`.

    Every process of a distributed job builds each dataset once, on first use: ``build_dataset`` must return identical
    datasets everywhere. Samplers choose the order of training structures; Lightning replaces them by distributed ones.

    Attributes:
        batch_size: Structures per batch and replica, where no budget is given.
    """

    def __init__(
        self,
        *,
        batch_size: int = 8,
        num_workers: int = 0,
        shuffle: bool = True,
        drop_last: bool = False,
        max_atoms: int | None = None,
        max_edges: int | None = None,
    ) -> None:
        """Keeps the options of the loaders.

        Args:
            batch_size: Structures per batch and replica.
            num_workers: Worker processes of each loader. If there are any, all samples are made before they start, so
                that they share them.
            shuffle: Whether the training structures come in random order.
            drop_last: Whether an incomplete last training batch is left out.
            max_atoms: Largest number of atoms per batch and replica, instead of ``batch_size``; see
                ``BudgetBatchSampler``.
            max_edges: Largest number of edges per batch and replica, instead of ``batch_size`` or beside ``max_atoms``.

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
        """Returns the chemical symbols in the order of the species index."""
        raise NotImplementedError

    @property
    def cutoff(self) -> float | None:
        """Returns the cutoff of the neighbour lists in Å; None where it is not known."""
        return None

    @property
    def tasks(self) -> list[str]:
        """Returns the names of the tasks in the order of the task index; none where structures have no tasks."""
        return []

    def build_dataset(self, split: Split) -> SampleDataset | None:
        """Makes the dataset of one split; returns None where there is none."""
        raise NotImplementedError

    def dataset(self, split: Split) -> SampleDataset | None:
        """Returns the dataset of one split, made on first use; None where there is none.

        Raises:
            ValueError: The data is not usable, or the options contradict each other.
        """
        if split not in self._datasets:
            self._datasets[split] = self.build_dataset(split)
        return self._datasets[split]

    def statistics(self) -> DatasetStatistics:
        """Returns the statistics of the training data, computed on first use."""
        if self._statistics is None:
            train = self.dataset("train")
            assert train is not None
            self._statistics = dataset_statistics(train, num_species=len(self.species))
        return self._statistics

    @override
    def setup(self, stage: str | None = None) -> None:
        """Makes and checks the datasets of a stage (``"fit"``, ``"validate"``, ``"test"``, ``"predict"``; None: all).

        Raises:
            ValueError: A structure or its labels are not usable, or there is no batch to train on.
        """
        facts: dict[str, FactsTable | None] = {split: facts_of(self.dataset(split)) for split in self.splits_of(stage)}
        train = facts.get("train")
        if train is None:
            return
        self._check_batches()
        for warning in suspicions(train):
            self._warn(warning)
        for split, what in (("val", "validation"), ("test", "test")):
            other = facts.get(split)
            if other is None:
                continue
            if len(other) and split == "val" and (lacking := missing_kinds(train, other)):
                self._warn(f"the validation data holds {lacking}, unlike the training data: errors there stay unseen")
            if num := num_shared(train, other):
                self._warn(f"{num} of {len(other)} {what} structures are training data too: their errors are too low")

    def splits_of(self, stage: str | None) -> tuple[Split, ...]:
        """Returns the splits that ``setup`` makes and checks for a stage."""
        return _SPLITS_OF_STAGE[stage]

    def _check_batches(self) -> None:
        """Refuses a replica without a full batch, where only full ones are kept."""
        num = len(self.dataset("train") or ())
        num_replicas = self.trainer.world_size if self.trainer is not None else 1
        has_budget = self._max_atoms is not None or self._max_edges is not None
        if self._drop_last and not has_budget and -(-num // num_replicas) < self.batch_size:
            replicas = f" for {num_replicas} replicas" if num_replicas > 1 else ""
            raise ValueError(
                f"batch_size={self.batch_size} with drop_last, but there are {num} training structures{replicas}: no "
                "batch is full. Use a smaller batch_size or drop_last=False"
            )

    def _warn(self, message: str) -> None:
        if self.trainer is None or self.trainer.is_global_zero:
            warnings.warn(message, stacklevel=3)

    @override
    def train_dataloader(self) -> SampleLoader | list[SampleLoader]:
        """Returns the loader of the training data."""
        return self._loader("train")

    @override
    def val_dataloader(self) -> SampleLoader | list[SampleLoader]:
        """Returns the loader of the validation data, or an empty list where there is none."""
        return self._loader("val")

    @override
    def test_dataloader(self) -> SampleLoader | list[SampleLoader]:
        """Returns the loader of the test data, or an empty list where there is none."""
        return self._loader("test")

    @override
    def predict_dataloader(self) -> SampleLoader | list[SampleLoader]:
        """Returns the loader of the prediction data, or an empty list where there is none."""
        return self._loader("predict")

    def _loader(self, split: Split) -> SampleLoader | list[SampleLoader]:
        dataset: Any = self.dataset(split)
        if not dataset:
            return []  # Lightning then skips the loop
        if split in ("test", "predict"):
            dataset = IndexedDataset(dataset)
        shuffle, drop_last = self._shuffle and split == "train", self._drop_last and split == "train"
        options: dict[str, Any] = {"batch_size": self.batch_size, "shuffle": shuffle, "drop_last": drop_last}
        if self._max_atoms is not None or self._max_edges is not None:
            batches = BudgetBatchSampler(
                dataset,
                max_atoms=self._max_atoms,
                max_edges=self._max_edges,
                shuffle=shuffle,
                drop_last=drop_last,
            )
            options = {"batch_sampler": batches}
        return DataLoader(
            dataset,
            num_workers=self._num_workers,
            persistent_workers=self._num_workers > 0,
            collate_fn=collate_structures,
            **options,
        )

    @property
    def _precompute(self) -> bool:
        """Tells whether datasets make all samples at once, for worker processes to share or a budget to count edges."""
        return self._num_workers > 0 or self._max_edges is not None
