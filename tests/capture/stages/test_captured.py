"""Stages fit together; the epilogue gives the potential's own return value."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from capture_models import DTYPE, Batch, Potential, Step, Traced, assert_parity, make_batch
from torch import Tensor, nn

from lightning_januspipe.capture.cut.cut import Cut
from lightning_januspipe.capture.stages.captured import CapturedStage, Epilogue
from lightning_januspipe.errors import CaptureError


class Wide(Potential):
    """Returns features, which are large, its input, and things that are no tensors."""

    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers, width=12)

    def energy(self, batch: Batch, positions: Tensor, strain: Tensor) -> Any:
        vectors = positions[batch["edges"][1]] - positions[batch["edges"][0]]
        h = self.features(batch, vectors)
        energy = self.pool(self.readout(h)[:, 0] + 0 * strain[batch["index"]].sum((-1, -2)), batch)
        return energy, {"features": h, "species": batch["species"], "unit": "eV", "cutoff": 5.0}


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(Step(Potential(3)))


@pytest.fixture(scope="module")
def wide() -> Traced:
    return Traced(Step(Wide(2)))


def stages_of(traced: Traced, num_stages: int) -> list[CapturedStage]:
    captured = traced.cut(num_stages)
    return [CapturedStage(captured, i, traced.potential) for i in range(num_stages)]


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_boundaries_fit(traced: Traced, num_stages: int) -> None:
    stages = stages_of(traced, num_stages)
    assert [s.index for s in stages] == list(range(num_stages))
    assert list(stages[0].boundary_in) == list(stages[-1].boundary_out) == []
    for left, right in pairwise(stages):
        assert left.boundary_out == right.boundary_in
        assert len(left.boundary_out) > 0


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_forward_pass(traced: Traced, num_stages: int) -> None:
    """The stages, one after the other, give energies of the sizes that their specs say, and the eager values."""
    captured, batch = traced.cut(num_stages), make_batch((3, 1, 2))
    call = traced.call_on(batch)
    tensors = captured.call.bind(call.path, call.args, call.kwargs)
    symbols = captured.bind_sizes(tensors)
    boundary: list[Tensor] = []
    observables: dict[int, Tensor] = {}
    energies: list[Tensor] = []
    for stage in stages_of(traced, num_stages):
        out = stage(tensors, boundary)
        boundary = [h.detach() for h in out.boundary]
        assert [tuple(h.shape) for h in boundary] == [s.sizes(symbols) for s in stage.boundary_out]
        assert [h.dtype for h in boundary] == [s.dtype for s in stage.boundary_out]
        assert [tuple(x.shape) for x in out.coordinates] == [s.sizes(symbols) for s in captured.chain.coordinates]
        observables.update(zip(stage.observables, out.observables, strict=True))
        energies += out.energies
    expected = traced.potential(batch)
    assert len(energies) == 1
    torch.testing.assert_close(energies[0], expected["energy"].sum())
    assert sorted(observables) == list(range(len(captured.chain.observables)))
    for i, spec in enumerate(captured.chain.observables):
        assert tuple(observables[i].shape) == spec.sizes(symbols)
        assert i in stages_of(traced, num_stages)[captured.chain.observable_stage[i]].observables


@pytest.mark.parametrize("num_stages", [1, 2, 3])
def test_every_parameter_is_in_a_stage(traced: Traced, num_stages: int) -> None:
    captured, stages = traced.cut(num_stages), stages_of(traced, num_stages)
    placed = captured.parameter_stages()
    for name, parameter in traced.potential.named_parameters():
        holders = {s.index for s in stages if any(p is parameter for p in s.parameters)}
        assert holders == placed[name]
        assert len(holders) == 1 or name == "embedding.weight"  # cheap, so it may be looked up again
    assert 0 in placed["embedding.weight"]
    assert placed["readout.weight"] == {num_stages - 1}


def test_stage_graph_holds_only_its_share(traced: Traced) -> None:
    captured = traced.cut(3)
    tanh = [
        sum(
            n.target is torch.ops.aten.tanh.default
            for n in CapturedStage(captured, i, traced.potential).function.graph.nodes
        )
        for i in range(3)
    ]
    assert tanh == [1, 1, 1]


def test_frozen_parameters_are_not_trained() -> None:
    potential = Potential(1)
    potential.readout.bias.requires_grad_(False)
    stages = stages_of(Traced(Step(potential)), 1)
    assert len(stages[0].parameters) == len(list(potential.parameters())) - 1
    assert not any(p is potential.readout.bias for p in stages[0].parameters)


class WithCharges(Step):
    """The loss reads the charges."""

    def training_step(self, batch: Batch) -> Any:
        out = self.potential(batch)
        return (out["forces"] - batch["forces"]).square().mean() + out["charges"].square().mean()


class ChargesOfAllLayers(Potential):
    """Charges come from a running sum that leads to no energy; each layer has a share."""

    def energy(self, batch: Batch, positions: Tensor, strain: Tensor) -> Any:
        total = []

        def share(layer: nn.Module, given: Any, h: Tensor) -> None:
            total.append(self.charge(h)[:, 0] + (total[-1] if total else 0.0))

        hooks = [layer.register_forward_hook(share) for layer in self.layers]
        energy, _ = super().energy(batch, positions, strain)
        for hook in hooks:
            hook.remove()
        return energy, {"charges": total[-1]}


@pytest.mark.parametrize("step", [Step, WithCharges], ids=["charges are not read", "charges are read"])
@pytest.mark.parametrize("potential", [Potential, ChargesOfAllLayers])
def test_parameters_without_gradients_have_none_wherever_the_cut_is(
    potential: type[Potential], step: type[Step]
) -> None:
    """A gradient of zeros would be decayed by the optimizer."""
    traced = Traced(step(potential(2)))
    program, body, batch = traced.program, traced.regions.body, make_batch((3, 1, 2))
    seen = 0
    for end in range(1, len(body)):
        later = {i for n in body[end:] for i in program.by_name[n].inputs()}
        sent = [n for n in body[:end] if n in later]
        if all(program.by_name[n].spec is not None for n in sent):
            cut = Cut([body[:end], body[end:]], [[], []], [sent])
            captured = replace(traced.cut(1), cut=cut)
            assert_parity(captured, traced.module, batch)
            seen += any(not r.energy for r in captured.chain.dependence[0])
    assert seen, "no place was between a charge and what it is made of"


def epilogue_result(traced: Traced, batch: Batch) -> tuple[Any, Any]:
    """What the epilogue makes of the eager observables and derivatives, and the eager result."""
    captured = traced.cut(1)
    call = traced.call_on(batch)
    tensors = captured.call.bind(call.path, call.args, call.kwargs)
    out = CapturedStage(captured, 0, traced.potential)(tensors, [])
    derivatives = torch.autograd.grad(out.energies, out.coordinates)
    found = Epilogue(captured, traced.potential)(tensors, out.observables, derivatives)
    return found, traced.potential(batch)


def test_epilogue_gives_the_return_value(wide: Traced) -> None:
    batch = make_batch((2, 3))
    found, expected = epilogue_result(wide, batch)
    assert list(found) == list(expected)
    for name in ("energy", "forces", "stress"):
        torch.testing.assert_close(found[name], expected[name])
    assert found["species"] is batch["species"]
    assert (found["unit"], found["cutoff"]) == ("eV", 5.0)


def test_large_outputs_that_nobody_read(wide: Traced) -> None:
    found, _ = epilogue_result(wide, make_batch((2, 3)))
    for read in (lambda x: x.shape, lambda x: torch.sum(x), lambda x: torch.stack([torch.zeros(1), x])):
        with pytest.raises(CaptureError, match="output 3 of the potential is read now, but was not read by the step"):
            read(found["features"])


def test_large_outputs_that_are_read() -> None:
    class Reads(Step):
        def training_step(self, batch: Batch) -> Any:
            out = self.potential(batch)
            return out["features"].square().mean() + out["forces"].square().mean()

    found, expected = epilogue_result(Traced(Reads(Wide(1))), make_batch((2, 3)))
    torch.testing.assert_close(found["features"], expected["features"])


def test_buffers_are_read_live() -> None:
    class Shifted(Potential):
        def __init__(self) -> None:
            super().__init__(1)
            self.register_buffer("shift", torch.ones((), dtype=DTYPE))

        def pool(self, values: Tensor, batch: Batch) -> Tensor:
            return super().pool(values + self.shift, batch)

    potential = Shifted()
    traced = Traced(Step(potential))
    potential.shift.fill_(5.0)
    found, expected = epilogue_result(traced, make_batch((2, 3)))
    torch.testing.assert_close(found["energy"], expected["energy"])
    nn.Module.register_buffer(potential, "shift", torch.zeros((), dtype=DTYPE))
    found, expected = epilogue_result(traced, make_batch((2, 3)))
    torch.testing.assert_close(found["energy"], expected["energy"])
