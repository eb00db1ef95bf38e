"""Batches with a budget of atoms or edges."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
from torch.utils.data import DataLoader

from lightning_januspipe import keys
from lightning_januspipe.data import BudgetBatchSampler, EMTDataModule, StructureDataset, emt_structures
from lightning_januspipe.loader.sample_sizes import SampleSizes
from lightning_januspipe.testing import quiet_trainer


def _sizes(num: int = 200) -> SampleSizes:
    atoms = np.minimum(5 + np.random.default_rng(0).pareto(1.0, num) * 10, 90).round()
    return SampleSizes(atoms, atoms * 20)


def _replicas(sizes: SampleSizes, num: int, epoch: int = 0, **arguments: Any) -> list[list[list[int]]]:
    samplers = [BudgetBatchSampler(sizes, num_replicas=num, rank=rank, **arguments) for rank in range(num)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    found = [list(sampler) for sampler in samplers]
    assert [len(of) for of in found] == [len(sampler) for sampler in samplers]
    assert len({len(of) for of in found}) == 1, "replicas have different numbers of batches"
    return found


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("num", [1, 2, 3])
def test_each_structure_once_within_the_budget(num: int, shuffle: bool) -> None:
    sizes = _sizes()
    assert sizes.atoms is not None and sizes.edges is not None
    lengths, orders = set(), []
    for epoch in range(6):
        batches = list(itertools.chain(*_replicas(sizes, num, epoch, max_atoms=100, max_edges=1500, shuffle=shuffle)))
        assert sorted(itertools.chain(*batches)) == list(range(200))
        for batch in batches:
            fits = sizes.atoms[batch].sum() <= 100 and sizes.edges[batch].sum() <= 1500
            assert fits or len(batch) == 1, batch
        lengths.add(len(batches))
        orders.append(batches)
    assert len(lengths) == 1, "the length of a pass depends on the epoch"
    assert (orders[0] == orders[1]) is not shuffle
    filled = [sizes.edges[b].sum() for b in orders[0]]
    assert np.mean(filled) > 0.8 * 1500


def test_drop_last_leaves_out_what_does_not_divide() -> None:
    sizes = SampleSizes(np.full(7, 10.0), None)
    kept = _replicas(sizes, 2, max_atoms=20, drop_last=True, shuffle=False)
    assert kept == [[[0, 1], [4, 5]], [[2, 3], [6]]]
    assert _replicas(sizes, 3, max_atoms=20, drop_last=True, shuffle=False) == [[[0, 1]], [[2, 3]], [[4, 5]]]
    of_replicas = _replicas(sizes, 3, max_atoms=20, shuffle=False)
    assert sorted(itertools.chain(*itertools.chain(*of_replicas))) == list(range(7))
    assert [[len(b) for b in of] for of in of_replicas].count([1, 1]) <= 3


def test_fewer_structures_than_replicas_are_repeated() -> None:
    assert _replicas(SampleSizes(np.ones(1), None), 3, max_atoms=5, shuffle=False) == [[[0]]] * 3


def test_a_structure_above_the_budget_is_a_batch() -> None:
    sizes = SampleSizes(np.array([5.0, 50, 5]), None)
    with pytest.warns(UserWarning, match=r"1 of 3 structures have more atoms than max_atoms=20, up to 50") as told:
        sampler = BudgetBatchSampler(sizes, max_atoms=20, shuffle=False)
    assert len(told) == 1
    assert sorted(sampler) == [[0, 2], [1]]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        BudgetBatchSampler(object(), sampler.batch_size)  # made anew


def test_impossible_budgets() -> None:
    with pytest.raises(ValueError, match="neither max_atoms nor max_edges"):
        BudgetBatchSampler(_sizes())
    with pytest.raises(ValueError, match="max_edges=0; expected a positive"):
        BudgetBatchSampler(_sizes(), max_edges=0)
    with pytest.raises(ValueError, match="does not know the edges of its samples"):
        BudgetBatchSampler(SampleSizes(np.ones(2), None), max_edges=5)
    with pytest.raises(ValueError, match=r"list does not know the sizes of its samples; expected .* sample_sizes"):
        BudgetBatchSampler([1, 2], max_atoms=5)
    with pytest.raises(ValueError, match="rank=2, num_replicas=2"):
        BudgetBatchSampler(_sizes(), max_atoms=100, num_replicas=2, rank=2)


def test_copies_know_the_same() -> None:
    sampler = BudgetBatchSampler(_sizes(), max_atoms=100, seed=3)
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert list(other) == list(sampler) and other.batch_size.limits[0][1] == 100


def test_lightning_makes_it_anew() -> None:
    """As Lightning does in a job of two replicas, in a hook or not."""
    from lightning.fabric.utilities.data import _replace_dunder_methods, _set_sampler_epoch
    from lightning.pytorch.utilities.data import _update_dataloader
    from torch.utils.data import BatchSampler, DistributedSampler

    dataset = StructureDataset(emt_structures(20), cutoff=4.0)

    def make() -> Any:
        return DataLoader(dataset, batch_sampler=BudgetBatchSampler(dataset, max_atoms=40, seed=1))

    with _replace_dunder_methods(DataLoader, "dataset"), _replace_dunder_methods(BatchSampler):
        inside = make()
    for user in (inside, make()):
        found = []
        for rank in range(2):
            loader = _update_dataloader(user, DistributedSampler(dataset, num_replicas=2, rank=rank))
            _set_sampler_epoch(loader, 3)
            found.append(list(loader.batch_sampler))
        assert sorted(itertools.chain(*itertools.chain(*found))) == list(range(20))
        sampler = BudgetBatchSampler(dataset, max_atoms=40, seed=1, num_replicas=2, rank=1)
        sampler.set_epoch(3)
        assert list(sampler) == found[1]


def test_data_module_with_a_budget() -> None:
    data = EMTDataModule(12, 4, 4, max_edges=3000, dtype="float32")
    trained = []

    class Module(pl.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            trained.append(batch)

        def configure_optimizers(self) -> None: ...

        def predict_step(self, batch: Any) -> Any:
            return len(batch[keys.ENERGY])

    trainer = quiet_trainer(max_epochs=1, num_sanity_val_steps=2)
    trainer.fit(Module(), data)
    assert sum(len(b[keys.ENERGY]) for b in trained) == 12
    assert max(b[keys.EDGE_INDEX].shape[1] for b in trained) <= 3000
    assert sum(trainer.predict(Module(), data)) == 4
    with pytest.raises(ValueError, match="max_atoms=0; expected at least 1"):
        EMTDataModule(max_atoms=0)
