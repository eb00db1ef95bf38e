"""Small hand-written potentials and steps for the tests of capture, and the plain double backward as reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import grad

from lightning_januspipe.capture.adapters import adapted, adapters_of
from lightning_januspipe.capture.cut.cut import Cut, find_cut, find_regions
from lightning_januspipe.capture.cut.profile import measure
from lightning_januspipe.capture.find.call_format import CallFormat
from lightning_januspipe.capture.find.find_potential import find_potential
from lightning_januspipe.capture.find.grad_call import PotentialCall, call_arguments
from lightning_januspipe.capture.find.in_step import potential_of
from lightning_januspipe.capture.passes import apply_passes
from lightning_januspipe.capture.stages.captured import CallInputs, CapturedPotential
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.trace.trace import trace_potential
from lightning_januspipe.capture.trees import copied
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.single_process import run_single_process
from lightning_januspipe.runtime.user_step import CapturedStep

Batch = dict[str, Tensor]
DTYPE = torch.float64
TRACED = (4, 3, 5)
OTHER = (3, 4)


def make_batch(sizes: Sequence[int], seed: int = 0) -> Batch:
    """Returns structures of the given numbers of atoms with an edge for each pair; one atom alone has no edges."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    pairs = index[:, None] == index[None, :]
    pairs.fill_diagonal_(False)
    num_atoms, num_structures = sum(sizes), len(sizes)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=DTYPE)

    return {
        "positions": 2.0 * normal(num_atoms, 3),
        "species": torch.randint(0, 3, (num_atoms,), generator=generator),
        "edges": pairs.nonzero().T.contiguous(),
        "index": index,
        "cell": (torch.eye(3, dtype=DTYPE) * 9.0 + 0.3 * normal(num_structures, 3, 3)),
        "energy": normal(num_structures),
        "forces": normal(num_atoms, 3),
        "stress": 0.1 * normal(num_structures, 3, 3),
    }


class Layer(nn.Module):
    """One message-passing layer; the filter network may belong to someone else."""

    def __init__(self, width: int, filter_network: nn.Module | None = None) -> None:
        super().__init__()
        self.filter = filter_network or filter_of(width)
        self.mix = nn.Linear(width, width, dtype=DTYPE)

    def forward(self, h: Tensor, radial: Tensor, edges: Tensor) -> Tensor:
        messages = h[edges[0]] * self.filter(radial)
        return h + torch.tanh(self.mix(self.aggregate(h, edges[1], messages)))

    def aggregate(self, h: Tensor, target: Tensor, messages: Tensor) -> Tensor:
        """Sums the messages that reach each atom."""
        return torch.zeros_like(h).index_add(0, target, messages)


def filter_of(width: int) -> nn.Module:
    """Returns a network from four radial functions to a weight for each channel."""
    return nn.Sequential(nn.Linear(4, width, dtype=DTYPE), nn.SiLU(), nn.Linear(width, width, dtype=DTYPE))


