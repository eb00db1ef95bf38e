"""A potential that cannot be traced and divides itself, and ways to get that wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from capture_models import DTYPE, Batch, filter_of
from torch import Tensor, nn

from lightning_januspipe import run_stages, with_halo

Features = dict[str, Tensor]


def radial_of(inputs: Features) -> Tensor:
    """Returns radial functions (E, 4) of strained distances."""
    strain = inputs["strain"][inputs["index"]]
    strained = inputs["positions"] + torch.einsum("ni,nij->nj", inputs["positions"], 0.5 * (strain + strain.mT))
    strained = with_halo(strained, inputs)
    vectors = strained[inputs["edges"][1]] - strained[inputs["edges"][0]]
    distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
    return torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))


class Embed(nn.Module):
    """Species to features; a Python loop over values, which no trace follows."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table

    def forward(self, inputs: Features, features: Features) -> Features:
        rows = [self.table.weight[int(s)] for s in inputs["species"].tolist()]
        return {"h": torch.stack([*rows, self.table.weight[0]])[:-1]}  # also without any atoms


class Interact(nn.Module):
    """One message-passing layer with the potential's one filter network."""

    def __init__(self, filters: nn.Module, width: int) -> None:
        super().__init__()
        self.filters = filters
        self.mix = nn.Linear(width, width, dtype=DTYPE)

    def forward(self, inputs: Features, features: Features) -> Features:
        h = features["h"]
        messages = with_halo(h, inputs)[inputs["edges"][0]] * self.filters(radial_of(inputs))
        return {"h": h + torch.tanh(self.mix(torch.zeros_like(h).index_add(0, inputs["edges"][1], messages)))}


class Read(nn.Module):
    """Energies (B,), charges (N,)."""

    def __init__(self, table: nn.Embedding, width: int) -> None:
        super().__init__()
        self.table = table  # tied: the embedding is read by the first part and by the last
        self.energy, self.charge = nn.Linear(width, 1, dtype=DTYPE), nn.Linear(width, 1, dtype=DTYPE)

    def forward(self, inputs: Features, features: Features) -> Features:
        h = features["h"] + self.table(inputs["species"])
        energy = h.new_zeros(inputs["strain"].shape[0]).index_add(0, inputs["index"], self.energy(h)[:, 0])
        return {"energy": energy, "charges": self.charge(h)[:, 0]}


class SelfDividing(nn.Module):
    """A potential with stages of its own."""

    stage_coordinates: Sequence[str] = ("positions", "strain")
    stage_edges = (("edges", 0), ("edges", 1))

    def __init__(self, num_layers: int = 3, width: int = 6) -> None:
        super().__init__()
        torch.manual_seed(3)
        table, filters = nn.Embedding(3, width, dtype=DTYPE), filter_of(width)
        layers = [Interact(filters, width) for _ in range(num_layers)]
        self.parts = nn.ModuleList([Embed(table), *layers, Read(table, width)])

    def stage_inputs(self, batch: Batch) -> Features:
        names = ("positions", "species", "edges", "index", "cell")
        return {**{n: batch[n] for n in names}, "strain": torch.zeros_like(batch["cell"])}

    def stage_parts(self) -> Sequence[nn.Module]:
        return list(self.parts)

    def stage_outputs(self, inputs: Features, results: Features, gradients: Features) -> Any:
        volume = torch.linalg.det(inputs["cell"]).abs()
        stress = gradients["strain"] / volume[:, None, None]
        return {**results, "forces": -gradients["positions"], "stress": stress}

    def forward(self, batch: Batch) -> Any:
        return run_stages(self, batch)


class _LookUp(Embed):
    """Looks species up as a trace can follow."""

    def forward(self, inputs: Features, features: Features) -> Features:
        return {"h": self.table(inputs["species"])}


class LooksUp(SelfDividing):
    """A potential with stages of its own, all of which can be traced."""

    def __init__(self) -> None:
        super().__init__(num_layers=4)
        self.parts[0] = _LookUp(self.parts[0].table)
        self.parts[0].unread = nn.Linear(2, 2)  # gets no gradient


class _Branching(Interact):
    """Does something else where there are no edges."""

    def forward(self, inputs: Features, features: Features) -> Features:
        h = super().forward(inputs, features)["h"]
        return {"h": h if inputs["edges"].shape[1] else 0.5 * h}


class Branching(LooksUp):
    """Has a trace that is wrong for a micro-batch without edges."""

    def __init__(self) -> None:
        super().__init__()
        self.parts[1] = _Branching(self.parts[2].filters, 6)


class _Alone(Interact):
    """Reads the features of other ranks' atoms without asking for them."""

    def forward(self, inputs: Features, features: Features) -> Features:
        return super().forward(dict(inputs, positions=inputs["positions"]), features)


class _Shifted(Read):
    """Shifts the energy of each structure, which each graph rank would do."""

    def __init__(self, table: nn.Embedding, width: int) -> None:
        super().__init__(table, width)
        self.shift = nn.Parameter(torch.tensor(0.3, dtype=DTYPE))

    def forward(self, inputs: Features, features: Features) -> Features:
        found = super().forward(inputs, features)
        return {**found, "energy": found["energy"] + self.shift}


class _Squared(Read):
    """Squares the energies of structures before they are complete."""

    def forward(self, inputs: Features, features: Features) -> Features:
        found = super().forward(inputs, features)
        return {**found, "energy": found["energy"].square()}


class Squared(SelfDividing):
    """Has an energy that is no sum over atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.parts[-1] = _Squared(self.parts[0].table, 6)


class _Counts(Read):
    """Takes the number of structures from the index of atoms."""

    def forward(self, inputs: Features, features: Features) -> Features:
        num = int(inputs["index"].max()) + 1 if len(inputs["index"]) else 0
        return super().forward({**inputs, "strain": inputs["strain"][:num]}, features)


class CountsStructures(SelfDividing):
    """Has fewer energies where the last structure has no atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.parts[-1] = _Counts(self.parts[0].table, 6)


class Alone(SelfDividing):
    """Lacks an exchange."""

    def __init__(self) -> None:
        super().__init__()
        self.parts[1] = _Alone(self.parts[2].filters, 6)


class Shifted(SelfDividing):
    """Has a term of the energy that is no sum over atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.parts[-1] = _Shifted(self.parts[0].table, 6)
