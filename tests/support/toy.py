"""A chain of hand-written message-passing stages, its plain double backward, and batches for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.engine.specs import ChainSpec, LossGradients, MicrobatchInput, StageOutput, TensorSpec

FLOAT = torch.float64
NUM_FEATURES = 5
NUM_SPECIES = 3


@dataclass(frozen=True)
class Layout:
    """What one stage of a chain does.

    Attributes:
        geometry: whether messages depend on the coordinates.
        energy: whether the stage adds to the energies.
        charges: whether the stage has an observable of its own.
        trainable: whether its weights are trained.
        vectors: whether edge vectors are received and passed on instead of computed from the coordinates.
        species: whether species are received and passed on, as integers.
        shared: whether its weights are those of the first stage.
    """

    geometry: bool = True
    energy: bool = False
    charges: bool = False
    trainable: bool = True
    vectors: bool = False
    species: bool = False
    shared: bool = False


LAST = Layout(energy=True)

CHAINS: dict[str, list[Layout]] = {
    "two stages": [Layout(), LAST],
    "three stages": [Layout(), Layout(), LAST],
    "four stages": [Layout(), Layout(), Layout(), LAST],
    "energies in several stages": [Layout(energy=True), Layout(), LAST],
    "observables in several stages": [Layout(charges=True), Layout(charges=True), Layout(energy=True, charges=True)],
    "no coordinates in the first": [Layout(geometry=False), Layout(), LAST],
    "no coordinates in the middle": [Layout(), Layout(geometry=False), LAST],
    "no coordinates in the last": [Layout(), Layout(), Layout(geometry=False, energy=True)],
    "frozen first": [Layout(trainable=False), Layout(), LAST],
    "frozen middle": [Layout(), Layout(trainable=False), LAST],
    "frozen last": [Layout(), Layout(energy=True, trainable=False)],
    "boundary without a gradient": [Layout(geometry=False, trainable=False), Layout(), LAST],
    "integers in the boundary": [Layout(species=True), Layout(species=True), Layout(species=True, energy=True)],
    "values passed on": [Layout(vectors=True), Layout(vectors=True), Layout(vectors=True, energy=True)],
    "shared weights": [Layout(), Layout(), Layout(energy=True, shared=True)],
}


class ToyStage:
    """A :class:`~lightning_januspipe.engine.specs.StageFunction`: one message-passing layer, energies where asked.

    Args:
        index: position in the chain.
        layout: what the stage does.
        last: whether no stage follows.
        first_observable: position of its first observable.
        shared: weights to use instead of own ones.
    """

    def __init__(
        self,
        index: int,
        layout: Layout,
        last: bool,
        first_observable: int,
        shared: dict[str, nn.Parameter] | None = None,
    ) -> None:
        self.index, self.layout = index, layout

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, dtype=FLOAT) * 0.5, requires_grad=layout.trainable)

        self.weights = {"message": weight(NUM_FEATURES, NUM_FEATURES), "update": weight(NUM_FEATURES, NUM_FEATURES)}
        if index == 0 or layout.species:
            self.weights["embedding"] = weight(NUM_SPECIES, NUM_FEATURES)
        if layout.energy:
            self.weights["energy"] = weight(NUM_FEATURES)
        if layout.charges:
            self.weights["charges"] = weight(NUM_FEATURES)
        if layout.shared:
            assert shared is not None
            self.weights.update({k: shared[k] for k in ("message", "update")})
        self.parameters = [p for p in self.weights.values() if p.requires_grad]
        boundary = [TensorSpec(("n", NUM_FEATURES), FLOAT)]
        if layout.vectors:
            boundary.append(TensorSpec(("e", 3), FLOAT))
        if layout.species:
            boundary.append(TensorSpec(("n",), torch.int64))
        self.boundary_in = boundary if index else []
        self.boundary_out = [] if last else boundary
        self.observable_specs = [TensorSpec(("b",), FLOAT)] * layout.energy + [
            TensorSpec(("n",), FLOAT)
        ] * layout.charges
        self.observables = list(range(first_observable, first_observable + len(self.observable_specs)))

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Runs as the engine calls it: with coordinates of its own."""
        return self.forward(
            [tensors[0].detach().requires_grad_(), tensors[4].detach().requires_grad_()], tensors, boundary
        )

    def forward(self, coordinates: list[Tensor], tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Returns the stage for given coordinates: positions (N, 3) and strain (B, 3, 3)."""
        layout, weights = self.layout, self.weights
        positions, strain = coordinates
        _, species, (source, target), structure, _ = tensors
        passed = list(boundary[1:])
        h = boundary[0] if self.index else weights["embedding"][species]
        if layout.species and self.index:
            h = h * torch.cos(weights["embedding"][boundary[-1]])
        elif layout.species:
            passed.append(species)
        # The square makes the derivative read h itself, not only what is computed from it.
        message = (h + 0.1 * h.square()) @ weights["message"]
        if layout.geometry:
            if layout.vectors and self.index:
                vectors = passed[0]
            else:
                strained = positions + (positions[:, None, :] * strain[structure]).sum(-1)
                vectors = strained[source] - strained[target]
                passed = [vectors, *passed] if layout.vectors else passed
            decay = torch.exp(-0.5 * vectors.square().sum(-1))
            message = torch.zeros_like(h).index_add(0, target, decay[:, None] * message[source])
        h = h + torch.tanh(message) @ weights["update"]
        energies, observables = [], []
        if layout.energy:
            of_atoms = torch.tanh(h * weights["energy"]).sum(-1)
            observables.append(h.new_zeros(strain.shape[0]).index_add(0, structure, of_atoms))
            energies.append(of_atoms.sum())
        if layout.charges:
            observables.append((h * weights["charges"]).sum(-1))
        return StageOutput([h, *passed] if self.boundary_out else [], energies, observables, coordinates)


def chain(layouts: Sequence[Layout], seed: int = 0) -> tuple[list[ToyStage], ChainSpec]:
    """Returns the stages, with the same weights on every rank, and what they share."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stages: list[ToyStage] = []
        for index, layout in enumerate(layouts):
            num = sum(len(s.observables) for s in stages)
            stages.append(
                ToyStage(index, layout, index == len(layouts) - 1, num, stages[0].weights if stages else None)
            )
    return stages, ChainSpec(
        coordinates=(TensorSpec(("n", 3), FLOAT), TensorSpec(("b", 3, 3), FLOAT)),
        observables=tuple(spec for s in stages for spec in s.observable_specs),
        observable_stage=tuple(s.index for s in stages for _ in s.observables),
    )


def microbatch(seed: int, num_atoms: int = 7, num_structures: int = 2) -> MicrobatchInput:
    """Returns structures on random positions, with the edges of a ring and a few more."""
    generator = torch.Generator().manual_seed(seed)
    positions = torch.rand(num_atoms, 3, generator=generator, dtype=FLOAT) * 2
    species = torch.randint(NUM_SPECIES, (num_atoms,), generator=generator)
    ring = torch.arange(num_atoms)
    more = torch.randint(num_atoms, (2, num_atoms), generator=generator)
    edges = torch.cat([torch.stack([ring, ring.roll(1)]), more], 1)
    structure = torch.arange(num_atoms) * num_structures // num_atoms
    tensors = [positions, species, edges, structure, torch.zeros(num_structures, 3, 3, dtype=FLOAT)]
    return MicrobatchInput(tensors, {"n": num_atoms, "e": edges.shape[1], "b": num_structures})


def loss_value(observables: Sequence[Tensor], derivatives: Sequence[Tensor]) -> Tensor:
    """Returns a loss without linear or constant terms in what it reads."""
    terms = [(y - 0.3).square().sum() * (1 + i) for i, y in enumerate(observables)]
    return sum(
        [*terms, *((d - 0.1).square().sum() * (2 + i) for i, d in enumerate(derivatives))], torch.zeros((), dtype=FLOAT)
    )


def loss_gradients(observables: Sequence[Tensor], derivatives: Sequence[Tensor]) -> LossGradients:
    """Returns the gradients of :func:`loss_value` that the phases need."""
    y = [v.detach().requires_grad_() for v in observables]
    x = [v.detach().requires_grad_() for v in derivatives]
    found = torch.autograd.grad(loss_value(y, x), [*y, *x])
    return LossGradients(list(found[: len(y)]), list(found[len(y) :]))


@dataclass
class DoubleBackward:
    """The result of one plain double backward."""

    observables: list[Tensor]
    derivatives: list[Tensor]
    gradients: dict[nn.Parameter, Tensor]


def double_backward(stages: Sequence[ToyStage], tensors: Sequence[Tensor]) -> DoubleBackward:
    """Energies, their derivatives and the loss's parameter gradients, by plain autograd over the whole chain."""
    coordinates = [tensors[0].detach().requires_grad_(), tensors[4].detach().requires_grad_()]
    boundary: list[Tensor] = []
    energies, observables = [], []
    for stage in stages:
        out = stage.forward(coordinates, tensors, boundary)
        boundary = out.boundary
        energies += out.energies
        observables += out.observables
    derivatives = torch.autograd.grad(torch.stack(energies).sum(), coordinates, create_graph=True)
    parameters = list(dict.fromkeys(p for s in stages for p in s.parameters))
    found = torch.autograd.grad(loss_value(observables, derivatives), parameters)
    return DoubleBackward(
        [y.detach() for y in observables], [d.detach() for d in derivatives], dict(zip(parameters, found, strict=True))
    )


def assert_close(found: Tensor | None, expected: Tensor, what: str, rtol: float = 1e-11) -> None:
    """Equal up to rounding, relative to the largest entry."""
    assert found is not None, f"{what} is missing"
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    if expected.numel():
        error, scale = float((found - expected).abs().max()), float(expected.abs().max())
        assert error <= rtol * max(scale, 1e-3), f"{what} differs by {error:.1e} at a scale of {scale:.1e}"


class Scaled(torch.autograd.Function):
    """A function written in Python that has a parameter; counts its backward passes."""

    num_backward = 0

    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return h * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        Scaled.num_backward += 1
        h, weight = ctx.saved_tensors
        return gradients[0] * weight, (gradients[0] * h).sum(0)
