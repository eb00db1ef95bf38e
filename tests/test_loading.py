"""Loaders that give micro-batches, seeded workers, and samples for capture."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, SequentialSampler

from lightning_januspipe.engine.microbatch import MicroBatches
from lightning_januspipe.loading import example_batches, require_samples, seed_workers, split_batches


class _Samples(Dataset[Tensor]):
    """Sample i has i + 1 numbers, all i; noise draws from every generator that transforms use."""

    def __init__(self, num: int, noise: bool = False) -> None:
        self._num, self._noise = num, noise

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> Tensor:
        if index >= self._num:
            raise IndexError(index)
        noise = float(torch.rand(())) + random.random() + float(np.random.rand()) if self._noise else 0.0
        return torch.full((index + 1,), index + noise)


class _Stream(IterableDataset[Tensor]):
    def __init__(self, num: int) -> None:
        self._num = num

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.full((i + 1,), float(i)) for i in range(self._num))


def _loader(dataset: Any, batch_size: int | None = 4, **arguments: Any) -> DataLoader[Any]:
    if batch_size is not None:
        arguments.setdefault("collate_fn", _collate)
    return DataLoader(dataset, batch_size=batch_size, **arguments)


def _collate(samples: list[Tensor]) -> list[list[float]]:
    return [s.tolist() for s in samples]


def _values(batches: MicroBatches) -> list[list[float]]:
    return [[s[0] for s in batch] for batch in batches]


@pytest.mark.parametrize("dataset", [_Samples(10), _Stream(10)], ids=["map", "iterable"])
def test_split(dataset: Any) -> None:
    user = _loader(dataset)
    plain = list(user)
    loader = split_batches(user, 2, required=True)
    batches = list(loader)
    assert all(isinstance(b, MicroBatches) for b in batches)
    assert [len(b) for b in batches] == [2, 2, 2]
    assert [sorted(v for group in _values(b) for v in group) for b in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert _values(batches[0]) == [[0, 3], [1, 2]], "four samples of 1 to 4 numbers make two groups of 5"
    assert list(user) == plain and user.collate_fn is _collate, "the user's loader was changed"


def test_batch_sampler() -> None:
    sampler = BatchSampler(SequentialSampler(_Samples(5)), batch_size=3, drop_last=False)
    loader = DataLoader(_Samples(5), batch_sampler=sampler, collate_fn=_collate)
    loader = split_batches(loader, 2, required=True)
    assert [b.num_samples for b in loader] == [[2, 1], [1, 1]]


def test_workers_split_too() -> None:
    loader = _loader(_Samples(4), num_workers=1)
    loader = split_batches(loader, 2, required=True)
    assert [_values(b) for b in loader] == [[[0, 3], [1, 2]]]


@pytest.mark.parametrize("loader", [_loader(_Samples(4), None), [1, 2]], ids=["batch_size=None", "list"])
def test_loaders_that_collate_nothing(loader: Any) -> None:
    name = type(loader).__name__
    with pytest.raises(ValueError, match=rf"num_microbatches=3, but the training loader \({name}\) .*batch_sampler"):
        split_batches(loader, 3, required=True)
    before = [str(b) for b in loader]
    assert split_batches(loader, 3, required=False) is loader
    assert split_batches(loader, 1, required=True) is loader
    assert [str(b) for b in loader] == before


def test_empty_dataset() -> None:
    empty = DataLoader(_Samples(0), batch_size=4)
    with pytest.raises(ValueError, match=r"the training dataset \(_Samples\) is empty; check its file"):
        require_samples(empty)
    with pytest.raises(ValueError, match="gives no samples"):
        example_batches(empty, 2)
    with pytest.raises(ValueError, match="gives no batches"):
        example_batches([], 2)
    for loader in (_loader(_Samples(1)), _loader(_Stream(0)), [1], object()):
        require_samples(loader)


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches"), [(1, 1), (2, 4), (4, 2), (4, 1), (8, 4), (12, 4), (3, 2), (32, 4)]
)
@pytest.mark.parametrize("dataset", [_Samples(20), _Stream(20), _Samples(2)], ids=["map", "iterable", "two samples"])
def test_example_batches(dataset: Any, batch_size: int, num_microbatches: int) -> None:
    loader = _loader(dataset, batch_size)
    loader = split_batches(loader, num_microbatches, required=True)
    traced, other = example_batches(loader, num_microbatches)
    assert isinstance(traced, list) and isinstance(other, list), "collated by the loader's own function"
    assert len(traced) >= 2
    assert len(traced) != len(other)
    assert len(other) == max(1, round(batch_size / num_microbatches))
    assert sum(len(s) for s in traced) != sum(len(s) for s in other)


def test_example_batches_of_a_loader_that_collates_nothing() -> None:
    traced, other = example_batches(_loader(_Samples(3), None), 1)
    assert (len(traced), len(other)) == (1, 2)


def test_looking_at_samples_changes_no_random_numbers() -> None:
    def draw() -> tuple[float, float, float]:
        return float(torch.rand(())), random.random(), float(np.random.rand())

    def seed() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    seed()
    expected = draw()
    for loader in (
        _loader(_Samples(9, noise=True), shuffle=True),
        _loader(_Samples(9, noise=True), None, shuffle=True),
    ):
        seed()
        example_batches(loader, 2)
        assert draw() == expected
    seed()
    with pytest.raises(RuntimeError, match="broken"):
        example_batches(_loader(_Samples(9, noise=True), collate_fn=_broken), 2)
    assert draw() == expected


def _broken(samples: list[Tensor]) -> None:
    raise RuntimeError("broken")


def test_workers_are_seeded_by_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, int]] = []

    def worker_init(worker_id: int, rank: int) -> None:
        called.append((worker_id, rank))

    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    loader = _loader(_Samples(4))
    seed_workers(loader, worker_init, 3)
    assert loader.worker_init_fn is not None
    loader.worker_init_fn(1)
    assert called == [(1, 3)]

    own = _loader(_Samples(4), worker_init_fn=print)
    seed_workers(own, worker_init, 3)
    assert own.worker_init_fn is print
    seed_workers([1], worker_init, 3)

    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    unseeded = _loader(_Samples(4))
    seed_workers(unseeded, worker_init, 3)
    assert unseeded.worker_init_fn is None
