"""Loaders, samplers and datasets as projects have them, and what ranks run with them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from lightning_januspipe.testing import quiet_trainer


def collate(samples: list[Tensor]) -> list[list[float]]:
    """Returns a batch that shows what it was made of."""
    return [s.tolist() for s in samples]


class Samples(Dataset[Tensor]):
    """Sample i has i + 1 numbers, all i, plus noise if asked for; counts how often it is read."""

    def __init__(self, num: int, noise: Callable[[], float] | None = None) -> None:
        self._num, self._noise = num, noise
        self.num_reads = 0

    def __len__(self) -> int:
        return self._num

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < self._num:
            raise IndexError(index)
        self.num_reads += 1
        return torch.full((index + 1,), index + (self._noise() if self._noise else 0.0))


def global_noise() -> float:
    """Draws from every generator that transforms use."""
    return float(torch.rand(())) + random.random() + float(np.random.rand())


class OwnNoise:
    """A transform with generators of its own."""

    def __init__(self) -> None:
        self._generators = {
            "numpy": np.random.default_rng(0),
            "legacy": np.random.RandomState(0),
            "torch": torch.Generator().manual_seed(0),
            "python": random.Random(0),
        }

    def __call__(self) -> float:
        g = self._generators
        drawn = torch.rand((), generator=g["torch"])
        return float(drawn) + g["numpy"].random() + g["legacy"].rand() + g["python"].random()


class Keyed(Dataset[Tensor]):
    """Samples by name, as of a key-value store."""

    def __init__(self, names: list[str]) -> None:
        self._samples = {name: torch.full((i + 1,), float(i)) for i, name in enumerate(names)}

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, name: str) -> Tensor:
        return self._samples[name]


class OpenedOnUse(Samples):
    """Like a file that must not be open when workers are forked."""

    opened = False

    def __getitem__(self, index: int) -> Tensor:
        self.opened = True
        return super().__getitem__(index)


class ReadyBatches(Samples):
    """Collates by itself."""

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        return {"x": torch.tensor(indices, dtype=torch.float)}


class Stream(IterableDataset[Tensor]):
    """Can be read again and again."""

    def __init__(self, num: int, noise: Callable[[], float] | None = None) -> None:
        self._samples = Samples(num, noise)

    def __iter__(self) -> Iterator[Tensor]:
        return (self._samples[i] for i in range(len(self._samples)))


class Sharded(Stream):
    """Each worker reads its own part."""

    def __iter__(self) -> Iterator[Tensor]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        return (self._samples[i] for i in range(first, len(self._samples), step))


class Resumable(Stream):
    """Knows where it is, and goes on from there when it is read again before its end."""

    position = 0

    def __iter__(self) -> Iterator[Tensor]:
        while self.position < len(self._samples):
            self.position += 1
            yield self._samples[self.position - 1]
        self.position = 0


class OneShot(IterableDataset[Any]):
    """Gives what a generator gives, once."""

    def __init__(self, samples: Iterator[Any]) -> None:
        self._generator = samples

    def __iter__(self) -> Iterator[Any]:
        return self._generator


class ItsOwnIterator(Stream):
    """Starts over whenever a pass begins, also while another is under way."""

    def __iter__(self) -> Iterator[Tensor]:
        self._next = 0
        return self

    def __next__(self) -> Tensor:
        if self._next == len(self._samples):
            raise StopIteration
        self._next += 1
        return self._samples[self._next - 1]


class MaxNumbers:
    """Batches of at most so many numbers; of no known length and with a state that each pass changes."""

    def __init__(self, num_samples: int, limit: int) -> None:
        self._num_samples, self._limit = num_samples, limit
        self.passes = 0

    def __iter__(self) -> Iterator[list[int]]:
        self.passes += 1
        batch: list[int] = []
        for index in range(self._num_samples):
            if batch and sum(i + 1 for i in (*batch, index)) > self._limit:
                yield batch
                batch = []
            batch.append(index)
        yield batch


class Collater:
    """A collating object with settings, as graph libraries have it."""

    def __init__(self, dataset: Any, follow: str | None = None) -> None:
        self.dataset, self.follow = dataset, follow

    def __call__(self, samples: list[Any]) -> Any:
        return collate(samples)


class Swallows(DataLoader[Any]):
    """Ignores a ``collate_fn`` that it is given, as the loaders of graph libraries do."""

    def __init__(self, dataset: Any, batch_size: int = 1, shuffle: bool = False, **arguments: Any) -> None:
        arguments.pop("collate_fn", None)
        super().__init__(dataset, batch_size, shuffle, collate_fn=self.make_collate(dataset), **arguments)

    def make_collate(self, dataset: Any) -> Any:
        """Returns what it collates with."""
        return Collater(dataset)


class Renames(DataLoader[Any]):
    """Has another name for it, and no other argument."""

    def __init__(self, dataset: Any, join: Any, size: int) -> None:
        super().__init__(dataset, batch_size=size, collate_fn=join)


class Fixed(DataLoader[Any]):
    """Does not let it be replaced."""

    @property
    def collate_fn(self) -> Any:  # type: ignore[override]
        return collate

    @collate_fn.setter
    def collate_fn(self, function: Any) -> None: ...


class CollatesItself(DataLoader[Any]):
    """Makes its batches outside ``collate_fn``."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return ({"joined": list(samples)} for samples in super().__iter__())


