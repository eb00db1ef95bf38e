"""The parity check fails when the pipeline is broken: without this, that it passes would mean little."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mutants
import pytest
import tiny
from parity_check import check_parity

from lightning_januspipe.capture import CaptureError, capture_module
from lightning_januspipe.loader.examples import example_batches
from lightning_januspipe.testing import RankError, RankPool

STAGES: dict[str, Any] = {"num_microbatches": 3, "schedule": "wavek"}
DEFERRED: dict[str, Any] = {"num_microbatches": 3}
GRAPH: dict[str, Any] = {"pipeline_size": 1, "graph_size": 2, "num_microbatches": 3}
REPLICAS: dict[str, Any] = {"pipeline_size": 2, "data_size": 2, "num_microbatches": 2, "schedule": "wavek"}


@contextmanager
def _found(match: str) -> Iterator[pytest.ExceptionInfo[AssertionError]]:
    """The comparison fails, and not the run."""
    with pytest.raises(AssertionError, match=match) as error:
        yield error
    assert not isinstance(error.value, RankError), "the run itself failed"


def _check(name: str, pool: RankPool, devices: int, strategy: dict[str, Any]) -> None:
    module = partial(mutants.mutated, name, "on_train_epoch_start")
    check_parity(pool, devices, mutants.data, module, steps=1, reference=mutants.tied_module, **strategy)


@pytest.mark.parametrize(
    "name",
    [
        "second-order term cut",
        "BF message zero",
        "BE message off by a millionth",
        "weight of a micro-batch wrong",
        "shared gradients not summed",
        "cotangent of the strain dropped",
        "WF lost",
        "WE lost",
    ],
)
def test_faults_between_stages_are_found(pool: RankPool, name: str) -> None:
    with _found("differs by|gradient of .* is None"):
        _check(name, pool, 2, DEFERRED if name in ("WF lost", "WE lost") else STAGES)


def test_faults_between_replicas_are_found(pool: RankPool) -> None:
    with _found("differs by"):
        _check("replicas summed instead of averaged", pool, 4, REPLICAS)


@pytest.mark.parametrize(
    "name",
    [
        "halo without second derivative",
        "halo scaled by the ranks",
        "energies summed again",
        "strain summed on one rank",
        "graph ranks averaged",
    ],
)
def test_faults_between_graph_ranks_are_found(pool: RankPool, name: str) -> None:
    with _found("differs by|gradient of .* is None|the loss of batch 0 is") as error:
        _check(name, pool, 2, GRAPH)
    only_gradients = name in ("halo without second derivative", "graph ranks averaged")
    assert ("the loss of batch 0" not in str(error.value)) == only_gradients


@pytest.mark.parametrize("name", ["second copy not trained", "part of the other rank lost"])
def test_faults_between_the_copies_of_a_stage_are_found(pool: RankPool, name: str) -> None:
    module = partial(mutants.mutated, name, "on_train_epoch_start", tiny.module)
    strategy = {"schedule": "1f1b-2nd", "num_microbatches": 2}
    with _found("differs by"):
        check_parity(pool, 4, mutants.data, module, steps=1, reference=tiny.module, **strategy)


@pytest.mark.parametrize(("devices", "strategy"), [(2, STAGES), (2, DEFERRED), (2, GRAPH), (4, REPLICAS)])
def test_without_a_fault_the_check_passes(pool: RankPool, devices: int, strategy: dict[str, Any]) -> None:
    _check("unchanged", pool, devices, strategy)


@pytest.mark.parametrize("name", ["second-order term cut", "cotangent of the strain dropped"])
def test_capture_refuses_stages_that_are_wrong_before_training(name: str) -> None:
    """A fault inside the stages does not get as far as a training step."""
    module, data = mutants.mutated(name, "break_it"), mutants.data()
    data.prepare_data()
    data.setup("fit")
    traced, other = example_batches(data.train_dataloader(), 2)
    module.break_it()
    try:
        with pytest.raises(CaptureError, match="differs from the module itself"):
            capture_module(module, lambda batch: module.training_step(batch, 0), traced, other, [range(2)])
    finally:
        module.teardown("fit")
    capture = capture_module(module, lambda batch: module.training_step(batch, 0), traced, other, [range(2)])
    shared = {n for n, stages in capture.potential.parameter_stages().items() if stages == {0, 1}}
    assert any("self_connection" in n for n in shared) and any("radial_network" in n for n in shared), (
        "nothing is shared"
    )
