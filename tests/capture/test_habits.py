"""What widely used packages do in their forwards is captured, and trains as it does without stages."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from batch_kinds import CallableBatch, GraphBatch, Graphs, RegistryBatch, SlottedBatch
from capture_models import Traced, assert_parity, eager_gradients, staged_gradients
from graph_habits import (
    CountsWithin,
    Experts,
    FillsGrid,
    FindsPairs,
    LooksUpPairs,
    MasksLast,
    NetworkOfEachElement,
    ReadsBothEnds,
    ReducesByScatter,
    Repeats,
    RotatesAll,
    Stacked,
    StacksPairs,
    stacked,
)
from habits import (
    AsksForCompiler,
    Asserts,
    BranchesOnEnergy,
    BroadcastsOne,
    ChecksMask,
    DrawsAngles,
    HasDropout,
    HasReference,
    Hessian,
    LoopsOverStructures,
    MakesEdges,
    MasksEdges,
    Potential,
    ReadsBuffer,
    ReadsConstants,
    ReadsOwnSizes,
    ReferenceStep,
    ReturnsBatch,
    ReturnsSizes,
    SamplesByValue,
    Step,
    TwoDerivatives,
    TwoEnergies,
    WritesOnce,
    WritesVectors,
    collate,
    sample,
    with_ones,
)
from torch import nn

from lightning_januspipe.capture.adapters.capture_adapter import BUILT_IN
from lightning_januspipe.capture.trace.program import ReturnedSize
from lightning_januspipe.capture.trees import copied, leaves
from lightning_januspipe.capture.validate.against_eager import run_staged, validate_evaluation, validate_stages
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.graph.insert_exchanges import shard_captured
from lightning_januspipe.random_state import seeded

OTHER = (5, 3, 4, 7)


def traced(step: nn.Module, make: Callable[[Any], Any] = lambda b: b) -> Traced:
    """The traced potential of a step."""
    return Traced(step, make(batch(0, 1, 2)), make(batch(*OTHER)))


def batch(*seeds: int) -> Any:
    return collate([sample(seed) for seed in seeds])


def trains(step: nn.Module, make: Callable[[Any], Any] = lambda b: b, stages: Sequence[int] = (2, 3)) -> Traced:
    """Asserts that stages train like the module on a batch of other sizes."""
    found = traced(step, make)
    for num_stages in stages:
        potential = found.cut(num_stages)
        validate_stages(potential, found.potential, found.call_on(make(batch(*OTHER))))
        assert_parity(potential, step, make(batch(*OTHER)), 1e-9)
    return found


@pytest.mark.parametrize(
    ("potential", "make", "labels"),
    [
        (Potential, CallableBatch, lambda b: b),
        (WritesOnce, RegistryBatch, lambda b: b),
        (Potential, SlottedBatch, lambda b: b),
        (WritesVectors, lambda b: Graphs(b, {}), lambda g: g.nodes),
        (Stacked, stacked, lambda b: b),
        (StacksPairs, stacked, lambda b: b),
    ],
)
def test_batches_of_any_form(potential: Any, make: Any, labels: Any) -> None:
    trains(Step(potential(), labels), make)


def test_batch_that_is_returned_with_results() -> None:
    """Ranks are sent what the trace holds, so no size of the trace may be left in it."""

    class WrittenStep(Step):
        def training_step(self, batch: Any) -> Any:
            out = self.potential(batch)
            loss = (out["predicted_energy"] - out["energy"]).pow(2).mean()
            return loss + (out["predicted_forces"] - out["forces"]).pow(2).mean()

    program = trains(WrittenStep(ReturnsBatch()), GraphBatch).program
    assert isinstance(program.returned.num_graphs, ReturnedSize)
    pickle.loads(pickle.dumps(program))


class Cell:
    """Holds itself, tensors, and a counter without tensors."""

    def __init__(self) -> None:
        self.me, self.tensor, self.names = self, torch.ones(2), {"a"}


@pytest.mark.parametrize(
    "potential", [ReturnsSizes, ChecksMask, Asserts, ReadsBuffer, AsksForCompiler, ReadsConstants, ReadsOwnSizes]
)
def test_values_that_are_read(potential: type[Potential]) -> None:
    trains(Step(potential()))


def test_integers_that_are_the_same_for_every_batch() -> None:
    """No input carries them; the ones that are computed from a buffer are compared for each batch."""
    found = traced(Step(ReadsConstants()))
    program = found.program
    assert not program.sizes and len(program.inputs) == len(found.format.tensors)
    assert sorted(fixed.value for _, fixed in program.fixed_values) == [0.5, 3, 3, 5]
    assert found.cut(2).parameter_stages()["factor"] == {0, 1}
    assert len(traced(Step(ReadsOwnSizes())).program.sizes) == 2
    found.potential.widths += 1
    call = found.call_on(batch(*OTHER))
    with pytest.raises(CaptureError, match=r"captured with the value 3 at .*self.widths\[1\].*has the value 4 there"):
        found.cut(2).inputs(found.potential)(call.args, call.kwargs)


def test_returned_sizes_are_those_of_the_batch() -> None:
    found = traced(Step(ReturnsSizes()))
    out = found.call_on(b := batch(*OTHER))
    tensors = found.cut(2).inputs(found.potential)(out.args, out.kwargs)
    given = found.potential(copied(b))
    value = found.cut(2).return_value(found.potential)
    observables = [given["energy"]]
    returned = value(tensors, observables, [-given["forces"]])
    num_atoms = len(b["pos"])
    assert [returned[k] for k in ("num_atoms", "mean", "many")] == [num_atoms, num_atoms / 4, True]
    assert [type(returned[k]) for k in ("num_atoms", "mean", "many")] == [int, float, bool]
    pickle.loads(pickle.dumps(found.program))


def test_batch_that_takes_the_other_branch() -> None:
    found = traced(Step(ChecksMask()))
    other = batch(*OTHER)
    other["edge_index"][0, 5] = other["edge_index"][1, 5]
    call = found.call_on(other)
    with pytest.raises(
        CaptureError, match=r"captured with the value True at .*habits.py:\d+, 'if not mask.all\(\):', but.*False"
    ):
        found.cut(2).inputs(found.potential)(call.args, call.kwargs)


def test_buffer_that_changes() -> None:
    found = traced(Step(ReadsBuffer()))
    call = found.call_on(batch(*OTHER))
    found.cut(2).inputs(found.potential)(call.args, call.kwargs)
    found.potential.p += 1
    with pytest.raises(CaptureError, match="captured with the value 6 at .*has the value 7 there"):
        found.cut(2).inputs(found.potential)(call.args, call.kwargs)


@pytest.mark.parametrize(
    ("potential", "error"),
    [
        (BranchesOnEnergy, r"reads the value True from a tensor that depends on parameters.*energy.sum\(\) > -1e9"),
        (LoopsOverStructures, r"a loop over structures.*ends = torch.cumsum"),
        (Hessian, r"differentiates a derivative again in its forward \(a Hessian"),
    ],
)
def test_refused(potential: type[Potential], error: str) -> None:
    with pytest.raises(CaptureError, match=error):
        traced(Step(potential()))


def test_sizes_of_one_broadcast() -> None:
    found = trains(Step(BroadcastsOne()), with_ones)
    wide = with_ones(batch(*OTHER))
    call = found.call_on(wide | {"bias": wide["bias"].expand(-1, 2)})
    with pytest.raises(CaptureError, match=r"size 1 of dimension 1 of its input args\[0\]\['bias'\]"):
        potential = found.cut(2)
        potential.bind_sizes(potential.inputs(found.potential)(call.args, call.kwargs))


def test_frozen_parameters_that_the_step_reads() -> None:
    step = ReferenceStep(HasReference())
    potential = trains(step).cut(2)
    assert potential.step_parameters == ("reference.weight",)
    assert potential.parameter_stages()["reference.weight"] == {0, 1}
    step.potential.reference.requires_grad_()
    with pytest.raises(
        CaptureError, match=r"uses parameters .*outside the potential.*potential.reference.weight.*without expert_size"
    ):
        traced(step)


@pytest.mark.parametrize(("potential", "energies"), [(TwoDerivatives, 1), (TwoEnergies, 2)])
def test_forces_and_stress_one_after_the_other(potential: type[Potential], energies: int) -> None:
    """The stress may be of another energy, which is computed from copies of positions and strain then."""
    program = trains(Step(potential()), stages=(1, 2)).program
    assert len(program.coordinates) == 2 and len(program.energies) == energies


@pytest.mark.parametrize("positions", ["crystal", "lone"])
def test_derivatives_that_vanish_by_symmetry(positions: str) -> None:
    """Forces that are sums of terms that cancel are compared at the scale of the terms."""
    step = Step(TwoDerivatives())
    found = traced(step)
    other = batch(4, 4, 8)
    if positions == "crystal":  # a ring of equal atoms, each with the same neighbours
        angle = 2 * torch.pi * torch.arange(3, dtype=torch.float64) / 3
        ring = torch.stack([angle.cos(), angle.sin(), 0 * angle], 1)
        other["pos"], other["z"] = ring.repeat(3, 1) + 1e3, torch.zeros(9, dtype=torch.int64)
        with torch.no_grad():
            for layer in step.potential.layers:
                layer.a.weight[:, -1] = 0  # messages that do not depend on distances
    else:
        other["pos"] *= 0
    validate_stages(found.cut(2), found.potential, found.call_on(other))


@pytest.mark.parametrize("potential", [DrawsAngles, HasDropout])
def test_random_numbers_are_drawn_once_for_each_micro_batch(potential: type[Potential]) -> None:
    """A step that seeds the generator gets the gradients of the numbers that it then draws itself."""
    step = Step(potential())
    found = traced(step)
    other = batch(*OTHER)
    captured = found.cut(3)
    validate_stages(captured, found.potential, found.call_on(copied(other)))
    validate_evaluation(captured, found.potential, found.call_on(copied(other)))
    gradients = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        gradients.append(staged_gradients(captured, step, copied(other))[1])
    first, again, others = ([g[n] for n, _ in step.named_parameters()] for g in gradients)
    assert all(map(torch.equal, first, again))
    assert not all(map(torch.equal, first, others))
    torch.manual_seed(3)
    with seeded(int(torch.randint(2**31, ()).item())):
        _, expected = eager_gradients(step, copied(other))
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[0][name], gradient, rtol=1e-9, atol=1e-11)


def test_what_a_step_draws_after_the_forward_is_not_what_the_forward_drew() -> None:
    class Noisy(Step):
        def training_step(self, batch: Any) -> Any:
            self.seen = super().training_step(batch) * torch.rand(())
            return self.seen

    step = Noisy(HasDropout())
    found = traced(step)
    torch.manual_seed(5)
    loss, _ = staged_gradients(found.cut(2), step, batch(*OTHER))
    torch.manual_seed(5)
    with seeded(int(torch.randint(2**31, ()).item())):
        expected, _ = eager_gradients(step, batch(*OTHER))
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)


def test_random_numbers_that_depend_on_values_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"draws random numbers in its forward \(aten.bernoulli.default\)"):
        traced(Step(SamplesByValue()))


@pytest.mark.parametrize(
    "potential",
    [
        *(MakesEdges, MasksEdges, FindsPairs, Repeats, ReducesByScatter, RotatesAll, LooksUpPairs, FillsGrid),
        *(CountsWithin, ReadsBothEnds, NetworkOfEachElement),
    ],
)
def test_lengths_that_depend_on_values(potential: type[Potential]) -> None:
    trains(Step(potential()))


def test_an_element_that_a_batch_lacks() -> None:
    """The trace takes the branch of an element that is there; a batch without it is one of a kind of its own."""
    found = traced(Step(NetworkOfEachElement()))
    lacking = batch(*OTHER)
    lacking["z"] = torch.where(lacking["z"] == 3, 1, lacking["z"])
    call, captured = found.call_on(lacking), found.cut(2)
    symbols = captured.bind_sizes(captured.inputs(found.potential)(call.args, call.kwargs))
    (kind,) = captured.unvalidated_kinds(found.potential, call.args, call.kwargs, symbols)
    assert kind.startswith("size 0 in dimension 0")
    validate_stages(captured, found.potential, call)


def test_messages_have_lengths_that_every_rank_knows() -> None:
    """Features of edges that the forward makes cross a boundary; a wrong length is told before training."""
    found = traced(Step(MakesEdges()))
    captured = found.cut(3)
    symbols = {s for spec in captured.stage(0, found.potential).boundary_out for s in spec.shape if isinstance(s, str)}
    position, _ = found.program.symbols[min(symbols, key=lambda s: s[0] != "u")]
    assert found.program.prepared and position == len(found.program.inputs) - 1
    call = found.call_on(batch(*OTHER))
    wrong = replace(captured, program=replace(found.program, symbols=found.program.symbols | {"u0": (0, 0)}))
    with pytest.raises(CaptureError, match="stage 0 of the potential 'potential' sends a tensor of shape"):
        run_staged(wrong, found.potential, call)


@pytest.mark.parametrize(
    "potential",
    [
        Potential,
        DrawsAngles,
        HasDropout,
        MakesEdges,
        FindsPairs,
        Repeats,
        ReducesByScatter,
        LooksUpPairs,
        FillsGrid,
        CountsWithin,
        MasksLast,
        ReadsBothEnds,
        NetworkOfEachElement,
        TwoEnergies,
    ],
)
def test_atoms_are_sharded(potential: type[Potential]) -> None:
    found = traced(Step(potential()))
    call = found.call_on(batch(*OTHER))
    captured = found.cut(2)
    tensors = captured.inputs(found.potential)(call.args, call.kwargs)
    shard_captured(captured).verify(found.potential, tensors, 2)


def test_loop_over_structures_that_an_adapter_removes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CaptureError, match="a loop over structures"):
        traced(Step(Experts()))
    monkeypatch.setitem(BUILT_IN, "graph_habits", "graph_habits:ExpertsAdapter")
    found = trains(Step(Experts()), stages=(2,))
    call = found.call_on(batch(*OTHER))
    captured = found.cut(2)
    tensors = captured.inputs(found.potential)(call.args, call.kwargs)
    shard_captured(captured).verify(found.potential, tensors, 2)


def test_copies_share_tensors_and_nothing_else() -> None:
    cell = Cell()
    batch = {"cell": cell, "keys": {"x"}, "pair": Graphs({"a": cell.tensor}, {}), "function": sample}
    other = copied(batch)
    other["cell"].names.add("b")
    other["keys"].add("y")
    other["pair"].edges["new"] = cell.tensor
    assert cell.names == {"a"} and batch["keys"] == {"x"} and batch["pair"].edges == {}
    assert other["cell"] is not cell and other["cell"].tensor is cell.tensor and other["function"] is sample
    assert [p for p, x in leaves(batch) if isinstance(x, torch.Tensor)] == ["['cell'].tensor", "['pair'].nodes['a']"]


def test_call_without_tensors() -> None:
    class Convert(Potential):
        def forward(self, b: Any) -> Any:
            return super().forward(collate([sample(n) for n in b.numbers]))

    with pytest.raises(CaptureError, match=r"is called without tensors: its arguments hold \{'args\[0\]': '.*Names'\}"):
        Traced(Step(Convert(), lambda b: collate([sample(n) for n in b.numbers])), Names([1, 2]))


class Names:
    """Holds no tensors."""

    def __init__(self, numbers: list[int]) -> None:
        self.numbers = numbers
