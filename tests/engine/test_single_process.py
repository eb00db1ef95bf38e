"""Whole chains in one process, deferred and split: parameter gradients are those of the plain double backward."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import tiny
import torch
from capture_models import Traced, eager_gradients, structures_of
from torch import Tensor, nn
from toy import (
    CHAINS,
    FLOAT,
    NUM_FEATURES,
    Scaled,
    ToyStage,
    assert_close,
    chain,
    double_backward,
    loss_gradients,
    microbatch,
)

from lightning_januspipe.capture.stages.captured import CapturedStage
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.single_process import run_single_process
from lightning_januspipe.engine.specs import ChainSpec, StageOutput, TensorSpec
from lightning_januspipe.runtime.user_step import CapturedStep


def subsets(num: int) -> list[tuple[int, ...]]:
    return [s for n in range(num + 1) for s in itertools.combinations(range(num), n)]


def assert_parity(functions: Sequence[ToyStage], spec: ChainSpec, **options: Any) -> None:
    tensors = microbatch(1).tensors
    expected = double_backward(functions, tensors)
    result = run_single_process(functions, spec, tensors, loss_gradients, **options)
    for found, wanted in zip(result.derivatives, expected.derivatives, strict=True):
        assert_close(found, wanted, "derivative", rtol=1e-12)
    for i, (parameter, wanted) in enumerate(expected.gradients.items()):
        assert wanted.abs().max() > 1e-4, "a gradient of zero proves nothing"
        assert_close(result.gradients.get(parameter), wanted, f"gradient {i}", rtol=1e-12)


@pytest.mark.parametrize("name", CHAINS)
@pytest.mark.parametrize("defer", [False, True])
def test_every_subset_of_split_stages(name: str, defer: bool) -> None:
    functions, spec = chain(CHAINS[name])
    for split_stages in subsets(len(functions)):
        assert_parity(functions, spec, defer=defer, split_stages=split_stages)


# -- stages that join parameters in unusual ways -----------------------------------------------------------------------


Weights = dict[str, nn.Parameter]
Body = Callable[[Weights, Tensor, Tensor, Tensor], Tensor]


class Joined(ToyStage):
    """A stage with a body of its own: (weights, edge vectors (E, 3), edges (2, E), h (N, F)) -> h (N, F).

    Args:
        index: position in the chain.
        last: whether no stage follows.
        body: what it does.
        dtype: of h between the stages.
    """

    def __init__(self, index: int, last: bool, body: Body, dtype: torch.dtype = FLOAT) -> None:
        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, dtype=FLOAT) * 0.5)

        self.index, self.last, self.body, self.dtype = index, last, body, dtype
        width = NUM_FEATURES
        self.weights = {"w": weight(width, width), "v": weight(width, width), "radial": weight(4, width)}
        self.weights |= {"b": weight(width), "phase": nn.Parameter(torch.randn(width, dtype=torch.complex128))}
        boundary = [TensorSpec(("n", width), dtype)]
        self.boundary_in, self.boundary_out = boundary if index else [], [] if last else boundary
        self.observables = [0] if last else []
        used = _used_by(self)
        self.parameters = [p for k, p in self.weights.items() if k in used]

    def forward(self, coordinates: list[Tensor], tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        positions, strain = coordinates
        _, species, edges, structure, _ = tensors
        strained = positions + (positions[:, None, :] * strain[structure]).sum(-1)
        vectors = strained[edges[0]] - strained[edges[1]]
        h = boundary[0] if self.index else torch.sin(species[:, None] + torch.arange(NUM_FEATURES, dtype=FLOAT))
        h = self.body(self.weights, vectors, edges, h.to(self.dtype))
        if not self.last:
            return StageOutput([h], [], [], coordinates)
        of_atoms = (h.abs().square() if h.is_complex() else torch.tanh(h)).sum(-1)
        energies = of_atoms.new_zeros(strain.shape[0]).index_add(0, structure, of_atoms)
        return StageOutput([], [energies.sum()], [energies], coordinates)


def _used_by(stage: Joined) -> set[str]:
    class Noting(dict[str, nn.Parameter]):
        def __getitem__(self, key: str) -> nn.Parameter:
            used.add(key)
            return super().__getitem__(key)

    used: set[str] = set()
    h = torch.ones(2, NUM_FEATURES, dtype=stage.dtype)
    stage.body(Noting(stage.weights), torch.ones(1, 3, dtype=FLOAT), torch.tensor([[0], [1]]), h)
    return used


def messages(vectors: Tensor, edges: Tensor, h: Tensor, filters: Tensor) -> Tensor:
    """Sum of weighted features over the neighbours."""
    decay = torch.exp(-0.5 * vectors.square().sum(-1, keepdim=True))
    return torch.zeros_like(h).index_add(0, edges[1], decay * filters * h[edges[0]])


def radial(weights: Weights, vectors: Tensor) -> Tensor:
    """A network of the distances: in BE it leads to parameters only."""
    basis = torch.exp(-(vectors.square().sum(-1, keepdim=True) / 2 - torch.arange(4, dtype=FLOAT)).square())
    return torch.tanh(basis @ weights["radial"]) @ weights["v"]


def tied(weights: Weights, vectors: Tensor, edges: Tensor, h: Tensor) -> Tensor:
    """One weight, twice."""
    h = h + messages(vectors, edges, torch.tanh(h @ weights["w"]), weights["b"])
    return torch.tanh((h * weights["b"]) @ weights["w"]) + (h @ weights["w"].T) * weights["b"].exp()


def shared_radial(weights: Weights, vectors: Tensor, edges: Tensor, h: Tensor) -> Tensor:
    """One radial network for several layers."""
    filters = radial(weights, vectors)
    for _ in range(3):
        h = h + messages(vectors, edges, torch.tanh(h @ weights["w"]), filters)
    return h * filters.sum(0)


def shared_constants(weights: Weights, vectors: Tensor, edges: Tensor, h: Tensor) -> Tensor:
    """A network of parameters alone, for several layers."""
    scales = torch.tanh(weights["b"] @ weights["v"])
    for _ in range(2):
        h = h + messages(vectors, edges, torch.tanh(h @ weights["w"] * scales), scales)
    return h * scales


def in_python(weights: Weights, vectors: Tensor, edges: Tensor, h: Tensor) -> Tensor:
    """Functions of autograd that are written in Python, with weights that are used twice."""
    scale = weights["b"] * weights["v"].sum(0)
    h = h + messages(vectors, edges, Scaled.apply(torch.tanh(h @ weights["w"]), scale), weights["b"])
    return Scaled.apply(torch.tanh(Scaled.apply(h, weights["b"])), scale)


def complex_waves(weights: Weights, vectors: Tensor, edges: Tensor, h: Tensor) -> Tensor:
    """Complex features, with real and complex weights."""
    h = h + messages(vectors, edges, h * weights["phase"], weights["b"])
    return torch.tanh(h.real) @ weights["w"] * torch.exp(1j * h.imag) * weights["phase"]


def part_of_a_weight(weights: Weights, vectors: Tensor, edges: Tensor, h: Tensor) -> Tensor:
    """Weights that are broadcast, and the real part of a complex one."""
    mixed = messages(vectors, edges, h @ weights["w"], weights["b"].expand(edges.shape[1], -1))
    return torch.tanh(mixed * weights["phase"].real) + h


BODIES: list[tuple[Body, torch.dtype]] = [
    (tied, FLOAT),
    (shared_radial, FLOAT),
    (shared_constants, FLOAT),
    (in_python, FLOAT),
    (complex_waves, torch.complex128),
    (part_of_a_weight, FLOAT),
]


@pytest.mark.parametrize(("body", "dtype"), BODIES, ids=[b.__name__ for b, _ in BODIES])
@pytest.mark.parametrize("num_stages", [1, 3])
def test_parameters_that_are_joined_more_than_once(body: Body, dtype: torch.dtype, num_stages: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        functions = [Joined(i, i == num_stages - 1, body, dtype) for i in range(num_stages)]
    spec = ChainSpec(chain(CHAINS["two stages"])[1].coordinates, (TensorSpec(("b",), FLOAT),), (num_stages - 1,))
    for split_stages in ((), (num_stages // 2,)):
        assert_parity(functions, spec, split_stages=split_stages)
        assert_parity(functions, spec, defer=True, split_stages=split_stages)


# -- times -------------------------------------------------------------------------------------------------------------


def test_times_of_all_phases() -> None:
    functions, spec = chain(CHAINS["three stages"])
    tensors = microbatch(1).tensors
    for second in run_single_process(functions, spec, tensors, loss_gradients).costs:
        assert min(second.fe, second.ff, second.bf, second.be) > 0 and second.wf == second.we == 0
    deferred = run_single_process(functions, spec, tensors, loss_gradients, defer=True, split_stages=(1,)).costs
    assert [(s.wf > 0, s.we > 0) for s in deferred] == [(True, True), (False, True), (True, True)]


# -- the reference potential -------------------------------------------------------------------------------------------


class _Step(nn.Module):
    """Reads energies, forces and stresses."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        self.potential = potential

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        out = self.potential(batch)
        terms = [(out[k] - batch[k]).square().mean() for k in ("energy", "forces", "stress")]
        return terms[0] + 10 * terms[1] + 100 * terms[2]


