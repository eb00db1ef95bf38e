"""Counting bytes: cases small enough to count by hand."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from toy import CHAINS, FLOAT, chain, loss_gradients, microbatch

from lightning_januspipe.engine.memory import StorageCounter
from lightning_januspipe.engine.single_process import SingleProcessResult, run_single_process
from lightning_januspipe.engine.specs import ChainSpec, StageOutput, TensorSpec
from lightning_januspipe.schedule import MemoryCosts

NUM_ATOMS = 4
VECTORS = NUM_ATOMS * 3 * 8
"""Bytes of one vector for each atom."""


def test_only_new_storages_count_while_they_live() -> None:
    weight = torch.ones(10, dtype=FLOAT)
    counter = StorageCounter()
    with counter:
        view = weight.view(2, 5)[1:].T
        assert counter.alive() == 0, "views of what was there before"
        made = weight * 2
        other = made[:3].add_(1.0)
        assert counter.alive() == 80, "a view and an operation in place make nothing"
        pair = torch.ones(3, 3, dtype=FLOAT).sort()
    assert counter.alive() == 80 + 2 * 72
    del pair
    assert counter.alive() == 80
    assert counter.alive(without=[other]) == 0, "excluded by storage"
    del made
    assert counter.alive() == 80, "the view holds it"
    del other
    assert counter.alive() == 0
    weight * 2  # not active
    counter.note([weight, view])
    assert counter.alive() == 80, "one storage, noted twice"


def test_tensors_saved_for_backward_count() -> None:
    weight = torch.ones(10, dtype=FLOAT, requires_grad=True)
    counter = StorageCounter()
    with counter:
        result = (weight * 2).exp().sum()
    assert counter.alive() == 80 + 8, "exp saves its result, and the product is gone"
    result.backward()
    assert counter.alive() == 8


class _First:
    """Exponentials of the weighted positions."""

    index = 0
    boundary_in: Sequence[TensorSpec] = ()
    boundary_out = (TensorSpec(("n", 3), FLOAT),)
    observables: Sequence[int] = ()

    def __init__(self) -> None:
        self.parameters = [nn.Parameter(torch.ones(3, dtype=FLOAT))]

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        positions = tensors[0].detach().requires_grad_()
        return StageOutput([(positions * self.parameters[0]).exp()], [], [], [positions])


class _Last:
    """Weighted sum of squares."""

    index = 1
    boundary_in = _First.boundary_out
    boundary_out: Sequence[TensorSpec] = ()
    observables = (0,)

    def __init__(self) -> None:
        self.parameters = [nn.Parameter(torch.ones(3, dtype=FLOAT))]

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        positions = tensors[0].detach().requires_grad_()
        energy = (boundary[0] * boundary[0] * self.parameters[0]).sum()
        return StageOutput([], [energy], [energy.view(1)], [positions])


def _measured(**options: bool) -> SingleProcessResult:
    spec = ChainSpec((TensorSpec(("n", 3), FLOAT),), (TensorSpec((1,), FLOAT),), (1,))
    tensors = [torch.ones(NUM_ATOMS, 3, dtype=FLOAT)]
    return run_single_process([_First(), _Last()], spec, tensors, loss_gradients, measure_memory=True, **options)


def test_bytes_of_phases_counted_by_hand() -> None:
    first = MemoryCosts(
        energy=VECTORS,  # exp
        force=3 * VECTORS,  # the seed received, its product with exp, and that times the weight: the derivative
        kept=VECTORS,  # the gradient of exp
    )
    last = MemoryCosts(
        energy=2 * VECTORS + 8,  # h received, its square, and the energy
        force=3 * VECTORS + 8,  # the seed 1, its product with the weight, ∂E/∂h, and ∂E/∂x = 0
        kept=VECTORS,  # what the derivatives add to ∂L/∂h
    )
    assert _measured().memory == [first, last]


def test_deferral_keeps_the_gradients_that_arrive_at_joins() -> None:
    first, last = _measured(defer=True).memory or []
    # After BE: the gradients of both products of FF, one of them v as received, and λ as received; the derivative is
    # gone. After WF: the gradient of exp, and λ.
    assert first == MemoryCosts(VECTORS, 3 * VECTORS, 2 * VECTORS)
    # After BF: u as received, and what the derivatives add to ∂L/∂h; ∂E/∂h and ∂E/∂x, no less, are gone.
    assert last == MemoryCosts(2 * VECTORS + 8, 3 * VECTORS + 8, 0)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("defer", [False, True])
def test_measuring_changes_nothing(name: str, defer: bool) -> None:
    functions, spec = chain(CHAINS[name])
    tensors = microbatch(1).tensors
    plain = run_single_process(functions, spec, tensors, loss_gradients, defer=defer)
    measured = run_single_process(functions, spec, tensors, loss_gradients, defer=defer, measure_memory=True)
    assert plain.memory is None and measured.memory is not None
    assert all(b.energy > 0 and b.force > 0 for b in measured.memory)
    for parameter in {p for f in functions for p in f.parameters}:
        torch.testing.assert_close(measured.gradients.get(parameter), plain.gradients.get(parameter), rtol=0, atol=0)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("split_stages", [(), (0, 1)])
@pytest.mark.parametrize("defer", [False, True])
def test_nothing_but_results_is_alive_in_the_end(name: str, split_stages: tuple[int, ...], defer: bool) -> None:
    functions, spec = chain(CHAINS[name])
    tensors = microbatch(1).tensors
    gc.disable()  # no reference cycles either
    try:
        with StorageCounter() as counter:
            result = run_single_process(
                functions, spec, tensors, loss_gradients, defer=defer, split_stages=split_stages
            )
        gradients = [result.gradients.get(p) for f in functions for p in f.parameters]
        results = [*result.observables, *result.derivatives, *(g for g in gradients if g is not None)]
        assert counter.alive() > 0
        assert counter.alive(without=results) == 0
    finally:
        gc.enable()


def test_split_stages() -> None:
    functions, spec = chain(CHAINS["three stages"])
    tensors = microbatch(1).tensors
    whole = run_single_process(functions, spec, tensors, loss_gradients, measure_memory=True).memory
    split = run_single_process(functions, spec, tensors, loss_gradients, split_stages=(1,), measure_memory=True).memory
    assert whole is not None and split is not None
    assert (split[0], split[2]) == (whole[0], whole[2])
    assert split[1] == MemoryCosts(whole[1].energy, whole[1].force, 0), "nothing waits between BF and BE"
