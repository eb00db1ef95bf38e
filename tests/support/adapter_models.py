"""A potential that takes a list of graphs and returns lists with an entry for each; and adapters, right and wrong.

This file stands for a package of its own, under the name ``adapter_models``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from capture_models import Batch, Potential, Step, make_batch
from torch import Tensor, nn

from lightning_januspipe.capture.adapters import Adapter


def make_graphs(sizes: Sequence[int]) -> list[Batch]:
    """Returns a graph for each structure."""
    return [make_batch([size], seed) for seed, size in enumerate(sizes)]


def batched(graphs: list[Batch]) -> tuple[Batch, list[int]]:
    """Returns graphs as one, by loops and lists, and the numbers of atoms."""
    sizes = [len(g["positions"].tolist()) for g in graphs]
    first = [sum(sizes[:i]) for i in range(len(sizes))]
    batch = {n: torch.cat([g[n] for g in graphs]) for n in ("positions", "species", "cell")}
    batch["edges"] = torch.cat([g["edges"] + k for g, k in zip(graphs, first, strict=True)], dim=1)
    batch["index"] = torch.tensor([i for i, size in enumerate(sizes) for _ in range(size)])
    return batch, sizes


def of_each(values: Tensor, sizes: list[int]) -> list[Tensor]:
    """Returns values of atoms, structure by structure."""
    return list(values.split(sizes))


class GraphsPotential(Potential):
    """Energies of all structures, forces and charges of each."""

    def forward(self, graphs: list[Batch]) -> Any:
        batch, sizes = batched(graphs)
        positions = batch["positions"].detach().requires_grad_()
        energy, extra = self.energy(batch, positions, torch.zeros_like(batch["cell"]))
        (derivative,) = self.differentiate(energy, [positions])
        charges = extra["charges"][:, None] * torch.ones(1, 12)
        return {"charges": of_each(charges, sizes), "energy": energy, "forces": of_each(-derivative, sizes)}


class GraphsStep(Step):
    """Reads energies and forces."""

    def training_step(self, batch: list[Batch]) -> Any:
        out = self.potential(batch)
        assert isinstance(out["forces"], list) and len(out["forces"]) == len(batch)
        errors = [((f - g["forces"]) ** 2).sum() for f, g in zip(out["forces"], batch, strict=True)]
        return ((out["energy"] - torch.cat([g["energy"] for g in batch])) ** 2).mean() + torch.stack(errors).mean()


class GraphsAdapter(Adapter):
    """For :class:`GraphsPotential`."""

    def arguments(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (batched(args[0])[0],), kwargs

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        return _tracing()

    def joined(self, potential: nn.Module, returned: Any) -> Any:
        return {k: torch.cat(v) if isinstance(v, list) else v for k, v in returned.items()}

    def separated(self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        sizes = batched(args[0])[1]
        lists = {k: of_each(returned[k], sizes) for k in ("charges", "forces") if isinstance(returned[k], Tensor)}
        return {**returned, **lists}


@contextmanager
def _tracing() -> Iterator[None]:
    names = globals()
    before = {name: names[name] for name in ("batched", "of_each")}
    names.update(batched=lambda batch: (batch, []), of_each=lambda values, sizes: [values])
    try:
        yield
    finally:
        names.update(before)


class Reversing(GraphsAdapter):
    """Gives the forces to the wrong structures."""

    def separated(self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        found = super().separated(potential, args, kwargs, returned)
        return {**found, "forces": found["forces"][::-1]}


class Unfinished(Adapter):
    """Cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("needs a licence")


class NoAdapter:
    """None at all."""
