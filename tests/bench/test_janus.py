"""The prediction for MatRIS-MoE counts what training with forces computes, keeps and sends."""

from __future__ import annotations

from collections import Counter
from typing import Any

import expert_bytes
import pytest
import torch
from ase.build import bulk
from torch import Tensor

from lightning_januspipe.bench import janus, janus_check, step_costs
from lightning_januspipe.bench.janus import EXCHANGES, Numbers, count_size, local_seconds
from lightning_januspipe.bench.step_costs import Speeds, measured_speeds
from lightning_januspipe.bench.step_counts import (
    BatchSizes,
    Load,
    OperationCounter,
    StepCounts,
    count_step,
    counted_step,
    line_graph_of,
)
from lightning_januspipe.data import StructureDataset, collate_structures, emt_structures
from lightning_januspipe.expert_ranks import bounds_of, plan_rows, return_rows, row_exchange, send_rows
from lightning_januspipe.experts import grouped_linear
from lightning_januspipe.models import MatRISMoE, PotentialModule

SMALL: dict[str, Any] = {"species": ("Cu", "Ni"), "num_blocks": 1, "num_features": 8, "expert_features": 20}


def test_counts_without_values_are_those_of_a_real_step() -> None:
    structures = emt_structures(2, sizes=(4,), vacancy_probability=0.0, species=("Cu", "Ni"))
    dataset = StructureDataset(structures, cutoff=4.0, dtype=torch.float32, species=("Cu", "Ni"))
    batch = collate_structures([dataset[0], dataset[1]])
    module = PotentialModule(MatRISMoE.from_size("tiny", cutoff=4.0, **SMALL), stress_weight=1.0)
    graph = line_graph_of(module.potential, batch)
    edges, angles = batch["edge_index"].shape[1], graph.edge.shape[0]
    assert graph.directed.shape[0] == edges // 2
    real = counted_step(module, batch, graph)
    assert count_step(BatchSizes(8, edges, angles, structures=2), cutoff=4.0, **SMALL) == real
    # Two of four experts compute each row by two matrices of core and gate, and one more, seven times in a step: for
    # energy, force and backward pass 1, 1 and 4 times as needed, and once for a derivative in the force that is not.
    of_messages, of_updates = 3 * 8 * 20 * 2 + 20 * 8, 2 * 8 * 20 * 2 + 20 * 8
    assert real.rows.products == 7 * 2 * 2 * (edges * of_messages + 8 * of_updates)
    assert real.rows.kept > 0 < real.others.kept


@pytest.mark.slow
def test_counts_are_affine_in_sizes_and_matrices_in_experts() -> None:
    few, more, most = (count_step(BatchSizes(9 + n, 50 + 6 * n, 70 + 10 * n), **SMALL) for n in (0, 4, 8))
    for name in ("rows", "matrices", "others", "optimizer"):
        a, b, c = (getattr(counts, name) for counts in (few, more, most))
        assert c - b == b - a
    assert few.num_operations == more.num_operations == most.num_operations
    with_more = count_step(BatchSizes(9, 50, 70), **SMALL, num_experts=8)
    assert with_more.rows == few.rows
    assert with_more.matrices == few.matrices * 2  # of four experts


def test_angles_and_edges_by_default_are_those_of_copper() -> None:
    dataset = StructureDataset(
        [bulk("Cu")], cutoff=6.0, dtype=torch.float32, species=("Cu", "Ni"), require_labels=False
    )
    batch = collate_structures([dataset[0]])
    graph = line_graph_of(MatRISMoE.from_size("tiny", **SMALL), batch)
    assert (batch["edge_index"].shape[1], graph.edge.shape[0]) == janus.predicted_steps.__defaults__[1:3]


