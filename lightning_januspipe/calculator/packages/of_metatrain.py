"""Makes the systems of metatrain's PET."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from typing_extensions import override

from lightning_januspipe.calculator.adapter import TRAINED
from lightning_januspipe.calculator.packages.package_parts import EnergyAtomsAdapter, symbols_of
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class PETAtomsAdapter(EnergyAtomsAdapter):
    """Makes the systems of PET, whose energy, of any unit, becomes eV.

    Args:
        model: The model.
        target: Name of the target of the energy; None where there is one.

    Raises:
        ValueError: There is no such target, or several and none is named; lengths are not in Å, or the model takes
            further inputs.
    """

    of_atoms = True

    def __init__(self, model: Any, target: str | None = None) -> None:
        from metatomic.torch import unit_conversion_factor

        super().__init__(max(options.cutoff for options in _neighbor_lists(model)))
        targets = {name: info for name, info in model.dataset_info.targets.items() if info.quantity == "energy"}
        if target not in targets and (target is not None or len(targets) != 1):
            raise ValueError(
                f"target={target!r}; the model has the energies {sorted(targets)}: give "
                "adapter=PETAtomsAdapter(model, target=...)"
            )
        self.target = next(iter(targets)) if target is None else target
        unit, length = targets[self.target].unit, model.dataset_info.length_unit
        if length.lower() not in ("", "a", "angstrom") or model.requested_inputs():
            raise ValueError(
                f"the model of metatrain has length_unit={length!r} and takes {sorted(model.requested_inputs())}; "
                "expected 'angstrom' and no further inputs"
            )
        self.energy_unit = unit_conversion_factor(unit, "eV") if unit else 1.0
        self.symbols = symbols_of(model.atomic_types)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> dict[str, Tensor]:
        species_index(atoms, self.symbols, "the structure", TRAINED)
        source, target = edges.edge_index
        samples = np.concatenate([target[:, None], source[:, None], edges.cell_shifts], axis=1)
        return {
            "positions": torch.tensor(atoms.positions, dtype=dtype),
            "cell": torch.tensor(atoms.cell.array * atoms.pbc[:, None], dtype=dtype),
            "pbc": torch.tensor(atoms.pbc),
            "types": torch.tensor(atoms.numbers, dtype=torch.int32),
            "samples": torch.tensor(samples, dtype=torch.int32),
            "vectors": torch.tensor(edges.vectors, dtype=dtype),
        }

    @override
    def energies(self, potential: Any, batch: Mapping[str, Any], positions: Tensor, cell: Tensor) -> Tensor:
        from metatensor.torch import Labels, TensorBlock
        from metatomic.torch import ModelOutput, System, register_autograd_neighbors

        names = ["first_atom", "second_atom", "cell_shift_a", "cell_shift_b", "cell_shift_c"]
        axes = torch.arange(3, device=positions.device)[:, None]
        system = System(batch["types"], positions, cell, batch["pbc"])
        for options in _neighbor_lists(potential):
            near = batch["vectors"].norm(dim=1) < options.cutoff
            neighbors = TensorBlock(
                batch["vectors"][near][..., None],
                Labels(names, batch["samples"][near]),
                [Labels("xyz", axes)],
                Labels("distance", axes[:1]),
            )
            register_autograd_neighbors(system, neighbors)
            system.add_neighbor_list(options, neighbors)
        outputs = potential([system], {self.target: ModelOutput(sample_kind="atom")})
        block = outputs[self.target].block()
        order = torch.argsort(block.samples.column("atom"))
        return block.values[order, 0] * self.energy_unit


def _neighbor_lists(model: Any) -> list[Any]:
    """Returns the options of the neighbour lists of a model and of what it adds to its energies."""
    parts = [part for part in (model, *model.additive_models) if hasattr(part, "requested_neighbor_lists")]
    return [options for part in parts for options in part.requested_neighbor_lists()]