class Stateful(DataLoader[Any]):
    """Tells how many batches it has given in this pass, as loaders that resume do."""

    given = 0
    start = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        start, self.start, self.given = self.start, 0, 0
        for number, batch in enumerate(super().__iter__()):
            self.given = number + 1
            if number >= start:
                yield batch

    def state_dict(self) -> dict[str, int]:
        """Returns how far it is."""
        return {"given": self.given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes on from there in the next pass."""
        self.start = state["given"]


# -- under a Trainer -------------------------------------------------------------------------------------------------


class Structures(Swallows):
    """Swallows ``collate_fn`` and collates structures."""

    def make_collate(self, dataset: Any) -> Any:
        from lightning_januspipe.data import collate_structures

        return collate_structures


def seen_by_ranks(strategy: dict[str, Any]) -> list[list[list[float]]]:
    """Energies of each micro-batch of each step, of a loader that Lightning makes anew with a distributed sampler."""
    import tiny

    module, data = tiny.module(num_layers=1), tiny.data(num_train=8)
    data.setup("fit")
    seen: list[list[list[float]]] = []

    def on_train_batch_start(batch: Any, batch_idx: int) -> None:
        seen.append([microbatch["energy"].tolist() for microbatch in batch])

    module.on_train_batch_start = on_train_batch_start
    trainer = quiet_trainer(strategy, max_epochs=1, use_distributed_sampler=True, limit_val_batches=0)
    trainer.fit(module, Structures(data.dataset("train"), batch_size=2, shuffle=True))
    return seen


def fit_stream(strategy: dict[str, Any], one_shot: bool) -> list[float]:
    """Returns the losses on a stream of structures that is read once."""
    import strategy_workers
    import tiny

    from lightning_januspipe.data import collate_structures

    module, data = tiny.module(num_layers=2), tiny.data(num_train=8)
    data.setup("fit")
    train = data.dataset("train")
    stream = OneShot(train[i] for i in range(8)) if one_shot else ResumableStructures(train)
    losses = strategy_workers.Losses()
    trainer = quiet_trainer(strategy, max_epochs=1, limit_val_batches=0, callbacks=[losses])
    trainer.fit(module, DataLoader(stream, batch_size=4, collate_fn=collate_structures))
    return losses.losses


class ResumableStructures(Resumable):
    """Knows its length, so that Lightning does not read ahead by itself."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)
