"""Each phase of a stage frees what no later one reads, also after an error."""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from stage_walk import Walk
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toy import CHAINS, FLOAT, chain, microbatch

from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.stage import SplitStage, Stage


@dataclass(eq=False)
class _Saved:
    """Wraps a tensor saved for backward, so that its life can be watched."""

    tensor: Tensor


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Garbage collections look at what the tests make, not at all that was imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@contextmanager
def _watched() -> Iterator[weakref.WeakSet[_Saved]]:
    alive: weakref.WeakSet[_Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        # Autograd attaches the graph again; with it, a saved output would hold its own node.
        saved = _Saved(tensor.detach())
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield alive


def test_each_phase_frees_what_no_later_one_reads() -> None:
    functions, _ = chain([CHAINS["two stages"][1]])
    stage = Stage(functions[0], GradientBuffers())
    tensors = microbatch(7).tensors
    with _watched() as of_energy:
        _, (energies,) = stage.forward_energy(0, tensors, [])
    num_of_energy = len(of_energy)
    with _watched() as of_force:
        _, derivatives = stage.forward_force(0, [])
    gc.collect()
    assert num_of_energy > 0 and len(of_energy) == num_of_energy and len(of_force) > 0

    stage.backward_force(0, [], [torch.ones_like(d) for d in derivatives])
    gc.collect()
    assert len(of_force) == 0, "the graph of FF outlives BF"
    assert len(of_energy) == num_of_energy, "BE still has to walk the graph of FE"
    assert stage.num_inflight == 1

    stage.backward_energy(0, [], [torch.ones_like(energies)])
    gc.collect()
    assert len(of_energy) == 0, "the graph of FE outlives BE"
    assert stage.num_inflight == 0


@pytest.mark.parametrize("order", ["BF WF BE WE", "BF BE WF WE"])
def test_deferred_phases_free_what_no_later_one_reads(order: str) -> None:
    functions, _ = chain(CHAINS["two stages"])
    stage = Stage(functions[1], GradientBuffers())
    tensors = microbatch(7).tensors
    with _watched() as of_energy:
        _, (energies,) = stage.forward_energy(0, tensors, [torch.ones(7, 5, dtype=FLOAT)])
    with _watched() as of_force:
        message, derivatives = stage.forward_force(0, [])
    alive = {}
    for phase in order.split():
        if phase == "BF":
            stage.backward_force(0, message, [torch.ones_like(d) for d in derivatives], defer=True)
        elif phase == "BE":
            stage.backward_energy(0, [], [torch.ones_like(energies)], defer=True)
        elif phase == "WF":
            stage.weight_force(0)
        else:
            assert stage.num_inflight == 1
            stage.weight_energy(0)
        gc.collect()
        alive[phase] = len(of_energy), len(of_force)
    assert alive["BF"][0] > 0 and alive["BF"][1] > 0 and alive["BE"][0] > 0
    assert alive["WF"][0] > 0 and alive["WF"][1] == 0, "the graph of FF outlives WF"
    assert alive["WE"] == (0, 0), "the graph of FE outlives WE"
    assert stage.num_inflight == 0


@pytest.mark.parametrize("fails", ["BF", "BE", "WF", "WE"])
def test_an_error_in_the_midst_of_a_phase_leaves_nothing_behind(fails: str) -> None:
    functions, _ = chain(CHAINS["three stages"])
    stages = [Stage(f, GradientBuffers()) for f in functions]
    walk = Walk(stages, 0, microbatch(7).tensors, defer=True)
    with _watched() as saved:
        for phase in ("FE", "FF", "BF", "BE", "WF", "WE"):
            if phase == "BF":
                walk.evaluate_loss()
            if phase == fails:
                # The engine of autograd leaves what it had still to do in a queue of the thread.
                with ThreadPoolExecutor(1) as thread:
                    assert isinstance(thread.submit(_fail, walk, phase).exception(), FloatingPointError)
                break
            walk.run(phase)
    gc.collect()
    assert len(saved) > 0
    for stage in stages:
        stage.clear()
        assert stage.num_inflight == 0
    del walk
    for _ in range(100):  # the thread's own queue goes a moment after the thread has been joined
        gc.collect()
        if not saved:
            break
        time.sleep(0.05)
    assert len(saved) == 0


def _fail(walk: Walk, phase: str) -> None:
    with _Failing():
        walk.run(phase)


def test_split_stages_free_their_graphs() -> None:
    functions, _ = chain(CHAINS["two stages"])
    stage = SplitStage(functions[1], GradientBuffers())
    with _watched() as saved:
        stage.begin_force(0, microbatch(7).tensors, [torch.ones(7, 5, dtype=FLOAT)])
        message, derivatives = stage.forward_force(0, [])
    assert len(saved) > 0 and stage.num_inflight == 1
    u, mu = stage.backward_force(0, message, derivatives)
    assert u == [] and [m.shape for m in mu] == [(7, 5)]
    gc.collect()
    assert len(saved) == 0 and stage.num_inflight == 0


def test_evaluation_frees_the_graph_of_the_forward_pass() -> None:
    functions, _ = chain([CHAINS["two stages"][1]])
    stage = Stage(functions[0], GradientBuffers())
    with _watched() as saved:
        stage.forward_energy(0, microbatch(8).tensors, [])
        stage.forward_force(0, [], create_graph=False)
    gc.collect()
    assert len(saved) == 0


class _Failing(TorchDispatchMode):
    """Fails at the second matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten.mm.default
        if self.count == 2:
            raise FloatingPointError
        return func(*args, **(kwargs or {}))
