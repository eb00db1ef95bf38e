"""Samples of all replicas in micro-batches of equal work, and what datasets know about their samples."""

from __future__ import annotations

import itertools
import pickle
from pathlib import Path
from typing import Any

import balance_workers
import loaders
import numpy as np
import pytest
import tiny
import torch
from torch.utils.data import BatchSampler, ConcatDataset, DataLoader, DistributedSampler, Subset

from lightning_januspipe.data import BudgetBatchSampler, StructureDataset, emt_structures
from lightning_januspipe.loader.microbatch import GroupedIndices, MicroBatches
from lightning_januspipe.loader.packing import ATOM_WEIGHT, imbalance, plan
from lightning_januspipe.loader.replica_balance import balance_replicas
from lightning_januspipe.loader.sample_sizes import sample_costs, sample_sizes
from lightning_januspipe.loader.split import GroupedDataset, split_batches
from lightning_januspipe.testing import RankPool, assert_matches_single_process

TWO = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2}


class Costly(loaders.Samples):
    """Knows that sample i costs i + 1."""

    def sample_costs(self) -> list[int]:
        return list(range(1, len(self) + 1))


def _replicas(dataset: Any, num: int, num_microbatches: int, required: bool = False, **arguments: Any) -> list[Any]:
    """Balanced loaders of all replicas."""
    found = []
    for rank in range(num):
        sampler: Any = DistributedSampler(dataset, num, rank, shuffle=True, seed=7)
        user: Any = DataLoader(dataset, 5, sampler=sampler, collate_fn=loaders.collate, **arguments)
        loader = split_batches(user, num_microbatches, required=True)
        why = _balance(loader, num, rank, num_microbatches, required)
        assert why is None and user.dataset is dataset and type(user.batch_sampler) is BatchSampler
        found.append(loader)
    return found


def _balance(loader: Any, num: int, rank: int, num_microbatches: int, required: bool = False) -> str | None:
    return balance_replicas(
        loader, num_microbatches, num, rank, required=required, tell=lambda known: known, is_teller=True
    )


def _values(batch: MicroBatches) -> list[list[float]]:
    return [[sample[0] for sample in group] for group in batch]


# -- loaders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}], ids=["here", "workers"])
def test_samples_of_a_step_stay_and_groups_are_even(workers: dict[str, Any]) -> None:
    dataset = Costly(24)
    balanced = _replicas(dataset, 2, 3, **workers)
    for epoch in range(2):
        own = [DistributedSampler(dataset, 2, rank, shuffle=True, seed=7) for rank in range(2)]
        for sampler, loader in zip(own, balanced, strict=True):
            sampler.set_epoch(epoch)
            loader.sampler.set_epoch(epoch)  # as Lightning does
        plain = [list(BatchSampler(sampler, 5, False)) for sampler in own]
        steps = list(zip(*balanced, strict=True))
        assert len(steps) == len(balanced[0]) == 3
        for step, batches in enumerate(steps):
            samples = [_values(batch) for batch in batches]
            assert sorted(itertools.chain(*itertools.chain(*samples))) == sorted(plain[0][step] + plain[1][step])
            sizes = [len(mine) for mine in samples]
            assert sizes == [min(3, len(plain[0][step]))] * 2
            costs = [v + 1 for v in range(24)]
            both = plain[0][step] + plain[1][step]
            dealt = plan([costs[i] for i in both], 2, 3)
            assert samples == [[[both[i] for i in group] for group in mine] for mine in dealt], "other micro-batches"
            groups = [[int(v) for v in group] for mine in samples for group in mine]
            if step < 2:
                assert imbalance(costs, [[i for g in groups[:3] for i in g], [i for g in groups[3:] for i in g]]) < 1.05
        assert [batch.num_samples for batch in steps[0]] == [[len(g) for g in _values(b)] for b in steps[0]]


def test_one_microbatch_for_each_replica() -> None:
    loaders_ = [
        DataLoader(Costly(8), 4, sampler=DistributedSampler(Costly(8), 2, r, shuffle=False), collate_fn=loaders.collate)
        for r in range(2)
    ]
    assert [_balance(loader, 2, r, 1) for r, loader in enumerate(loaders_)] == [None, None]
    (first,), (second,) = ([[s[0] for s in batch] for batch in loader] for loader in loaders_)
    assert sorted(first + second) == list(range(8)) and sum(first) == sum(second)


@pytest.mark.parametrize("workers", [{}, {"num_workers": 1, "persistent_workers": True}])
def test_datasets_are_seen_as_they_are(workers: dict[str, Any]) -> None:
    """Callbacks find the user's dataset in the loader, whose iterators read it in groups, in every pass."""
    user = Costly(8)
    (loader,) = _replicas(user, 1, 2, **workers)
    passes = [[batch.num_samples for batch in loader] for _ in range(2)]
    assert loader.dataset is user and (loader._iterator is not None) == bool(workers)
    assert len(passes[0]) == len(passes[1]) == 2 and all(len(sizes) == 2 for sizes in passes[0])
    dataset = GroupedDataset(user)
    assert len(dataset) == 8
    dataset.num_reads = 5
    assert user.num_reads == pickle.loads(pickle.dumps(dataset)).num_reads == 5
    assert [len(s) for s in dataset.__getitems__([1, 2])] == [2, 3]
    indices = pickle.loads(pickle.dumps(GroupedIndices([[1, 2], [0]])))
    assert indices == [1, 2, 0] and indices.sizes == [2, 1]
    assert [len(g) for g in dataset.__getitems__(indices).groups] == [2, 1]


