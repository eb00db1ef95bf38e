"""Loaders that give micro-batches, seeded workers, and samples for capture."""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import loaders
import logging_workers
import numpy as np
import pytest
import torch
from loaders import Samples, Stream, collate, global_noise
from pools import slow
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, SequentialSampler

from lightning_januspipe.loader import split as loading
from lightning_januspipe.loader.examples import example_batches
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.split import batch_size_of, require_samples, seed_workers, split_batches
from lightning_januspipe.testing import RankPool


def _loader(dataset: Any, batch_size: int | None = 4, **arguments: Any) -> DataLoader[Any]:
    if batch_size is not None:
        arguments.setdefault("collate_fn", collate)
    return DataLoader(dataset, batch_size=batch_size, **arguments)


def _values(batches: Any) -> list[list[float]]:
    """First number of each sample of each micro-batch."""
    return [[s[0] for s in batch] for batch in batches]


def _of_each_batch(loader: Any) -> list[list[float]]:
    """First numbers of the samples of each batch, in any order."""
    return [sorted(v for group in _values(b if isinstance(b, MicroBatches) else [b]) for v in group) for b in loader]


@pytest.fixture
def several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if other ranks went on reading what this one looks at."""
    monkeypatch.setattr(loading, "_is_distributed", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)


# -- splitting -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", [Samples(10), Stream(10)], ids=["map", "iterable"])
def test_split(dataset: Any) -> None:
    user = _loader(dataset)
    plain = list(user)
    loader = split_batches(user, 2, required=True)
    assert type(loader).__name__ == "DataLoader" and isinstance(loader, DataLoader)
    for _ in range(2):
        batches = list(loader)
        assert all(isinstance(b, MicroBatches) and b.examples is None for b in batches)
        assert [len(b) for b in batches] == [2, 2, 2]
        assert _of_each_batch(batches) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert _values(batches[0]) == [[0, 3], [1, 2]], "four samples of 1 to 4 numbers make two groups of 5"
    assert list(user) == plain and user.collate_fn is collate, "the user's loader was changed"


def test_batch_sampler() -> None:
    sampler = BatchSampler(SequentialSampler(Samples(5)), batch_size=3, drop_last=False)
    loader = DataLoader(Samples(5), batch_sampler=sampler, collate_fn=collate)
    loader = split_batches(loader, 2, required=True)
    assert [b.num_samples for b in loader] == [[2, 1], [1, 1]]


def test_batches_of_variable_size() -> None:
    """As with a largest number of atoms: also fewer samples than micro-batches."""
    sampler = loaders.MaxNumbers(9, limit=12)
    loader = split_batches(DataLoader(Samples(9), batch_sampler=sampler, collate_fn=collate), 3, required=True)
    with pytest.raises(TypeError):
        len(loader)
    traced, other = example_batches(loader, 3)
    assert (len(traced), len(other)) == (3, 2) and sampler.passes == 0
    assert [b.num_samples for b in loader] == [[2, 1, 1], [1, 1], [1], [1], [1]]


@pytest.mark.parametrize("start", ["fork", slow("spawn")])
def test_workers_split_too(start: str) -> None:
    user = _loader(
        Samples(12), num_workers=1, persistent_workers=True, prefetch_factor=3, multiprocessing_context=start
    )
    assert next(iter(user))[3] == [3] * 4
    loader = split_batches(user, 2, required=True)
    for _ in range(2):
        assert _values(next(iter(loader))) == [[0, 3], [1, 2]]
    assert next(iter(user))[3] == [3] * 4, "the user's loader shares its workers"
    assert _of_each_batch(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_workers_that_read_parts_of_a_stream() -> None:
    user = _loader(loaders.Sharded(12), 3, num_workers=2)
    plain = _of_each_batch(user)
    assert sorted(chain(*plain)) == list(range(12))
    loader = split_batches(user, 2, required=True)
    iterator = iter(loader)
    traced, other = example_batches(loader, 2)
    assert (len(traced), len(other)) == (3, 2)
    assert _of_each_batch(iterator) == plain
    assert [b.num_samples for b in loader] == [[2, 1]] * 4


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
@pytest.mark.parametrize(
    "make",
    [
        partial(loaders.Swallows, batch_size=4),
        partial(loaders.Renames, join=collate, size=4),
        partial(_loader, collate_fn=loaders.Collater(None, follow="x")),
        partial(_loader, pin_memory=True),
    ],
)
def test_other_classes_of_loaders(make: Callable[..., Any]) -> None:
    user = make(Samples(8))
    loader = split_batches(user, 2, required=True)
    assert isinstance(loader, type(user)) and loader.dataset is user.dataset
    assert [_values(b) for b in loader] == [[[0, 3], [1, 2]], [[4, 7], [5, 6]]]
    traced, other = example_batches(loader, 2)
    assert (len(traced), len(other)) == (3, 2)
    assert _of_each_batch(user) == [[0, 1, 2, 3], [4, 5, 6, 7]]


@pytest.mark.parametrize(
    "loader",
    [_loader(Samples(4), None), _loader(Stream(4), None), [1, 2], loaders.Fixed(Samples(4), 2)],
    ids=["batch_size=None", "stream of batches", "list", "collate_fn that stays"],
)
def test_loaders_that_cannot_be_split(loader: Any) -> None:
    name = type(loader).__name__
    with pytest.raises(ValueError, match=rf"num_microbatches=3, but the training loader \({name}\) .*batch_sampler"):
        split_batches(loader, 3, required=True)
    before = [str(b) for b in loader]
    with pytest.warns(UserWarning, match=rf"training loader \({name}\) .*one micro-batch") as told:
        assert split_batches(loader, 3, required=False) is loader
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert split_batches(loader, 1, required=True) is loader
    assert [str(b) for b in loader] == before


def test_one_rank_warns(several_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        split_batches([1, 2], 3, required=False)


def test_a_loader_that_collates_elsewhere() -> None:
    loader = split_batches(loaders.CollatesItself(Samples(4), 2, collate_fn=list), 2, required=False)
    with pytest.raises(ValueError, match=r"\(CollatesItself\) yields a dict that its collate_fn did not make"):
        next(iter(loader))


def test_a_dataset_that_collates() -> None:
    user = DataLoader(loaders.ReadyBatches(4), batch_size=2, collate_fn=lambda batch: batch)
    with pytest.raises(ValueError, match="__getitems__ returns a dict, not a list of samples"):
        next(iter(split_batches(user, 2, required=True)))
    with pytest.warns(UserWarning, match="each batch is one micro-batch"):
        batch = next(iter(split_batches(user, 2, required=False)))
    assert len(batch) == 1 and batch.batches[0]["x"].tolist() == [0, 1]
    traced, other = example_batches(user, 1)
    assert (len(traced["x"]), len(other["x"])) == (2, 1)


def test_state_is_that_of_the_loader_in_use() -> None:
    """A data module that keeps its loader saves the progress of training, and goes on from it once."""
    user = loaders.Stateful(Samples(10), 2, collate_fn=collate)
    loader = split_batches(user, 2, required=True)
    iterator = iter(loader)
    next(iterator), next(iterator)
    assert user.state_dict() == loader.state_dict() == {"given": 2}

    resumed = loaders.Stateful(Samples(10), 2, collate_fn=collate)
    resumed.load_state_dict({"given": 2})
    first = split_batches(resumed, 2, required=True)
    assert _of_each_batch(first) == [[4, 5], [6, 7], [8, 9]]
    second = split_batches(resumed, 4, required=True)
    assert len(list(second)) == 5, "the state that was loaded is used twice"
    assert resumed.state_dict() == second.state_dict() == {"given": 5}


# -- examples for capture --------------------------------------------------------------------------------------------


def test_no_full_batch() -> None:
    with pytest.raises(ValueError, match=r"its dataset \(Samples\) has 3 samples, a batch has 4, and drop_last"):
        require_samples(DataLoader(Samples(3), batch_size=4, drop_last=True))
    sampler = DistributedSampler(Samples(6), 2, 0)
    with pytest.raises(ValueError, match="has 6 samples for 2 replicas, a batch has 4"):
        require_samples(DataLoader(sampler.dataset, sampler=sampler, batch_size=4, drop_last=True))
    require_samples(DataLoader(Samples(3), batch_size=4))
    require_samples(DataLoader(Samples(4), batch_size=4, drop_last=True))


@pytest.mark.parametrize(("wanted", "batch_size", "found"), [(99, 8, 8), (4, 8, 4), (3, 1, 1)])
def test_fewer_structures_than_micro_batches(pool: RankPool, wanted: int, batch_size: int, found: int) -> None:
    """One rank warns, and the line after the capture tells the true number; one before it says what takes time."""
    ((first, line), warned), (_, of_other) = pool.run(logging_workers.start_of_a_fit, wanted, batch_size, world_size=2)
    number = "one micro-batch" if found == 1 else f"{found} micro-batches"
    assert first == "januspipe: capturing the potential, and measuring where to cut it"
    assert re.search(rf"^januspipe: potential 'potential' in \d stages .*; wavek-zb, {number}$", line), line
    assert not of_other
    expected = {
        99: ["num_microbatches=99, but a batch has 8 structures: it is split into 8 micro-batches of one"],
        3: ["num_microbatches=3, but a batch has one structure: it is one micro-batch"],
    }
    assert warned == expected.get(wanted, [])


def test_sizes_of_batches() -> None:
    assert batch_size_of(_loader(Samples(20), 4)) == batch_size_of(_loader(Stream(20), 4)) == 4
    assert batch_size_of(split_batches(_loader(Samples(20), 4), 2, required=True)) == 4
    assert batch_size_of(DataLoader(Samples(4), batch_sampler=[[0], [1, 2]])) is None
    assert batch_size_of(_loader(Samples(4), None)) is None and batch_size_of([1]) is None


def test_empty_dataset() -> None:
    empty = DataLoader(Samples(0), batch_size=4)
    with pytest.raises(ValueError, match=r"the dataset \(Samples\) is empty; check its file"):
        require_samples(empty)
    for dataset in (empty, _loader(Stream(0)), split_batches(_loader(Stream(0)), 2, required=True)):
        with pytest.raises(ValueError, match=r"the dataset \((Samples|Stream)\) is empty"):
            example_batches(dataset, 2)
    for loader in ([], _loader(Stream(0), None)):
        with pytest.raises(ValueError, match="gives no batches"):
            example_batches(loader, 2)
    for loader in (_loader(Samples(1)), _loader(Stream(0)), [1], object()):
        require_samples(loader)


@pytest.mark.parametrize(
    ("batch_size", "num_microbatches"), [(1, 1), (2, 4), (4, 2), (4, 1), (8, 4), (12, 4), (3, 2), (32, 4)]
)
@pytest.mark.parametrize("dataset", [Samples(20), Stream(20), Samples(2)], ids=["map", "iterable", "two samples"])
def test_example_batches(dataset: Any, batch_size: int, num_microbatches: int) -> None:
    user = _loader(dataset, batch_size)
    for loader in (user, split_batches(user, num_microbatches, required=True)):
        traced, other = example_batches(loader, num_microbatches)
        assert isinstance(traced, list) and isinstance(other, list), "collated by the loader's own function"
        assert len(traced) >= 2
        assert len(traced) != len(other)
        assert len(other) == max(1, round(batch_size / num_microbatches))
        if batch_size > 1 or loader is user:
            assert sum(len(s) for s in traced) != sum(len(s) for s in other)


@pytest.mark.parametrize("dataset", [Samples(3), Stream(3)], ids=["map", "iterable"])
def test_example_batches_of_a_loader_that_collates_nothing(dataset: Any) -> None:
    traced, other = example_batches(_loader(dataset, None), 1)
    assert (len(traced), len(other)) == (1, 2)


def test_few_samples_are_read() -> None:
    dataset = Samples(1000)
    traced, _ = example_batches(_loader(dataset, 64), 4)
    assert dataset.num_reads <= 12
    assert traced[0][0] > 900, "the samples are not spread over the dataset"


def test_samples_by_other_keys_than_numbers() -> None:
    names = ["a", "b", "c", "d", "e"]
    loader = _loader(loaders.Keyed(names), sampler=names)
    traced, other = example_batches(loader, 2)
    assert (_values([traced]), len(other)) == ([[4, 3, 2]], 2)
    numbers = loaders.MaxNumbers(5, limit=9)
    offset = loaders.Keyed([*range(-5, 0), *range(5)])  # type: ignore[list-item]
    example_batches(DataLoader(offset, batch_sampler=numbers, collate_fn=collate), 2)
    assert numbers.passes == 0, "the sampler began a pass"
    with pytest.raises(KeyError):  # as training would
        example_batches(_loader(loaders.Keyed(names), sampler=["x", "y"]), 2)


def test_datasets_of_workers_are_read_in_a_worker() -> None:
    """What they open in this process would be shared by the workers that are forked later."""
    here = loaders.OpenedOnUse(4)
    example_batches(_loader(here), 2)
    assert here.opened
    there = loaders.OpenedOnUse(4)
    traced, other = example_batches(_loader(there, num_workers=2, multiprocessing_context="fork"), 2)
    assert (len(traced), len(other)) == (3, 2) and not there.opened


def _draw() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(np.random.rand())


def _seed() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)


def test_looking_at_samples_changes_no_random_numbers() -> None:
    _seed()
    expected = _draw()
    for loader in (
        _loader(Samples(9, global_noise), shuffle=True),
        _loader(Samples(9, global_noise), None, shuffle=True),
        _loader(Stream(9, global_noise)),
    ):
        _seed()
        example_batches(loader, 2)
        assert _draw() == expected
    _seed()
    with pytest.raises(RuntimeError, match="broken"):
        example_batches(_loader(Samples(9, global_noise), collate_fn=_broken), 2)
    assert _draw() == expected


def _broken(samples: list[Tensor]) -> None:
    raise RuntimeError("broken")


def _one_shot() -> Any:
    return loaders.OneShot(torch.full((i + 1,), float(i)) for i in range(10))


DATASETS: dict[str, Callable[[], Any]] = {
    "map": lambda: Samples(10, global_noise),
    "map with generators": lambda: Samples(10, loaders.OwnNoise()),
    "stream": lambda: Stream(10, global_noise),
    "resumable stream": lambda: loaders.Resumable(10),
    "generator": _one_shot,
    "iterator": lambda: loaders.ItsOwnIterator(10),
}


@pytest.mark.parametrize("begun", [True, False], ids=["while a pass has begun", "before"])
@pytest.mark.parametrize("num_microbatches", [1, 2])
@pytest.mark.parametrize("name", DATASETS)
def test_training_sees_the_same_samples(several_processes: None, name: str, num_microbatches: int, begun: bool) -> None:
    """Lightning begins the first pass before capture; whether this looks at samples or not makes no difference."""

    def samples(look: bool) -> tuple[list[list[float]], tuple[float, float, float]]:
        _seed()
        dataset = DATASETS[name]()
        shuffle = {"shuffle": True} if name.startswith("map") else {}
        loader = split_batches(_loader(dataset, **shuffle), num_microbatches, required=True)
        iterator = iter(loader) if begun else None
        if look:
            traced, other = example_batches(loader, num_microbatches)
            assert len(traced) >= 2 and len(traced) != len(other)
        batches = list(iterator or loader)
        assert {isinstance(b, MicroBatches) for b in batches} == {num_microbatches > 1}
        found = _of_each_batch(batches)
        if name not in ("generator", "iterator"):
            found += _of_each_batch(loader)
        return found, _draw()

    assert samples(look=True) == samples(look=False)
    assert sum(map(len, samples(look=True)[0])) in (10, 20)


def test_ready_made_batches_of_a_stream(several_processes: None) -> None:
    loader = split_batches(DataLoader(_one_shot(), batch_size=None), 1, required=True)
    iterator: Iterator[Tensor] = iter(loader)
    traced, other = example_batches(loader, 1)
    assert (len(traced), len(other)) == (1, 2)
    assert [len(b) for b in iterator] == list(range(1, 11))


@pytest.mark.parametrize("dataset", [_one_shot(), loaders.ItsOwnIterator(10)], ids=["generator", "iterator"])
def test_streams_that_can_be_read_once(several_processes: None, dataset: Any) -> None:
    """Where nothing reads ahead, as in evaluation."""
    with pytest.raises(ValueError, match=r"the dataset \(\w+\) can be read only once.*__iter__ start a new pass"):
        example_batches(_loader(dataset), 1)
    assert len(list(dataset)) == 10, "samples were lost"
    batches = iter([1, 2])
    with pytest.raises(ValueError, match=r"the loader \(list_iterator\) can be read only once"):
        example_batches(batches, 1)
    assert list(batches) == [1, 2]


# -- seeds -----------------------------------------------------------------------------------------------------------


def test_workers_are_seeded_by_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[int, int]] = []

    def worker_init(worker_id: int, rank: int) -> None:
        called.append((worker_id, rank))

    monkeypatch.setenv("PL_SEED_WORKERS", "1")
    loader = _loader(Samples(4))
    seed_workers(loader, worker_init, 3)
    assert loader.worker_init_fn is not None
    loader.worker_init_fn(1)
    assert called == [(1, 3)]

    own = _loader(Samples(4), worker_init_fn=print)
    seed_workers(own, worker_init, 3)
    assert own.worker_init_fn is print
    seed_workers([1], worker_init, 3)

    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    unseeded = _loader(Samples(4))
    seed_workers(unseeded, worker_init, 3)
    assert unseeded.worker_init_fn is None


# -- under a Trainer -------------------------------------------------------------------------------------------------


def test_a_loader_that_lightning_makes_anew(pool: RankPool) -> None:
    """Lightning gives each replica its own sampler by making the loader again; it is split after that."""
    ranks = pool.run(loaders.seen_by_ranks, {"pipeline_size": 1, "data_size": 2, "num_microbatches": 2}, world_size=2)
    for seen in ranks:
        assert [[len(m) for m in batch] for batch in seen] == [[1, 1], [1, 1]]
    assert len({e for seen in ranks for batch in seen for m in batch for e in m}) == 8


@pytest.mark.parametrize("one_shot", [True, False], ids=["generator", "resumable"])
def test_pipeline_on_a_stream_with_a_state(pool: RankPool, one_shot: bool) -> None:
    """One rank captures from it, and all train on the same samples."""
    (expected,) = pool.run(loaders.fit_stream, {"num_microbatches": 2}, one_shot, world_size=1)
    assert len(expected) == 2
    for found in pool.run(loaders.fit_stream, {"num_microbatches": 2}, one_shot, world_size=2):
        assert found == pytest.approx(expected, rel=1e-9)
