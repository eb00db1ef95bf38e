"""The work of operations in compiled phases is estimated from sizes: products, look-ups and sums count."""

from __future__ import annotations

import pytest
import torch
from capture_models import DTYPE, OTHER, TRACED, Batch, Potential, Step, Traced, make_batch
from torch import Tensor, nn

from lightning_januspipe.capture import capture_module
from lightning_januspipe.capture.cut.compiled_work import FLOPS_PER_BYTE, with_compiled_work
from lightning_januspipe.capture.cut.profile import measure
from lightning_januspipe.capture.trace.operators import operator_of

EDGES = make_batch(OTHER)["edges"].shape[1]
WIDTH = 6


class Rotating(Potential):
    """Multiplies a small matrix for each edge, which takes long eagerly, and large ones for all of them."""

    def __init__(self) -> None:
        super().__init__(num_layers=2)
        self.large = nn.Linear(WIDTH, 100 * WIDTH, dtype=DTYPE)

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        matrices = vectors[:, :, None] * vectors[:, None, :]
        rotated = torch.bmm(matrices, vectors[:, :, None])[:, :, 0].sum(1, keepdim=True)
        of_edges = self.large(h[batch["edges"][0]] * rotated).sin().unflatten(1, (100, WIDTH)).sum(1)
        h = h + torch.zeros_like(h).index_add(0, batch["edges"][1], of_edges)
        mixed = torch.einsum("...i,kij->...kj", h, self.large.weight.unflatten(0, (100, WIDTH)))
        return h + torch.einsum("nkj, nkj", mixed, mixed) + torch.einsum("nkj->nj", mixed)


@pytest.fixture(scope="module")
def estimates() -> dict[str, list[float]]:
    """The estimates by operator, in execution order."""
    traced = Traced(Step(Rotating()), make_batch(TRACED), make_batch(OTHER))
    tensors = traced.cut(1).inputs(traced.potential)((make_batch(OTHER),), {})
    profile = measure(traced.program, traced.regions, traced.potential, tensors, repeats=1)
    found: dict[str, list[float]] = {}
    for name, work in with_compiled_work(traced.program, profile, "cpu").seconds.items():
        found.setdefault(operator_of(traced.program.by_name[name]), []).append(work)
    return found


def test_products_of_small_matrices_count_as_pointwise(estimates: dict[str, list[float]]) -> None:
    assert estimates["aten.bmm"] == [0.5 * 3 * EDGES * 3 * 8]


def test_large_products_count_by_their_operations(estimates: dict[str, list[float]]) -> None:
    flops = 2 * EDGES * WIDTH * 100 * WIDTH
    moved = EDGES * 101 * WIDTH * 8
    assert max(estimates["aten.linear"]) == max(2 * flops / FLOPS_PER_BYTE["cpu"], moved)


def test_einsum_counts_by_its_equation(estimates: dict[str, list[float]]) -> None:
    """Strained positions; what each atom's features are multiplied with; everything summed; and a sum alone."""
    atoms, mixed = sum(OTHER), 100 * WIDTH * 8
    flops = 2 * atoms * 100 * WIDTH * WIDTH
    strained, product, whole, summed = estimates["aten.einsum"]
    assert strained == 0.5 * 3 * atoms * 3 * 8
    assert product == 0.5 * WIDTH * atoms * mixed and WIDTH < 9
    assert whole == max(2 * 2 * atoms * 100 * WIDTH / FLOPS_PER_BYTE["cpu"], 8 + atoms * mixed * 1)
    assert summed == max(2 * flops / WIDTH / FLOPS_PER_BYTE["cpu"], atoms * (mixed + WIDTH * 8))


def test_rows_that_are_looked_up_and_summed_count_by_their_bytes(estimates: dict[str, list[float]]) -> None:
    assert max(estimates["aten.index"]) == 2 * EDGES * WIDTH * 8
    assert max(estimates["aten.index_add"]) >= EDGES * WIDTH * 8
    assert max(estimates["aten.sin"]) == pytest.approx(0.2 * EDGES * 100 * WIDTH * 8)
    assert set(estimates["aten.unflatten"]) == {0.0}


def test_stages_are_balanced_by_it() -> None:
    """Cut twice, the cut is the same; eager times follow the noise of the machine."""
    module = Step(Rotating())
    batches = make_batch(TRACED), make_batch(OTHER)
    found = [capture_module(module, module.training_step, *batches, [[0, 1]], compiles=True) for _ in range(2)]
    assert found[0].potential.cut == found[1].potential.cut
    work = found[0].potential.cut.costs
    for capture in found:
        times = [costs.total for costs in capture.costs]
        assert [t / sum(times) for t in times] == pytest.approx([w / sum(work) for w in work])
