"""So3krates for torch in an ordinary LightningModule; batches are dicts of tensors."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import CUTOFF, Structures, Training, edges_of, labels_of, seeded_model
from so3krates_torch.modules.models import So3krates
from torch import Tensor, nn

NUM_ELEMENTS = 118


def sample(atoms: Atoms) -> dict[str, Tensor]:
    """Returns a structure with edges and labels."""
    edges, offsets = edges_of(atoms)
    cell, numbers = torch.tensor(atoms.cell.array), torch.tensor(atoms.numbers)
    return {
        "edge_index": edges,
        "shifts": offsets @ cell,
        "unit_shifts": offsets,
        "positions": torch.tensor(atoms.positions),
        "node_attrs": nn.functional.one_hot(numbers - 1, NUM_ELEMENTS).double(),
        "atomic_numbers": numbers,
        "cell": cell,
        **labels_of(atoms),
    }


def collate(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns a batch as the package's own loader makes it."""
    sizes = torch.tensor([len(s["positions"]) for s in samples])
    ptr = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    joined = {name: torch.cat([s[name] for s in samples]) for name in samples[0] if name != "edge_index"}
    edges = torch.cat([s["edge_index"] + first for s, first in zip(samples, ptr[:-1], strict=True)], 1)
    of_structures = {name: torch.zeros(len(samples)).double() for name in ("total_charge", "total_spin")}
    of_structures["head"] = torch.zeros(len(samples), dtype=torch.int64)
    batch = torch.repeat_interleave(torch.arange(len(samples)), sizes)
    return {**joined, **of_structures, "edge_index": edges, "batch": batch, "ptr": ptr}


def predict(model: nn.Module, batch: dict[str, Any], stress: bool = True) -> list[Tensor]:
    """Energies, forces and, where there are cells, stress."""
    out = model(dict(batch), training=True, compute_stress=stress)
    return [out["energy"], out["forces"], *([out["stress"]] if stress else [])]


def make_module(stress: bool = True) -> Training:
    """A small So3krates with all its optional parts."""
    sizes = {"num_radial_basis_fn": 4, "degrees": [1, 2], "num_features": 8, "num_heads": 2, "num_layers": 2}
    parts = ("layer_normalization_1", "layer_normalization_2", "residual_mlp_1", "residual_mlp_2")

    def make() -> nn.Module:
        optional = dict.fromkeys(parts, True)
        return So3krates(r_max=CUTOFF, avg_num_neighbors=10.0, dtype=torch.float64, **sizes, **optional)

    return Training(seeded_model(make), partial(predict, stress=stress), lambda batch: batch)


make_without_stress = partial(make_module, False)
crystals = partial(Structures, "crystals", sample, collate)
molecules = partial(Structures, "molecules", sample, collate)
