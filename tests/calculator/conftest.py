from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from lightning_januspipe.data import StructureDataset, collate_structures, label_with_emt
from lightning_januspipe.models import EquivariantPotential, PotentialModule


def crystal(index: int) -> Atoms:
    """A strained, rattled crystal of 4 or 8 atoms of copper, two thirds of them with an atom of aluminium."""
    rng = np.random.default_rng(index)
    atoms = bulk("Cu", "fcc", a=3.6 * rng.uniform(0.95, 1.06), cubic=True) * [(1, 1, 1), (2, 1, 1)][index % 2]
    if index % 3:
        atoms.symbols[0] = "Al"
    strain = rng.normal(0, 0.02, (3, 3))
    atoms.set_cell(atoms.cell @ (np.eye(3) + (strain + strain.T) / 2), scale_atoms=True)
    atoms.rattle(0.1, seed=index)
    return atoms


@pytest.fixture(scope="session")
def trained() -> PotentialModule:
    """A potential of aluminium and copper in float64, trained for some seconds to about 30 meV/Å of EMT."""
    num_threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        data = StructureDataset([label_with_emt(crystal(i)) for i in range(32)], cutoff=4.0, species=["Al", "Cu"])
        batches = [collate_structures([data[j] for j in range(i, i + 16)]) for i in (0, 16)]
        potential = EquivariantPotential(
            ["Al", "Cu"], 4.0, num_layers=2, num_features=8, num_bessel=6, radial_hidden=[16], avg_num_neighbors=40.0
        )
        module = PotentialModule(potential, stress_weight=100.0, learning_rate=0.02)
        optimizer = module.configure_optimizers()
        for step in range(80):
            batch = batches[step % 2]
            loss = module.loss(potential(batch), batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.1
        return module.eval()
    finally:
        torch.set_num_threads(num_threads)
        torch.set_default_dtype(dtype)
