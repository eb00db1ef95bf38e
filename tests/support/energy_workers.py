"""Modules and data with all-electron energies, and what the ranks of their tests run."""

from __future__ import annotations

from typing import Any

import torch

SPECIES = ["Al", "Ni", "Cu"]
ATOMS = {"Al": -6600.789, "Ni": -41400.456, "Cu": -45000.123}
"""Energies of the atoms in eV, as all-electron codes give them."""


def potential(dtype: torch.dtype, **options: Any) -> Any:
    """Returns a seeded potential with the energies of the atoms as shifts."""
    from lightning_januspipe.models import EquivariantPotential

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    arguments = {"num_layers": 3, "num_features": 8, "avg_num_neighbors": 20.0, "per_species_shift": ATOMS, **options}
    made = EquivariantPotential(SPECIES, 4.0, **arguments).to(dtype)
    torch.set_default_dtype(before)
    return made


def structures(num_structures: int, sizes: tuple[int, ...]) -> list[Any]:
    """Returns structures labelled by the float64 potential itself, with energies of atoms summed beside it."""
    from ase.calculators.singlepoint import SinglePointCalculator

    from lightning_januspipe import keys
    from lightning_januspipe.data import StructureDataset, emt_structures

    teacher = potential(torch.float64, per_species_shift=0.0).eval()
    made = emt_structures(num_structures, sizes=sizes, species=SPECIES)
    for atoms, sample in zip(made, StructureDataset(made, cutoff=4.0, species=SPECIES, dtype="float64"), strict=True):
        out = teacher(sample)
        results = {
            "energy": float(out[keys.ENERGY]) + sum(ATOMS[symbol] for symbol in atoms.symbols),
            "forces": out[keys.FORCES].numpy(),
            "stress": out[keys.STRESS][0].numpy(),
        }
        atoms.calc = SinglePointCalculator(atoms, **results)
    return made


def data(num_structures: int, sizes: tuple[int, ...], dtype: str) -> Any:
    """Returns a data module of such structures, all in every split."""
    from torch.utils.data import Subset

    from lightning_januspipe.data import StructureDataModule, StructureDataset

    class Data(StructureDataModule):
        species = SPECIES

        def build_dataset(self, split: str) -> Any:
            made = structures(num_structures, sizes)
            return Subset(StructureDataset(made, cutoff=4.0, species=SPECIES, dtype=dtype), range(num_structures))

    return Data(batch_size=4, shuffle=False)


def trained_module() -> Any:
    """Returns a float64 module, other than the one that made the labels, that trains its shifts too."""
    from lightning_januspipe.models import PotentialModule

    torch.manual_seed(1)
    made = potential(torch.float64, trainable_scale_shift=True)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return PotentialModule(made, stress_weight=10.0, learning_rate=1e-3)


def trained_data() -> Any:
    """Returns float64 data for it."""
    return data(8, (4, 8), "float64")


def errors(strategy: dict[str, Any] | None, size: int) -> dict[str, float]:
    """Returns the test errors of the potential in float32 against labels that it made in float64."""
    from lightning_januspipe.models import PotentialModule
    from lightning_januspipe.testing import quiet_trainer

    module = PotentialModule(potential(torch.float32))
    (found,) = quiet_trainer(strategy).test(module, data(4, (size,), "float32"), verbose=False)
    return dict(found)


def gradients(strategy: dict[str, Any] | None) -> dict[str, Any]:
    """Returns parameter gradients of one training batch in float32, in eV per parameter, of what this rank holds."""
    from lightning.pytorch import Callback

    from lightning_januspipe.models import PotentialModule
    from lightning_januspipe.testing import quiet_trainer

    class Gradients(Callback):
        found: dict[str, Any]

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            self.found = {n: p.grad.double() for n, p in module.named_parameters() if p.grad is not None}

    torch.manual_seed(1)
    made = potential(torch.float64)
    for parameter in made.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    callback = Gradients()
    trainer = quiet_trainer(strategy, callbacks=[callback], max_steps=1, limit_val_batches=0)
    trainer.fit(PotentialModule(made.float()), data(4, (4, 8), "float32"))
    return callback.found
