"""AIMNet2 with its own module for forces, on molecules that are padded to one size, and packed with neighbour lists."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from ase import Atoms
from client_parts import CUTOFF, Structures, Training, edges_of, labels_of, seeded_model
from torch import Tensor, nn
from torch.nn.functional import pad

torch.set_default_dtype(torch.float64)  # AIMNet2 converts what it is given to the type that this is when it is imported

from aimnet.models import AIMNet2  # noqa: E402
from aimnet.modules import AtomicShift, AtomicSum, Forces, LRCoulomb, Output  # noqa: E402

Sample = dict[str, Tensor]


def sample(atoms: Atoms) -> Sample:
    """Returns a neutral molecule with edges and labels."""
    edges, _ = edges_of(atoms, CUTOFF)
    labels = labels_of(atoms)
    return {
        "coord": torch.tensor(atoms.positions),
        "numbers": torch.tensor(atoms.numbers).long(),
        "charge": torch.zeros(1),
        "edges": edges,
        "energy": labels["energy"],
        "forces": labels["forces"],
    }


def padded(samples: list[Sample]) -> Sample:
    """Returns a batch in which all molecules have one size, with at least one atom of padding."""
    size = 1 + max(len(s["numbers"]) for s in samples)

    def filled(name: str) -> Tensor:
        return torch.stack(
            [pad(s[name], (*(0,) * 2 * (s[name].dim() - 1), 0, size - len(s["numbers"]))) for s in samples]
        )

    batch = {name: filled(name) for name in ("coord", "numbers", "forces")}
    return batch | {name: torch.cat([s[name] for s in samples]) for name in ("charge", "energy")}


def packed(samples: list[Sample]) -> Sample:
    """Returns a batch in which the atoms of all molecules follow each other, with a matrix of neighbours."""
    sizes = torch.tensor([len(s["numbers"]) for s in samples])
    starts = torch.cumsum(sizes, 0) - sizes
    source, target = torch.cat([s["edges"] + start for s, start in zip(samples, starts, strict=True)], 1)
    num_atoms = int(sizes.sum())
    counts = torch.bincount(source, minlength=num_atoms)
    neighbours = torch.full((num_atoms + 1, int(counts.max())), num_atoms)
    order = torch.argsort(source, stable=True)
    places = torch.arange(len(source)) - (torch.cumsum(counts, 0) - counts)[source[order]]
    neighbours[source[order], places] = target[order]
    batch = {name: torch.cat([s[name] for s in samples]) for name in ("coord", "numbers", "forces", "charge", "energy")}
    for name in ("coord", "numbers", "forces"):  # the last atom is padding
        batch[name] = pad(batch[name], (*(0,) * 2 * (batch[name].dim() - 1), 0, 1))
    molecules = torch.repeat_interleave(torch.arange(len(samples)), sizes)
    return batch | {"nbmat": neighbours, "mol_idx": torch.cat([molecules, molecules[-1:]])}


def of_aimnet(model: nn.Module, batch: Sample) -> list[Tensor]:
    """Energies and forces."""
    out = model({name: batch[name] for name in batch if name not in ("energy", "forces")})
    return [out["energy"], out["forces"]]


def make(coulomb: bool) -> Training:
    """A small AIMNet2.

    Args:
        coulomb: whether its charges repel each other.
    """
    sizes: dict[str, Any] = {
        "nfeature": 8,
        "d2features": True,
        "ncomb_v": 4,
        "hidden": ([16], [16], [16]),
        "aim_size": 16,
    }

    def made() -> nn.Module:
        outputs: dict[str, nn.Module] = {
            "energy_mlp": Output({"hidden": [8], "activation_fn": "torch.nn.GELU"}, 16, 1, "aim", "energy"),
            "atomic_shift": AtomicShift("energy", "energy"),
            "atomic_sum": AtomicSum("energy", "energy"),
        }
        if coulomb:
            outputs["lrcoulomb"] = LRCoulomb("charges", "energy", rc=3.0)
        return Forces(AIMNet2({"rc_s": CUTOFF, "nshifts_s": 8}, **sizes, outputs=outputs))

    return Training(seeded_model(made), of_aimnet, lambda b: b)


make_dense = partial(make, True)
make_packed = partial(make, False)

molecules_padded = partial(Structures, "molecules", sample, padded)
molecules_packed = partial(Structures, "molecules", sample, packed)
