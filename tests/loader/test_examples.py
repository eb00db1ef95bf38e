"""Example batches for capture are made of samples that fit together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from lightning_januspipe.loader.examples import example_batches


def sized(num_atoms: int, seed: int) -> dict[str, Tensor]:
    """A structure; those of one size can be stacked."""
    generator = torch.Generator().manual_seed(seed)
    return {"pos": torch.rand(num_atoms, 3, generator=generator), "energy": torch.rand((), generator=generator)}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("num_microbatches", "num_other"), [(1, 4), (2, 2)])
def test_batches_of_structures_of_one_size(num_workers: int, num_microbatches: int, num_other: int) -> None:
    """The default collate_fn stacks: samples of two batches would not fit into one."""
    samples = [sized(3 + i // 4 % 3, i) for i in range(12)]
    sampler = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    context = "forkserver" if num_workers else None
    loader = DataLoader(samples, batch_sampler=sampler, num_workers=num_workers, multiprocessing_context=context)
    traced, other = example_batches(loader, num_microbatches)
    assert [b["pos"].shape for b in (traced, other)] == [(2 if num_other == 4 else 3, 5, 3), (num_other, 3, 3)]


def test_error_of_the_collating_function_is_told() -> None:
    def collate(samples: list[dict[str, Tensor]]) -> Tensor:
        raise KeyError("charge")

    with pytest.raises(KeyError, match="charge"):
        example_batches(DataLoader([sized(3, 1)] * 4, batch_sampler=[[0, 1], [2, 3]], collate_fn=collate), 1)


def test_error_with_the_keys_of_the_sampler_is_told() -> None:
    """Keys that are no indices fail first, which says nothing about what training would meet."""

    def collate(samples: list[dict[str, Tensor]]) -> Tensor:
        raise ValueError("no charge")

    samples: Any = {"a": sized(3, 1), "b": sized(4, 2)}
    with pytest.raises(ValueError, match="no charge"):
        example_batches(DataLoader(samples, batch_sampler=[["a"], ["b"]], collate_fn=collate), 1)


class Shuffles(Sampler[list[str]]):
    """Yields batches of names, in an order that its passes change, and cannot be copied."""

    def __init__(self, inner: Any = None) -> None:
        self.lock, self.inner = threading.Lock(), inner
        self.generator, self.num_passes, self.left = torch.Generator().manual_seed(0), 0, ["a", "b", "c", "d"]

    def __iter__(self) -> Iterator[list[str]]:
        self.num_passes += 1
        for index in torch.randperm(4, generator=self.generator).tolist():
            yield [self.left.pop(), "abcd"[index]] if self.inner is None else next(self.inner)


def test_samplers_that_cannot_be_copied_stay_as_they_are() -> None:
    samples: Any = {name: sized(3 + i, i) for i, name in enumerate("abcd")}
    sampler, other = Shuffles(), Shuffles()
    loader: Any = DataLoader(samples, batch_sampler=sampler, collate_fn=list)
    traced, _ = example_batches(loader, 1)
    assert len(traced) >= 2
    assert sampler.num_passes == 0
    assert list(sampler) == list(other)


def test_sampler_that_can_be_read_once_is_refused() -> None:
    samples: Any = {"a": sized(3, 1), "b": sized(4, 2)}
    sampler = Shuffles(name for name in (["a"], ["b"]))
    with pytest.raises(ValueError, match="reads a generator, which can be read only once"):
        example_batches(DataLoader(samples, batch_sampler=sampler, collate_fn=list), 1)
    assert list(sampler.inner) == [["a"], ["b"]]
