"""Example batches for capture are made of samples that fit together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

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