@pytest.fixture(scope="module")
def reference() -> Iterator[Traced]:
    from lightning_januspipe.models import EquivariantPotential

    dtype = torch.get_default_dtype()
    torch.set_default_dtype(FLOAT)
    torch.manual_seed(0)
    potential = EquivariantPotential(["Cu", "Ni", "Al"], 5.0, num_features=8, trainable_bessel=True)
    yield Traced(_Step(potential), structures_of(tiny.data(8), 3))
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("num_stages", [1, 2, 4])
@pytest.mark.parametrize("split_stages", [(), (0,)])
def test_reference_potential(reference: Traced, num_stages: int, split_stages: tuple[int, ...]) -> None:
    batch = structures_of(tiny.data(8), 4)
    captured = reference.cut(num_stages)
    stages = [CapturedStage(captured, i, reference.potential) for i in range(num_stages)]
    outside = GradientBuffers()
    runner = CapturedStep(captured, reference.module, outside.add)
    step = reference.module.training_step
    _, expected = eager_gradients(reference.module, batch)

    result = run_single_process(
        stages,
        captured.chain,
        runner.prepare(0, step, batch).tensors,
        lambda y, x: runner.loss(0, 1.0, y, x)[1],
        defer=True,
        split_stages=split_stages,
    )

    parameters = dict(reference.module.named_parameters())
    assert expected.keys() <= parameters.keys() and len(expected) > 20
    for name, wanted in expected.items():
        assert_close(result.gradients.get(parameters[name]), wanted, name, rtol=1e-9)


def test_toy_stage_is_a_stage_function() -> None:
    functions, spec = chain(CHAINS["observables in several stages"])
    assert isinstance(functions[0], ToyStage)
    assert spec.observable_stage == (0, 1, 2, 2)
    assert [f.observables for f in functions] == [[0], [1], [2, 3]]
