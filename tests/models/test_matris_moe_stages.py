"""A captured MatRIS-MoE gives the parameter gradients of a loss on forces, on stages and on graph ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from capture_models import Batch, Step, Traced, assert_parity
from matris_models import matris
from parity_check import check_parity
from pools import slow

from lightning_januspipe import keys
from lightning_januspipe.capture.validate.against_eager import validate_stages
from lightning_januspipe.data import StructureDataset, collate_structures
from lightning_januspipe.graph.insert_exchanges import shard_captured
from lightning_januspipe.models import MatRISMoE
from lightning_januspipe.testing import RankPool

SPECIES = ["H", "O", "Cu", "Au"]
TASKS = ["first", "second"]


class _Step(Step):
    def training_step(self, batch: Batch) -> Any:
        out = self.potential({k: v for k, v in batch.items() if k not in (keys.ENERGY, keys.FORCES, keys.STRESS)})
        errors = [(out[k] - batch[k]).square().mean() for k in (keys.ENERGY, keys.FORCES, keys.STRESS)]
        return errors[0] + 100 * errors[1] + 1e4 * errors[2]


def batch_of(structures: list[Atoms]) -> Batch:
    """Returns a batch with labels and tasks that are random, the same each time."""
    rng = np.random.default_rng(0)
    for atoms in structures:
        atoms.rattle(0.05, rng=rng)
        atoms.info |= {"task": TASKS[int(rng.integers(2))], "charge": int(rng.integers(-1, 2)), "spin": 0}
    options = {"species": SPECIES, "dtype": torch.float64, "require_labels": False, "tasks": TASKS}
    data = StructureDataset(structures, cutoff=4.0, **options)
    batch = collate_structures([data[i] for i in range(len(data))])
    generator = torch.Generator().manual_seed(0)
    for key in (keys.ENERGY, keys.FORCES, keys.STRESS):
        batch[key] = torch.randn(batch[key].shape, generator=generator, dtype=torch.float64)
    return batch


def crystal() -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.symbols[0] = "Au"
    return atoms


def lone(symbol: str) -> Atoms:
    return Atoms(symbol, [[0.0, 0.0, 0.0]])


@pytest.fixture(scope="module")
def traced() -> Traced:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    sizes = {"cutoff": 4.0, "angle_cutoff": 3.0, "num_features": 8, "expert_features": 6}
    potential = MatRISMoE.from_size("tiny", SPECIES, tasks=TASKS, **sizes)
    torch.set_default_dtype(before)
    return Traced(_Step(potential), batch_of([molecule("H2O2"), crystal(), molecule("H2O")]))


@pytest.mark.parametrize("num_stages", [slow(1), 2, slow(3)])
def test_stages(traced: Traced, num_stages: int) -> None:
    """Also where an element is in no structure, and where atoms are alone."""
    captured = traced.cut(num_stages)
    validate_stages(captured, traced.potential, traced.call_on(batch_of([crystal(), molecule("H2O")])))
    assert_parity(captured, traced.module, batch_of([crystal(), lone("Au"), molecule("OH"), lone("H")]), 1e-9)
    assert_parity(captured, traced.module, batch_of([crystal(), crystal()]), 1e-9)
    assert_parity(captured, traced.module, batch_of([lone("Cu"), lone("H")]), 1e-9)


def test_sizes_have_names(traced: Traced) -> None:
    """Also those that the potential computes itself, which have no place in a call."""
    assert all(not name.endswith(" of ") for name in traced.cut(2).size_words().of.values())


@pytest.mark.parametrize("num_ranks", [2, slow(3)])
def test_graph_ranks(traced: Traced, num_ranks: int) -> None:
    captured = traced.cut(2)
    sharded = shard_captured(captured)
    for structures in ([crystal(), molecule("H2O"), lone("Au")], [crystal()]):
        call = traced.call_on(batch_of(structures))
        assert sharded.verify(traced.potential, captured.inputs(traced.potential)(call.args, call.kwargs), num_ranks)


@pytest.mark.parametrize(
    ("devices", "mesh"),
    [slow(2, {"pipeline_size": 2}), slow(2, {"pipeline_size": 1, "graph_size": 2}), slow(4, {"graph_size": 2})],
)
def test_training(pool: RankPool, devices: int, mesh: dict[str, int]) -> None:
    check_parity(pool, devices, module=partial(matris), num_microbatches=2, **mesh)
