"""Reads atomic structures with energies, forces and stress, and makes batches of tensors of them."""

from lightning_januspipe.data.ase_datamodule import ASEDataModule
from lightning_januspipe.data.budget import BudgetBatchSampler
from lightning_januspipe.data.collate import collate_structures
from lightning_januspipe.data.datamodule import StructureDataModule
from lightning_januspipe.data.dataset import StructureDataset
from lightning_januspipe.data.disk_dataset import DiskDataset, open_dataset
from lightning_januspipe.data.emt import EMTDataModule, emt_structures, label_with_emt
from lightning_januspipe.data.neighbors import neighbor_list
from lightning_januspipe.data.splits import split_indices
from lightning_januspipe.data.statistics import DatasetStatistics, dataset_statistics
from lightning_januspipe.data.structures import atoms_to_sample, read_structures

__all__ = [
    "ASEDataModule",
    "BudgetBatchSampler",
    "DatasetStatistics",
    "DiskDataset",
    "EMTDataModule",
    "StructureDataModule",
    "StructureDataset",
    "atoms_to_sample",
    "collate_structures",
    "dataset_statistics",
    "emt_structures",
    "label_with_emt",
    "neighbor_list",
    "open_dataset",
    "read_structures",
    "split_indices",
]
