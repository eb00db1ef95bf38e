from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from lightning_januspipe import keys
from lightning_januspipe.data import StructureDataset, collate_structures


@pytest.fixture
def samples(labelled):
    structures = [
        labelled(bulk("Cu", cubic=True), energy=1.0, forces=np.full((4, 3), 1.0), stress=np.arange(6.0)),
        labelled(Atoms("Cu"), energy=2.0, forces=np.full((1, 3), 2.0)),
        labelled(molecule("H2O"), energy=3.0, forces=np.full((3, 3), 3.0)),
    ]
    dataset = StructureDataset(structures, cutoff=3.0, dtype="float64")
    return [dataset[index] for index in range(3)]


def test_offsets_and_shapes(samples):
    batch = collate_structures(samples)
    edges = [sample[keys.EDGE_INDEX].shape[1] for sample in samples]
    assert edges[0] == 4 * 12 and edges[1:] == [0, 6]
    assert batch[keys.BATCH].tolist() == [0] * 4 + [1] + [2] * 3
    assert batch[keys.EDGE_INDEX].shape == (2, sum(edges)) and batch[keys.CELL_SHIFTS].shape == (sum(edges), 3)
    torch.testing.assert_close(batch[keys.EDGE_INDEX][:, : edges[0]], samples[0][keys.EDGE_INDEX])
    torch.testing.assert_close(batch[keys.EDGE_INDEX][:, edges[0] :], samples[2][keys.EDGE_INDEX] + 5)
    # Every edge stays within one structure.
    assert (batch[keys.BATCH][batch[keys.EDGE_INDEX][0]] == batch[keys.BATCH][batch[keys.EDGE_INDEX][1]]).all()
    assert batch[keys.ENERGY].tolist() == [1.0, 2.0, 3.0]
    assert batch[keys.FORCES][:, 0].tolist() == [1.0] * 4 + [2.0] + [3.0] * 3
    assert batch[keys.CELL].shape == batch[keys.STRESS].shape == (3, 3, 3) and batch[keys.PBC].shape == (3, 3)
    assert batch[keys.STRESS].isnan().flatten(1).all(dim=1).tolist() == [False, True, True]
    assert batch.keys() == samples[0].keys()
    assert all(batch[name].dtype == samples[0][name].dtype for name in batch)


def test_batches_can_be_collated_again(samples):
    nested = collate_structures([collate_structures(samples[:2]), samples[2]])
    for name, tensor in collate_structures(samples).items():
        torch.testing.assert_close(nested[name], tensor, equal_nan=True)


def test_batch_is_a_copy(samples):
    collate_structures(samples[:1])[keys.POSITIONS].zero_()
    assert samples[0][keys.POSITIONS].abs().sum() > 0


def test_own_tensors(samples):
    for number, sample in enumerate(samples):
        sample["charge"] = torch.tensor([float(number)])
    assert collate_structures(samples)["charge"].tolist() == [0.0, 1.0, 2.0]


def test_errors(samples):
    with pytest.raises(ValueError, match="no samples to collate"):
        collate_structures([])
    del samples[1][keys.STRESS]
    with pytest.raises(ValueError, match="sample 1 has the keys"):
        collate_structures(samples)
