"""Bad input ends in a clear error on every rank, before any rank waits for another."""

from __future__ import annotations

import time
from pathlib import Path

import bad_modules  # noqa: F401 - fails here, not in the ranks, if it cannot be imported
import pytest
import strategy_workers as workers
from pools import pool_of

from lightning_januspipe.testing import RankError, RankPool

CASES = [
    ("direct forces", ["CaptureError", "never called torch.autograd.grad", "create_graph=True"]),
    ("derivative of a derivative", ["CaptureError", "differentiates a derivative again", "of the energy only"]),
    ("no second derivative", ["CaptureError", "not twice differentiable", "detach()"]),
    ("no graph of the derivative", ["CaptureError", "create_graph=True"]),
    ("objects of a local class", ["ValueError", "cannot be sent", "Outputs", "module level"]),
    ("manual optimization", ["ValueError", "automatic_optimization=False"]),
    ("own backward", ["ValueError", "overrides backward()", "on_after_backward"]),
    ("two optimizers", ["multiple optimizers is only supported with manual optimization"]),  # Lightning's own words
    ("optimizer over all parameters at once", ["ValueError", "LBFGS", "element-wise"]),
    ("different batches", ["PipelineError", "got different batches", "micro-batch 0", "use_distributed_sampler"]),
    ("on the meta device", ["ValueError", "gets no values", "register_buffer", "init_module"]),
    ("empty dataset", ["ValueError", "dataset", "is empty"]),
]


@pytest.mark.parametrize(("case", "words"), CASES, ids=[c for c, _ in CASES])
def test_bad_modules_and_data(pool: RankPool, case: str, words: list[str]) -> None:
    pool.run(abs, 1, world_size=2)  # start the processes; not part of the time
    began = time.monotonic()
    for rank, message in enumerate(pool.run(workers.error_of, case, {}, world_size=2)):
        for word in words:
            assert word in message, f"rank {rank}: {message}"
    assert time.monotonic() - began < 60, "a rank waited"


def test_a_good_module_is_not_refused(pool: RankPool) -> None:
    assert pool.run(workers.error_of, "good", {}, world_size=2) == ["", ""]


def test_loss_that_is_not_finite(pool: RankPool) -> None:
    first, second = pool.run(workers.error_of, "loss not finite", {"num_microbatches": 2}, world_size=2)
    assert "FloatingPointError" in first and "micro-batch 0 is nan" in first
    # The second stage sees the same loss, or hears that the first has ended: whichever comes first.
    assert "micro-batch 0" in second and ("nan" in second or "RankLostError" in second)


def test_more_ranks_than_parts(pool: RankPool) -> None:
    for message in pool.run(workers.error_of, "one spring", {}, world_size=4):
        assert "TooFewParts" in message and "pipeline_size=4" in message and "cuttable part" in message


@pytest.mark.parametrize("sizes", [{"pipeline_size": 3}, {"pipeline_size": 2, "data_size": 2}, {"data_size": 3}])
def test_world_size_that_is_not_the_product(pool: RankPool, sizes: dict[str, int]) -> None:
    for message in pool.run(workers.error_of, "tiny", sizes, world_size=2):
        assert message.startswith("ValueError") and "×" in message and "2 processes" in message


def test_unavailable_precision(pool: RankPool) -> None:
    (message,) = pool.run(workers.unavailable_precision, world_size=1)
    assert message.startswith("ValueError") and "nvfp4" in message and "bf16-mixed" in message


def test_potential_that_is_not_there(pool: RankPool) -> None:
    for message in pool.run(workers.error_of, "tiny", {"potential": "model.potential"}, world_size=2):
        assert "potential='model.potential' is not a submodule" in message and "['potential'" in message


def test_extxyz_without_forces(tmp_path: Path) -> None:
    from ase import Atoms
    from ase.io import write

    from lightning_januspipe.data import ASEDataModule

    file = tmp_path / "unlabelled.extxyz"
    write(file, [Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.74]], info={"energy": -31.0}) for _ in range(3)])
    data = ASEDataModule(file, train_size=2, cutoff=3.0)
    with pytest.raises(ValueError, match="forces") as caught:
        data.setup("fit")
        next(iter(data.train_dataloader()))
    assert "unlabelled.extxyz" in str(caught.value)


def test_a_rank_that_dies_in_the_middle_of_a_step(tmp_path: Path) -> None:
    """The others end within the timeout and say what they waited for."""
    mark = tmp_path / "mark"
    began = time.monotonic()
    with pool_of(3) as ranks, pytest.raises(RankError) as caught:
        ranks.run(workers.killed_and_told, str(mark), world_size=3)
    assert mark.exists(), "rank 1 never reached the place where it should die"
    assert time.monotonic() - began < 90
    message = str(caught.value)
    assert "rank 1 died" in message
    told = [(tmp_path / f"told-{r}").read_text() for r in (0, 2)]
    for text in told:
        assert text.startswith("RankLostError"), text
        assert "message of micro-batch" in text and "global rank 1" in text and "stage" in text
