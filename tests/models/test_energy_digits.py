"""All-electron energies have more digits than float32: of -45,000 eV per atom it loses 4 meV, of a sum of 216 1 eV."""

from __future__ import annotations

import energy_workers
import pytest
import torch

from lightning_januspipe.testing import RankPool, assert_matches_single_process

pytestmark = pytest.mark.filterwarnings("ignore")

PIPELINE = {"pipeline_size": 2, "num_microbatches": 2}


@pytest.mark.parametrize("size", [8, 64, 216])
def test_a_float32_potential_has_the_energy_of_its_float64_twin(size: int) -> None:
    found = energy_workers.errors(None, size)
    assert found["test_energy_mae"] < 1e-6  # eV per atom
    assert 0 < found["test_forces_mae"] < 1e-5


def test_in_a_pipeline(pool: RankPool) -> None:
    for found in pool.run(energy_workers.errors, {**PIPELINE, "num_microbatches": 1}, 64, world_size=2):
        assert found["test_energy_mae"] < 1e-6
        assert 0 < found["test_forces_mae"] < 1e-5


def test_gradients_with_trained_shifts(pool: RankPool) -> None:
    module, data = energy_workers.trained_module, energy_workers.trained_data
    assert_matches_single_process(module, data, devices=2, strategy=PIPELINE, steps=2, pool=pool)


def test_gradients_in_float32(pool: RankPool) -> None:
    (expected,) = pool.run(energy_workers.gradients, {"pipeline_size": 1, "num_microbatches": 2}, world_size=1)
    ranks = pool.run(energy_workers.gradients, PIPELINE, world_size=2)
    assert expected.keys() == set().union(*ranks)
    for found in ranks:
        for name, gradient in found.items():
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(gradient, expected[name], rtol=0, atol=1e-4 * scale + 1e-9, msg=name)