def test_costs_are_measured_only_if_asked_for() -> None:
    dataset = loaders.Samples(12)
    loader = _user_loader(dataset)
    assert "Samples) does not know the costs of its samples" in str(_balance(loader, 2, 0, 2)) and not dataset.num_reads
    assert _balance(loader, 2, 0, 2, required=True) is None and dataset.num_reads == 12
    assert [sum(len(g) for g in batch) for batch in loader]


def _user_loader(dataset: Any, **arguments: Any) -> Any:
    arguments = arguments or {"sampler": DistributedSampler(dataset, 2, 0, shuffle=False), "batch_size": 4}
    return split_batches(DataLoader(dataset, collate_fn=loaders.collate, **arguments), 2, required=True)


class Broken(loaders.Samples):
    def sample_costs(self) -> list[int]:
        return [1, 2]


def test_what_cannot_be_balanced() -> None:
    class Ordered(DistributedSampler[Any]):
        """A wrapper as Lightning's."""

        def __init__(self, sampler: Any) -> None:
            super().__init__(Costly(8), 2, 0)
            self.dataset.reset = None  # type: ignore[attr-defined]

    for loader, why in (
        ([1], "not a torch DataLoader"),
        (_user_loader(loaders.Stream(8), batch_size=4), "is iterable"),
        (_user_loader(Costly(8), batch_size=4), "does not say how replicas share the samples"),
        (_user_loader(Costly(8), batch_size=4, sampler=Ordered(None)), "does not say how replicas share the samples"),
        (_user_loader(Costly(8), batch_size=4, sampler=DistributedSampler(Costly(8), 4, 0)), "among 4 replicas"),
        (DataLoader(Costly(8), 4, sampler=DistributedSampler(Costly(8), 2, 0)), "cannot be split"),
    ):
        assert why in str(_balance(loader, 2, 0, 2)), why
    with pytest.warns(UserWarning, match=r"Broken.sample_costs\(\) returned numbers of shape \(2,\); expected \(8,\)"):
        assert _balance(_user_loader(Broken(8)), 2, 0, 2)
    known: list[Any] = []
    balance_replicas(_user_loader(Costly(8)), 2, 2, 0, required=False, tell=lambda k: known.append(k) or k, is_teller=1)
    with pytest.raises(ValueError, match="training loaders of the replicas differ: they have different numbers"):
        balance_replicas(_user_loader(Costly(9)), 2, 2, 1, required=False, tell=lambda _: known[0], is_teller=False)


def test_batches_with_a_budget_are_balanced_too() -> None:
    dataset = StructureDataset(emt_structures(20, sizes=(4, 8, 16)), cutoff=4.0)
    found = []
    for rank in range(2):
        batches = BudgetBatchSampler(dataset, max_atoms=60, num_replicas=2, rank=rank)
        loader = split_batches(DataLoader(dataset, batch_sampler=batches, collate_fn=len), 2, required=True)
        assert _balance(loader, 2, rank, 2) is None
        loader.batch_sampler.sampler.set_epoch(1)
        found.append(list(loader.batch_sampler))
    assert len(found[0]) == len(found[1])
    assert sorted(itertools.chain(*itertools.chain(*found))) == list(range(20))
    assert all(len(a.sizes) == len(b.sizes) for a, b in zip(*found, strict=True))


# -- what datasets know ----------------------------------------------------------------------------------------------


def test_sizes_of_structures() -> None:
    structures = emt_structures(6, sizes=(8, 16, 32))
    counted = StructureDataset(structures, cutoff=5.0, precompute=True)
    estimated = StructureDataset(structures, cutoff=5.0)
    sizes, guess = sample_sizes(counted), sample_sizes(estimated)
    assert sizes is not None and guess is not None and sizes.atoms is not None and guess.edges is not None
    edges = [counted[i]["edge_index"].shape[1] for i in range(6)]
    assert sizes.edges is not None and sizes.edges.tolist() == edges
    assert sizes.atoms.tolist() == [len(s) for s in structures]
    np.testing.assert_allclose(guess.edges, edges, rtol=0.2)
    estimated[0]
    again = sample_sizes(estimated)
    assert again is not None and again.edges is not None
    assert again.edges.tolist() == guess.edges.tolist(), "sizes depend on what this process has read"
    costs = sample_costs(Subset(counted, [4, 1]))
    assert costs is not None and costs.tolist() == [edges[i] + ATOM_WEIGHT * len(structures[i]) for i in (4, 1)]
    both = sample_costs(ConcatDataset([counted, Subset(counted, [0])]))
    assert both is not None and both.tolist() == [*sample_costs(counted).tolist(), both[0]]  # type: ignore[union-attr]


