"""Tests whether a module trains the same in a pipeline as in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.testing.pool import RankPool
from lightning_januspipe.testing.runs import RunRecord, train_in_pipeline, train_reference


def assert_matches_single_process(
    module_factory: Callable[[], Any],
    datamodule_factory: Callable[[], Any],
    *,
    devices: int,
    strategy: dict[str, Any] | None = None,
    steps: int = 3,
    rtol: float = 1e-9,
    trainer: dict[str, Any] | None = None,
    pool: RankPool | None = None,
) -> None:
    """Trains in a pipeline and in one process, and compares losses, gradients and parameters of every step.

    The reference is the module as it is under a plain Trainer, which differentiates the mean loss of the same
    micro-batches of all replicas. Use a float64 module: in float32 the two differ by rounding.

    Args:
        module_factory: A function that can be imported and makes the LightningModule, the same at every call (seed it).
        datamodule_factory: A function that can be imported and makes a LightningDataModule.
        devices: The number of processes.
        strategy: Arguments of :class:`~lightning_januspipe.JanusPipeStrategy`.
        steps: Optimizer steps.
        rtol: The largest difference, relative to the largest entry of the same tensor.
        trainer: Further arguments of both Trainers, for example ``{"gradient_clip_val": 1.0}``.
        pool: The processes to use; by default new ones.

    Raises:
        AssertionError: Something differs, or a rank failed (:class:`~lightning_januspipe.testing.RankError`); the
            message says what.
        ValueError: A factory cannot be sent to other processes.

    Example:
        >>> assert_matches_single_process(make_module, make_data, devices=2, strategy={"num_microbatches": 4})
    """
    own = pool or RankPool(devices)
    arguments = (module_factory, datamodule_factory, strategy or {}, steps, trainer or {})
    try:
        ranks = own.run(train_in_pipeline, *arguments, world_size=devices)
        (reference,) = own.run(train_reference, *arguments, devices, world_size=1)
    finally:
        if pool is None:
            own.close()
    compare_records(reference, ranks, rtol)


def compare_records(reference: RunRecord, ranks: Sequence[RunRecord], rtol: float) -> None:
    """Compares the records of all ranks with the record of one process.

    Args:
        reference: The record of the module as it is.
        ranks: The records of every rank, with gradients only of the parameters that it trains.
        rtol: The largest difference, relative to the largest entry of the same tensor.

    Raises:
        AssertionError: Something differs.
    """
    assert reference.losses, "the reference trained on no batch"
    for rank, record in enumerate(ranks):
        _assert_same_start(reference, record, rank)
        assert len(record.losses) == len(reference.losses), (
            f"rank {rank} trained on {len(record.losses)} batches instead of {len(reference.losses)}"
        )
    try:
        # A wrong gradient makes later losses differ, so it is looked for before them.
        _compare_losses(reference, ranks, range(1), rtol)
        for step in range(len(reference.gradients)):
            _compare_gradients(reference, ranks, step, rtol)
        _compare_losses(reference, ranks, range(1, len(reference.losses)), rtol)
        for rank, record in enumerate(ranks):
            for name, expected in reference.parameters.items():
                _assert_close(f"rank {rank}: parameter {name}", expected, record.parameters[name], rtol)
    except AssertionError as error:
        coarse = [(name, p.dtype) for name, p in reference.parameters.items() if torch.finfo(p.dtype).eps > rtol]
        if not coarse:
            raise
        name, dtype = coarse[0]
        raise AssertionError(
            f"{error}. {name} is {dtype}, which cannot agree to rtol={rtol:g}: build the module and its data in float64"
        ) from error


def _assert_same_start(reference: RunRecord, record: RunRecord, rank: int) -> None:
    assert record.initial.keys() == reference.initial.keys(), (
        f"rank {rank}: the module had other parameters than in the process of the reference: "
        f"{sorted(record.initial.keys() ^ reference.initial.keys())}"
    )
    for name, expected in reference.initial.items():
        assert torch.equal(expected, record.initial[name]), (
            f"rank {rank}: {name} was another before training than in the process of the reference. The module's "
            "factory has to make the same module at every call: have it seed its random numbers (torch.manual_seed)"
        )


def _compare_losses(reference: RunRecord, ranks: Sequence[RunRecord], batches: range, rtol: float) -> None:
    for batch in batches:
        expected = reference.losses[batch]
        for rank, record in enumerate(ranks):
            found = record.losses[batch]
            assert abs(expected - found) <= rtol * abs(expected), (
                f"rank {rank}: the loss of batch {batch} is {found!r} instead of {expected!r}"
            )


def _compare_gradients(reference: RunRecord, ranks: Sequence[RunRecord], step: int, rtol: float) -> None:
    seen: set[str] = set()
    for rank, record in enumerate(ranks):
        for name, found in record.gradients[step].items():
            expected = reference.gradients[step][name]
            what = f"rank {rank}: the gradient of {name} in step {step}"
            assert (found is None) == (expected is None), f"{what} is {found}, not {expected}"
            if found is not None and expected is not None:
                _assert_close(what, expected, found, rtol)
            seen.add(name)
    missing = set(reference.gradients[step]) - seen
    assert not missing, f"no rank trains {sorted(missing)}"


def _assert_close(what: str, expected: Tensor, found: Tensor, rtol: float) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((expected - found).abs().max()) if expected.numel() else 0.0
    # Entries that vanish by symmetry are rounding noise on both sides.
    assert error <= rtol * scale + 1e-14, f"{what} differs by {error:.3e} at a scale of {scale:.3e}"