def test_speeds_of_a_device_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is that of a device whose speeds are known."""
    device = Speeds(products=3e9, indexed=2e8, bandwidth=5e9, launch=1e-5)
    monkeypatch.setattr(step_costs, "_KEPT", 2**18)
    with OperationCounter(width=0) as done:

        def now(_: torch.device) -> float:
            return sum(device.seconds(sum(done.loads.values(), Load()), done.num_operations))

        monkeypatch.setattr(step_costs, "_now", now)
        found = measured_speeds(torch.device("cpu"), rows=1024, features=32, width=64)
    for name in ("products", "indexed", "bandwidth", "launch"):
        assert getattr(found, name) == pytest.approx(getattr(device, name), rel=0.02)


def test_seconds_of_a_rank() -> None:
    """The rank with the most rows has its part of the matrices, and the optimizer its part of all parameters."""
    speeds = Speeds(products=10.0, indexed=100.0, bandwidth=1000.0, launch=2.0)
    rows, matrices = Load(products=30, indexed=0, bytes=4000), Load(bytes=16000)
    counts = StepCounts(rows, matrices, Load(products=5, indexed=300), Load(bytes=32000), 7, 3)
    assert local_seconds(counts, speeds, 16, 8, imbalance=2.0) == (6.5, 8 + 2 + 3 + 2 + 20)


def test_state_is_that_of_the_strategy() -> None:
    """What ranks hold in training is compared with the same function where experts train on several ranks."""
    for group_size in (2, 4):
        of_experts, of_others = Numbers(experts=1000 * 5, others=300, sent=0).state(expert_bytes.REPLICAS, group_size)
        ranks = range(expert_bytes.REPLICAS)
        found = [expert_bytes.predicted_bytes("parameters", group_size, r, 4 * 5000, 4 * 300) for r in ranks]
        assert of_others.between == found[0]["others"]
        assert of_experts.between == sum(of_rank["experts"] for of_rank in found) / len(ranks)


def test_table_adds_what_a_rank_has_and_does(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = StepCounts(Load(kept=8e9), Load(), Load(kept=1e9), Load(), 100, 0)
    monkeypatch.setattr(janus, "count_step", lambda *_: counts)
    monkeypatch.setattr(janus, "count_size", lambda *_: Numbers(experts=10**9, others=10**8, sent=10**6))
    table = janus.predicted_steps(atoms=10, imbalance=2.0, launch=1e-3)
    cells = [cell.strip() for cell in table.splitlines()[6].split("|")[1:-1]]
    # 2 GB of an eighth of the experts, and 0.2 GB of an eighth of the others; in phases 0.9 GB of these.
    assert cells[:6] == ["S", "8", "2.2", "17", "19.9", "45"]
    assert [float(cell) for cell in cells[6:]] == pytest.approx([0, 0.1, 0.000933, 0.00233, 0.103], rel=5e-3)


@pytest.mark.slow
def test_prediction_of_a_step_that_was_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    small = janus_check.SmallPotential(1, 32, 4, 2, 112, num_structures=1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    found = janus_check.trained_steps(small, steps=2)
    seconds, kept = janus_check.predicted_step(small, found.sizes, found.speeds)
    assert kept == pytest.approx(found.kept, rel=0.01)
    assert seconds > 0 and len(found.seconds) == 2  # how far off they are is measured, not tested


def test_exchanges_of_the_four_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    found: Counter[str] = Counter()
    phase = "energy"

    def counted(forward: Any) -> Any:
        def run(x: Tensor, *more: Any) -> Tensor:
            found[phase] += 1
            return forward(x, *more)

        return staticmethod(run)

    for kind in (row_exchange._SendRows, row_exchange._ReturnRows):
        monkeypatch.setattr(kind, "forward", counted(kind.forward))
    expert = torch.tensor([0, 1, 2, 1])
    exchange = plan_rows(expert, torch.bincount(expert)[None], bounds_of(3, 1), 0, None)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    weights = [torch.randn(3, *shape, dtype=torch.float64, requires_grad=True) for shape in ((6, 8), (8, 4))]
    rows = send_rows(torch.tanh(x), exchange)
    rows = torch.tanh(grouped_linear(rows, weights[0], exchange.experts))
    energy = (return_rows(grouped_linear(rows, weights[1], exchange.experts), exchange, expert) ** 3).sum()
    phase = "force"
    (force,) = torch.autograd.grad(energy, x, create_graph=True)
    phase = "backward"
    ((force**2).sum() + energy**2).backward()
    assert found.total() == EXCHANGES * found["energy"] == EXCHANGES * 2


def test_what_one_size_has() -> None:
    counted = count_size("tiny", edges=10)
    # Two blocks of width 16, experts of width 16, two of four for each row; messages of edges, then updates of atoms.
    of_messages, of_updates = 3 * 16 * 16 * 2 + 16 * 16, 2 * 16 * 16 * 2 + 16 * 16
    assert counted.experts == 2 * 4 * (of_messages + of_updates)
    assert counted.sent == 2 * 2 * (10 * (48 + 16) + 32 + 16)
