"""Autocast's casts as operations of the graph: a captured potential computes what the module does under autocast."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from capture_models import OTHER, TRACED, Batch, Layer, Potential, Step, Traced, make_batch
from torch import Tensor

from lightning_januspipe.capture.trace.program import Program
from lightning_januspipe.capture.validate.against_eager import ProbeResult, run_eager, run_staged, validate_stages
from lightning_januspipe.engine.autocast import OFF, Autocast, autocast_as
from lightning_januspipe.errors import CaptureError

BF16 = Autocast((("cpu", torch.bfloat16),))


@contextmanager
def bf16() -> Iterator[None]:
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        yield


class Single(Potential):
    """The small potential, with geometry in the type of its batch."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, device=distance.device)) ** 2))
        h = self.embedding(batch["species"])
        for layer in self.layers:
            h = layer(h, radial, batch["edges"])
        return h


class Mutating(Layer):
    """A composite operation that casts inside, and a sum in place, for which the graph has to be made functional."""

    def forward(self, h: Tensor, radial: Tensor, edges: Tensor) -> Tensor:
        messages = h[edges[0]] * self.filter(radial)
        out = messages.new_zeros(h.shape)
        out.index_add_(0, edges[1], messages)
        return torch.tanh(torch.einsum("ni,ij->nj", out, 2 * self.mix.weight))


class InPlace(Single):
    layer = Mutating


class OwnRegion(Single):
    """A part that the forward keeps in float32, as packages do with their geometry."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        with torch.autocast("cpu", enabled=False):
            return torch.tanh(h.float() @ self.layers[0].mix.weight)  # type: ignore[operator, union-attr]


class Apart(Single):
    """Energy and epilogue are kept in float32; only the derivative is taken under autocast."""

    def forward(self, batch: Batch) -> Any:
        positions = batch["positions"].detach().requires_grad_()
        strain = torch.zeros_like(batch["cell"]).requires_grad_()
        with torch.autocast("cpu", enabled=False):
            energy, extra = self.energy(batch, positions, strain)
        derivative, virial = self.differentiate(energy, [positions, strain])
        with torch.autocast("cpu", enabled=False):
            stress = virial @ batch["cell"]
        return {"energy": energy, "forces": -derivative, "stress": stress, **extra}


def in_float32(batch: Batch) -> Batch:
    return {k: v.float() if v.is_floating_point() else v for k, v in batch.items()}


def traced(kind: type[Potential]) -> Traced:
    return Traced(Step(kind(3)).float(), in_float32(make_batch(TRACED)))


def gradients(eager: ProbeResult, potential: Any) -> Tensor:
    found = [eager.gradients.get(p, torch.zeros_like(p)) for p in potential.parameters()]
    return torch.cat([g.reshape(-1).double() for g in found])


def cast_count(program: Program) -> int:
    return sum(n.target == "aten._to_copy.default" for n in program.nodes)


@pytest.mark.parametrize("kind", [Single, InPlace, OwnRegion])
def test_same_as_the_module_under_autocast(kind: type[Potential]) -> None:
    with bf16():
        made = traced(kind)
        call = made.call_on(in_float32(make_batch(OTHER)))
        captured = made.cut(2)
        validate_stages(captured, made.potential, call)
        eager = run_eager(made.potential, call, captured)
        found, _ = run_staged(captured, made.potential, call)
    exact_eager = run_eager(made.potential, call, captured)
    assert captured.program.autocast == BF16 and cast_count(captured.program) >= 6
    a, b, exact = (gradients(x, made.potential) for x in (eager, found, exact_eager))
    rounding = float((a - exact).norm() / exact.norm())
    assert 1e-4 < rounding < 0.1, "the module itself computes in bfloat16"
    assert float((b - a).norm() / exact.norm()) < 0.5 * rounding, "and the stages do as the module does"
    assert float((b - exact).norm() / exact.norm()) < 1.5 * rounding
    for x, y in zip(eager.outputs, found.outputs, strict=True):
        assert x.dtype == y.dtype


@pytest.mark.parametrize("kind", [InPlace, OwnRegion, Apart])
def test_stages_do_not_depend_on_the_autocast_around_them(kind: type[Potential]) -> None:
    with bf16():
        made = traced(kind)
        call = made.call_on(in_float32(make_batch(OTHER)))
        captured = made.cut(2)
        inside, _ = run_staged(captured, made.potential, call)
    outside, _ = run_staged(captured, made.potential, call)
    both = [(*e.outputs, *e.derivatives, gradients(e, made.potential)) for e in (inside, outside)]
    for a, b in zip(*both, strict=True):
        assert torch.equal(a, b)


def test_derivative_is_taken_under_the_autocast_of_the_forward() -> None:
    with bf16():
        made = traced(Apart)
        call = made.call_on(in_float32(make_batch(OTHER)))
        captured = made.cut(1)
        eager = run_eager(made.potential, call, captured)
        found, _ = run_staged(captured, made.potential, call)
    exact = run_eager(made.potential, call, captured)
    for a, b in zip(eager.outputs, found.outputs, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(eager.outputs[0], exact.outputs[0], rtol=1e-6, atol=1e-6)
    assert float((eager.outputs[1] - exact.outputs[1]).norm() / exact.outputs[1].norm()) > 1e-3


def test_types_of_boundaries_are_those_of_the_values() -> None:
    with bf16():
        made = traced(InPlace)
        captured = made.cut(3)
        tensors = captured.inputs(made.potential)(made.call.args, made.call.kwargs)
    boundary: list[Tensor] = []
    types = set()
    for index in range(3):
        stage = captured.stage(index, made.potential)
        boundary = stage(tensors, boundary).boundary
        assert [h.dtype for h in boundary] == [s.dtype for s in stage.boundary_out]
        types.update(h.dtype for h in boundary)
    assert torch.bfloat16 in types


def test_without_autocast_nothing_is_added() -> None:
    made = traced(InPlace)
    assert made.program.autocast == OFF
    specs = {n.spec.dtype for n in made.program.nodes if n.spec is not None}
    assert torch.bfloat16 not in specs


@pytest.mark.parametrize(
    ("target", "other", "words"),
    [
        ("aten.silu.default", "aten.tanh.default", "largest difference"),
    ],
)
def test_a_wrong_graph_is_seen_in_half_precision(target: str, other: str, words: str) -> None:
    with bf16():
        made = traced(Single)
        captured = copy.deepcopy(made.cut(2))
        node = next(n for n in captured.program.nodes if n.target == target)
        node.target = other
        with pytest.raises(CaptureError, match=words):
            validate_stages(captured, made.potential, made.call_on(in_float32(make_batch(OTHER))))


def test_casts_of_one_phase_do_not_reach_the_next() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):  # keeps casts of parameters
        assert Autocast.current() == BF16
        weight = torch.ones(2, 2, requires_grad=True)
        with autocast_as(OFF):
            assert (weight @ weight).dtype == torch.float32
            with autocast_as(BF16):
                product = weight @ weight
                assert product.dtype == torch.bfloat16
                casts = {id(f) for f, _ in product.grad_fn.next_functions}  # type: ignore[union-attr]
                assert len(casts) == 2, "each use is cast by itself"
        assert Autocast.current() == BF16
    assert Autocast.current() == OFF