class Potential(nn.Module):
    """A conservative potential with energy, forces, stress and charges; its parts are there to be overridden."""

    layer: type[Layer] = Layer

    def __init__(self, num_layers: int = 3, width: int = 6, share_filter: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(3, width, dtype=DTYPE)
        shared = filter_of(width) if share_filter else None
        self.layers = nn.ModuleList(self.layer(width, shared) for _ in range(num_layers))
        self.readout = nn.Linear(width, 1, dtype=DTYPE)
        self.charge = nn.Linear(width, 1, dtype=DTYPE)

    def forward(self, batch: Batch) -> Any:
        positions = batch["positions"].detach().requires_grad_()
        strain = torch.zeros_like(batch["cell"]).requires_grad_()
        energy, extra = self.energy(batch, positions, strain)
        derivative, virial = self.differentiate(energy, [positions, strain])
        volume = torch.linalg.det(batch["cell"]).abs()
        return {"energy": energy, "forces": -derivative, "stress": virial / volume[:, None, None], **extra}

    def differentiate(self, energy: Tensor, inputs: list[Tensor]) -> Sequence[Tensor]:
        """Makes the one call of ``torch.autograd.grad``."""
        return grad([energy.sum()], inputs, create_graph=self.training)

    def energy(self, batch: Batch, positions: Tensor, strain: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns energies (B,), and charges (N,)."""
        deformation = strain[batch["index"]]
        strained = positions + torch.einsum("ni,nij->nj", positions, 0.5 * (deformation + deformation.mT))
        vectors = strained[batch["edges"][1]] - strained[batch["edges"][0]]
        h = self.features(batch, vectors)
        return self.pool(self.readout(h)[:, 0], batch), {"charges": self.charge(h)[:, 0]}

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        """Returns features (N, width) after all layers."""
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE, device=distance.device)) ** 2))
        h = self.embedding(batch["species"])
        for layer in self.layers:
            h = layer(h, radial, batch["edges"])
        return h

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        """Sums values over the atoms of each structure."""
        return values.new_zeros(batch["cell"].shape[0]).index_add(0, batch["index"], values)


class Step(nn.Module):
    """Stands for a LightningModule: capture needs a module with a step."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        self.potential = potential

    def log(self, name: str, value: Any) -> None:
        """Overridden where it matters."""

    def training_step(self, batch: Batch) -> Any:
        return self.loss(self.potential(batch), batch)

    def loss(self, out: dict[str, Tensor], batch: Batch) -> Tensor:
        loss = ((out["energy"] - batch["energy"]) ** 2).mean() + ((out["forces"] - batch["forces"]) ** 2).mean()
        return loss + 10 * ((out["stress"] - batch["stress"]) ** 2).mean()


class Traced:
    """A module and its traced potential, to be cut into any number of stages.

    Every operation costs the same, so that cuts do not depend on the load of the machine.
    """

    def __init__(self, module: nn.Module, batch: Any = None, other: Any = None) -> None:
        batch = make_batch(TRACED) if batch is None else batch
        self.module = module
        self.call = find_potential(module, module.training_step, batch)
        self.potential = potential_of(module, module.training_step, self.call)
        adapters = adapters_of(self.potential)
        args, kwargs = adapted(adapters, self.potential, self.call.args, self.call.kwargs)
        second = None
        if other is not None:
            of_other = self.call_on(other)
            second = adapted(adapters, self.potential, of_other.args, of_other.kwargs)
        self.format = CallFormat.of(args, kwargs, second)
        traced = replace(self.call, args=args, kwargs=kwargs)
        self.program = apply_passes(trace_potential(self.potential, traced, self.format, adapters))
        self.regions = find_regions(self.program, self.call.read_outputs)
        uncut = CapturedPotential(
            self.call.path,
            self.program,
            self.regions,
            Cut([], [], []),
            self.format,
            self.call.replaced,
            self.call.step_parameters,
        )
        self._uncut = uncut
        tensors = CallInputs(uncut, self.potential)(self.call.args, self.call.kwargs)
        measured = measure(self.program, self.regions, self.potential, tensors, repeats=1)
        self.profile = replace(measured, seconds=dict.fromkeys(measured.seconds, 1e-6))

    def cut(self, num_stages: int) -> CapturedPotential:
        """Returns the potential in stages."""
        cut = find_cut(self.program, self.regions, self.profile, num_stages)
        return replace(self._uncut, cut=cut)

    def call_on(self, batch: Batch) -> PotentialCall:
        """Returns the call of the potential that the step makes on a batch."""
        in_step = self.call.replaced is not None
        args, kwargs = call_arguments(self.module, self.call.path, self.module.training_step, batch, in_step)
        return replace(self.call, args=args, kwargs=kwargs)


def eager_gradients(module: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns the loss and the parameter gradients of the plain double backward."""
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    loss = loss_in(module.training_step(copied(batch)))
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return loss.detach(), {n: g for n, g in zip(parameters, found, strict=True) if g is not None}


def staged_gradients(
    captured: StagedPotential,
    module: nn.Module,
    batch: Batch,
    step: Callable[[Batch], Any] | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns them through the four phases of all stages and the user's step around them.

    Args:
        captured: The potential in stages.
        module: The module that it is a part of.
        batch: One micro-batch.
        step: The module's step, if not its training step.
        options: Options of ``run_single_process``.
    """
    outside = GradientBuffers()
    runner = CapturedStep(captured, module, outside.add)
    step = step or module.training_step
    potential = module.get_submodule(captured.path)
    stages = [captured.stage(i, potential) for i in range(captured.num_stages)]
    losses = []

    def loss(y: list[Tensor], x: list[Tensor]) -> Any:
        output, seeds = runner.loss(0, 1.0, y, x)
        losses.append(loss_in(output).detach())
        return seeds

    result = run_single_process(stages, captured.chain, runner.prepare(0, step, batch).tensors, loss, **options)
    gradients: dict[str, Tensor] = {}
    for name, parameter in module.named_parameters():
        parts = [g for g in (result.gradients.get(parameter), outside.get(parameter)) if g is not None]
        if parts:
            gradients[name] = torch.stack(parts).sum(0)
    return losses[0], gradients


def loss_in(output: Any) -> Tensor:
    """Returns the loss in what a step returned."""
    return output["loss"] if isinstance(output, dict) else output


def assert_parity(
    captured: StagedPotential, module: nn.Module, batch: Batch, tolerance: float = 1e-10, **options: Any
) -> None:
    """Loss and every parameter gradient equal those of the plain double backward; none where that has none."""
    expected_loss, expected = eager_gradients(module, batch)
    loss, found = staged_gradients(captured, module, batch, **options)
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    assert set(found) == set(expected)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert scale > 1e-3
    for name, parameter in module.named_parameters():
        a, b = (g.get(name, torch.zeros_like(parameter)) for g in (expected, found))
        assert float((a - b).abs().max()) <= tolerance * scale, name


def structures_of(data: Any, count: int) -> Batch:
    """Returns the first structures of a data module, collated by it."""
    data.setup("fit")
    loader = data.train_dataloader()
    return loader.collate_fn([loader.dataset[i] for i in range(count)])