def test_sizes_of_other_datasets() -> None:
    class InMemory(torch.utils.data.Dataset[Any]):
        """As PyG's."""

        slices = {"edge_index": torch.tensor([0, 4, 10, 12]), "pos": torch.tensor([0, 2, 5, 6]), "y": None}

        def __init__(self, chosen: list[int]) -> None:
            self._chosen = chosen

        def indices(self) -> list[int]:
            return self._chosen

        def __len__(self) -> int:
            return len(self._chosen)

    costs = sample_costs(InMemory([2, 0]))
    assert costs is not None and costs.tolist() == [2 + 4 * 1, 4 + 4 * 2]
    for unknown in (
        loaders.Samples(3),
        Subset(loaders.Samples(3), [0]),
        ConcatDataset([Costly(2), loaders.Samples(3)]),
    ):
        assert sample_costs(unknown) is None
    joined = sample_costs(ConcatDataset([Costly(2), Subset(Costly(5), [3])]))
    assert joined is not None and joined.tolist() == [1, 2, 4]


# -- under a Trainer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("devices", "pipeline"), [(2, 1), (4, 2)])
def test_gradients_are_those_of_the_same_microbatches(pool: RankPool, devices: int, pipeline: int) -> None:
    assert_matches_single_process(
        tiny.module,
        tiny.data,
        devices=devices,
        strategy={"pipeline_size": pipeline, "data_size": 2, "num_microbatches": 2, "balance": "replicas"},
        steps=3,
        pool=pool,
    )


@pytest.mark.parametrize("trainer", [{}, {"accumulate_grad_batches": 2}], ids=["", "accumulated"])
def test_replicas_train_on_the_same_samples_as_without(pool: RankPool, trainer: dict[str, Any]) -> None:
    def ranks(balance: str) -> list[Any]:
        data = {"num_workers": 1} if not trainer else {"drop_last": True}
        return pool.run(  # type: ignore[no-any-return]
            _seen, {**TWO, "balance": balance}, data, {"max_epochs": 2, **trainer}, world_size=2
        )

    own, across = ranks("microbatches"), ranks("auto")
    assert own != across, "nothing was dealt anew"
    assert balance_workers.of_steps(own) == balance_workers.of_steps(across)
    assert len(own[0]) == (4 if trainer else 6)

    def worst(ranks: list[Any]) -> float:
        """Largest share of the edges of a step that one replica has."""
        sums = [[sum(e for _, e in batch) for batch in step] for step in zip(*ranks, strict=True)]
        return max(2 * max(edges) / sum(edges) for edges in sums)

    assert worst(across) < 1.1 < worst(own)
    assert all(len(a) == len(b) for a, b in zip(*across, strict=True))


def _seen(strategy: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any], **arguments: str) -> Any:
    return balance_workers.seen(strategy, data, **arguments, **trainer)


def _saving(folder: str) -> Any:
    return balance_workers.seen(TWO, {}, save=folder, max_epochs=2)


def _resumed(path: str) -> Any:
    return balance_workers.seen(TWO, {}, resume=path, max_epochs=2)


def test_going_on_in_the_middle_of_an_epoch(pool: RankPool, tmp_path: Path) -> None:
    whole = pool.run(_saving, str(tmp_path), world_size=2)
    assert [len(of) for of in whole] == [6, 6]
    rest = pool.run(_resumed, str(tmp_path / "step=4.ckpt"), world_size=2)
    assert rest == [of[4:] for of in whole]


def test_a_stream_cannot_be_balanced_across_replicas(pool: RankPool) -> None:
    for error in pool.run(balance_workers.fit_iterable, "replicas", world_size=2):
        assert (
            "balance='replicas', but the training loader cannot share its samples" in error and "is iterable" in error
        )
    assert pool.run(balance_workers.fit_iterable, "auto", world_size=2) == ["", ""]


def test_benchmark_deals_a_mixture() -> None:
    from lightning_januspipe.bench.replicas import WAYS, microbatches_of_replicas, mixture

    structures = mixture(64)
    sizes = sorted(map(len, structures))
    assert sizes[0] >= 5 and sizes[len(sizes) // 2] <= 50 and 192 <= sizes[-1] <= 500
    costs = sample_costs(StructureDataset(structures, cutoff=4.0))
    assert costs is not None
    found = {}
    for way in WAYS:
        dealt = microbatches_of_replicas(costs.tolist(), 2, 2, way)
        assert sorted(i for mine in dealt for group in mine for i in group) == list(range(64))
        found[way] = imbalance(costs.tolist(), [group for mine in dealt for group in mine])
    assert found["replicas"] <= 1.05 < found["in the loader's order"] and found["replicas"] <= found["microbatches"]
