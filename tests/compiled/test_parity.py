"""Phase graphs give the parameter gradients of the plain double backward, for many kinds of models."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import tiny
from capture_models import Batch, Potential, Step, Traced, assert_parity, make_batch, structures_of
from compiled_models import factory, joint_graphs
from parity_models import CASES
from pools import slow

from lightning_januspipe.compiled.compiled_stage import CompiledStage
from lightning_januspipe.compiled.minimum_cut import ACTIVATIONS
from lightning_januspipe.compiled.phase_graphs import phase_graphs

SIZES = [(2, 5, 1, 3), (1,), (2,), (1, 1, 1)]
"""Other sizes than traced; one atom; two atoms; no edges."""


@pytest.mark.parametrize("name", CASES)
def test_parameter_gradients(name: str) -> None:
    """Of two stages; what is deferred is tested with every second model."""
    traced = Traced(CASES[name]())
    captured = traced.cut(2)
    defer = list(CASES).index(name) % 2 == 0
    make = factory([phase_graphs(joint, defer=defer) for joint in joint_graphs(traced, captured)])
    for sizes in SIZES[:2]:
        assert_parity(captured, traced.module, make_batch(sizes, seed=1), make_stage=make, defer=defer)


@pytest.mark.parametrize("num_stages", [1, 2, slow(4)])
def test_every_activation_and_size(num_stages: int) -> None:
    """Each activation with and without deferral, each with two of the sizes in turn."""
    plain = Traced(Step(Potential(num_stages)))
    captured = plain.cut(num_stages)
    joints = joint_graphs(plain, captured)
    made: list[CompiledStage] = []
    for i, (activation, defer) in enumerate(product(ACTIVATIONS, (False, True))):
        make = factory([phase_graphs(joint, activation, defer) for joint in joints], made)
        for sizes in (SIZES[i % 4], SIZES[(i + num_stages) % 4]):
            assert_parity(captured, plain.module, make_batch(sizes, seed=1), make_stage=make, defer=defer)
    assert not any(stage.num_misfits for stage in made)


ODD = [(0, 3, 4), (6,), (2,), (1, 6)]
"""Structures of other sizes than traced; one atom without edges; a cell of one atom; no edges."""


class _WithoutStress(Step):
    """Some of the structures have no cell."""

    def training_step(self, batch: Batch) -> Any:
        out = self.potential(batch)
        return sum((out[k] - batch[k]).square().mean() for k in ("energy", "forces"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("num_stages", [1, 2, 4])
def test_reference_potential(num_stages: int, float64: None) -> None:
    """The same of the reference potential."""
    module = _WithoutStress(tiny.module(num_layers=num_stages).potential)
    traced = Traced(module, structures_of(tiny.data(8), 3))
    captured = traced.cut(num_stages)
    joints = joint_graphs(traced, captured, (structures_of(tiny.data(8), 3), structures_of(tiny.data(8), 5)))
    loader = tiny.OddStructures().train_dataloader()
    batches = [loader.collate_fn([loader.dataset[i] for i in indices]) for indices in ODD]
    made: list[CompiledStage] = []
    for i, (activation, defer) in enumerate(product(ACTIVATIONS, (False, True))):
        make = factory([phase_graphs(joint, activation, defer) for joint in joints], made)
        for batch in (batches[i % 4], batches[(i + 1 + num_stages) % 4]):
            assert_parity(captured, traced.module, batch, make_stage=make, defer=defer)
    assert not any(stage.num_misfits for stage in made)
