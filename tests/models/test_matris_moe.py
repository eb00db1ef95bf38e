"""MatRIS-MoE: its sizes, and that its energy is a smooth, invariant function whose derivative its forces are."""

from __future__ import annotations

import doctest
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from torch import Tensor

import lightning_januspipe
from lightning_januspipe import keys
from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.data import StructureDataset, collate_structures
from lightning_januspipe.models import MatRISMoE, PotentialModule, matris_moe
from lightning_januspipe.testing import quiet_trainer

SPECIES = ["H", "O", "Cu", "Au"]
double = pytest.mark.usefixtures("float64")
Batch = dict[str, Tensor]


def make(**changes) -> MatRISMoE:
    torch.manual_seed(0)
    shifts = [-1.0, -2.0, -3.0, -4.0]
    return MatRISMoE.from_size("tiny", SPECIES, **{"per_species_shift": shifts, **changes}).eval()


def batch_of(structures: list[Atoms], cutoff: float = 6.0) -> Batch:
    data = StructureDataset(structures, cutoff=cutoff, species=SPECIES, dtype=torch.float64, require_labels=False)
    return collate_structures([data[i] for i in range(len(data))])


def cluster(seed: int = 0) -> Atoms:
    """A cluster of all elements, none of whose edges or angles is near a cutoff by symmetry."""
    rng = np.random.default_rng(seed)
    atoms = Atoms("CuAuOHCuAuH", rng.uniform(0, 4.5, (7, 3)))
    while atoms.get_all_distances()[np.triu_indices(7, 1)].min() < 1.2:
        atoms.positions = rng.uniform(0, 4.5, (7, 3))
    return atoms


@pytest.mark.parametrize(
    ("size", "total", "active", "top_k"),
    [("S", 1.09e9, 0.19e9, 4), ("M", 2.47e9, 0.56e9, 8), ("L", 11.5e9, 2.89e9, 16)],
)
def test_published_sizes(size, total, active, top_k) -> None:
    with torch.device("meta"):
        potential = MatRISMoE.from_size(size)
    assert potential.num_parameters() == pytest.approx((total, active), rel=0.02)
    assert {m.top_k for m in potential.modules() if hasattr(m, "top_k")} == {top_k}
    assert potential.arguments["num_features"] == 128 and potential.arguments["num_blocks"] == 6


@double
def test_invariance() -> None:
    potential, structures = make(), [cluster(), bulk("Cu", cubic=True), molecule("H2O"), Atoms("Au", [[0, 0, 0]])]
    structures[1].rattle(0.05, seed=1)
    batch = batch_of(structures)
    reference = potential(batch)
    assert reference[keys.FORCES].abs().max() > 1e-3
    rotation = torch.linalg.qr(torch.randn(3, 3)).Q
    rotation = rotation * -torch.linalg.det(rotation)  # improper: a mirror image has the same energy
    shift = torch.randn(4, 3)[batch[keys.BATCH]]
    moved = potential(
        batch | {keys.POSITIONS: batch[keys.POSITIONS] @ rotation.T + shift, keys.CELL: batch[keys.CELL] @ rotation.T}
    )
    torch.testing.assert_close(moved[keys.ENERGY], reference[keys.ENERGY])
    torch.testing.assert_close(moved[keys.FORCES], reference[keys.FORCES] @ rotation.T)
    torch.testing.assert_close(moved[keys.STRESS], rotation @ reference[keys.STRESS] @ rotation.T)
    # A lone atom has the energy of its element in its structure, and no force.
    assert reference[keys.FORCES][-1].abs().max() == 0


@double
def test_permutations_of_atoms_edges_and_structures() -> None:
    potential, structures = make(), [cluster(), bulk("Au"), molecule("H2O2")]
    reference = potential(batch_of(structures))
    orders = [torch.randperm(len(atoms)) for atoms in structures]
    permuted = potential(batch_of([atoms[order.numpy()] for atoms, order in zip(structures, orders, strict=True)]))
    torch.testing.assert_close(permuted[keys.ENERGY], reference[keys.ENERGY])
    alone = [potential(batch_of([atoms])) for atoms in structures]
    torch.testing.assert_close(torch.cat([result[keys.ENERGY] for result in alone]), reference[keys.ENERGY])
    forces = torch.cat([result[keys.FORCES][order] for result, order in zip(alone, orders, strict=True)])
    torch.testing.assert_close(permuted[keys.FORCES], forces)
    batch = batch_of(structures)
    order = torch.randperm(batch[keys.EDGE_INDEX].shape[1])
    batch |= {keys.EDGE_INDEX: batch[keys.EDGE_INDEX][:, order], keys.CELL_SHIFTS: batch[keys.CELL_SHIFTS][order]}
    torch.testing.assert_close(potential(batch)[keys.FORCES], reference[keys.FORCES])


@double
def test_forces_and_stress_are_derivatives() -> None:
    potential, atoms = make(), bulk("Cu", cubic=True)
    atoms.symbols[1] = "Au"
    atoms.rattle(0.1, seed=2)
    batch = batch_of([cluster(), atoms])
    result, step = potential(batch), 1e-4
    energy = potential.energy_model
    none = torch.zeros(2, 3, 3)

    def slope(displacement: Tensor, strain: Tensor) -> Tensor:
        plus, minus = (energy(batch, batch[keys.POSITIONS] + s * displacement, s * strain) for s in (step, -step))
        return ((plus - minus) / (2 * step)).detach()

    for atom in range(len(batch[keys.POSITIONS])):
        direction = torch.zeros_like(batch[keys.POSITIONS])
        direction[atom] = torch.tensor([0.3, -0.5, 0.8])
        expected = -slope(direction, none).sum()
        assert (result[keys.FORCES] * direction).sum().item() == pytest.approx(expected.item(), abs=1e-6)
    symmetric = torch.tensor([[0.3, 0.1, -0.2], [0.1, -0.4, 0.5], [-0.2, 0.5, 0.2]])
    expected = slope(torch.zeros_like(batch[keys.POSITIONS]), symmetric.expand(2, 3, 3))[1] / atoms.cell.volume
    assert (result[keys.STRESS][1] * symmetric).sum().item() == pytest.approx(expected.item(), abs=1e-6)


def energies_along(potential: MatRISMoE, path: list[Atoms]) -> Tensor:
    return potential(batch_of(path))[keys.ENERGY].detach()


@double
@pytest.mark.parametrize("distance", [6.0, 4.0])
def test_energy_is_smooth_across_cutoffs(distance) -> None:
    """Second differences of the energy change by less with shorter steps where an atom crosses a cutoff."""
    potential = make(per_species_shift=0.0)
    with torch.no_grad():  # the envelopes vanish with the third power, so much else has to be large
        potential.energy_model.scale *= 1e3

    def jump(width: float) -> float:
        """The largest change from one second difference to the next, over steps of a width."""
        steps = distance + width * (np.arange(-8, 9) + 0.37)
        path = [Atoms("CuAuOH", [[0, 0, 0], [2.1, 0.3, 0.2], [0.4, 2.0, 0.9], [0, 0, -z]]) for z in steps]
        second = energies_along(potential, path).diff(n=2) / width**2
        return float(second.diff().abs().max())

    wide, narrow = jump(4e-3), jump(1e-3)
    assert narrow < 0.5 * wide and wide > 1e-6


@double
def test_energy_is_smooth_where_neighbors_change_their_order() -> None:
    """Two neighbours of an atom exchange their places in the order of distances; so do the atoms along an axis."""
    potential = make()
    steps = 0.02 * (np.arange(-8, 9) + 0.37)
    path = [Atoms("CuAuOH", [[0, 0, 0], [2.0 + s, 0, 0.2], [0.4, 2.0 - s, 0.2], [-1.3, s, -1.1]]) for s in steps]
    second = energies_along(potential, path).diff(n=2) / 0.02**2
    assert float(second.diff().abs().max()) < 0.2 * float(second.abs().max())


@double
def test_a_step_in_the_envelope_is_noticed(monkeypatch) -> None:
    """The test across cutoffs fails for an envelope that ends with a jump of its second derivative."""
    monkeypatch.setattr(matris_moe.PolynomialCutoff, "forward", lambda self, x: (1 - x / self.cutoff).clamp(min=0) ** 2)
    for distance in (6.0, 4.0):
        with pytest.raises(AssertionError):
            test_energy_is_smooth_across_cutoffs(distance)


@double
def test_mixed_precision() -> None:
    """The gradient of a loss of forces is near that without rounding."""
    potential = make().float().train()
    batch = {name: t.float() if t.is_floating_point() else t for name, t in batch_of([cluster()]).items()}

    def gradient(is_mixed: bool) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_mixed):
            loss = potential(batch)[keys.FORCES].float().square().sum()
        found = torch.autograd.grad(loss, list(potential.parameters()), allow_unused=True)
        return torch.cat([g.flatten() for g in found if g is not None])

    expected, found = gradient(False), gradient(True)
    assert 1e-4 < (found - expected).norm() / expected.norm() < 0.1


@double
def test_tasks_charges_and_spins_have_energies_of_their_own() -> None:
    potential = make(tasks=["first", "second"])
    batch = batch_of([cluster()] * 4)
    told = {keys.TASK: torch.tensor([0, 1, 0, 0]), keys.CHARGE: torch.tensor([0, 0, -1, 0])}
    energies = potential(batch | told | {keys.SPIN: torch.tensor([0, 0, 0, 3])})[keys.ENERGY]
    assert len(set(energies.tolist())) == 4
    assert energies[0] == potential(batch)[keys.ENERGY][0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"angle_cutoff": 7.0}, "angle_cutoff=7.0 Å; expected a positive length up to cutoff=6.0 Å"),
        ({"num_heads": 3}, "num_features=16; expected a positive multiple of num_heads=3"),
        ({"top_k": 5}, "top_k=5; expected 1 to num_experts=4"),
        ({"tasks": "omat"}, "tasks='omat'; expected a list of distinct names"),
        ({"num_blocks": 0}, "num_blocks=0; expected at least 1"),
        ({"species": ["Cu", "Cu"]}, "species must be distinct"),
    ],
)
def test_arguments(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        MatRISMoE.from_size("tiny", **{"species": SPECIES, **changes})
    with pytest.raises(ValueError, match="size='XL'; expected one of"):
        MatRISMoE.from_size("XL")


def test_checkpoint_and_calculator(tmp_path) -> None:
    module = PotentialModule(make())
    trainer = quiet_trainer(default_root_dir=tmp_path)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "moe.ckpt")
    loaded = lightning_januspipe.load(tmp_path / "moe.ckpt").potential
    assert isinstance(loaded, MatRISMoE) and loaded.arguments == module.potential.arguments
    atoms = cluster()
    atoms.calc = JanusPipeCalculator(tmp_path / "moe.ckpt", dtype="float64")
    expected = module.potential.double()(batch_of([atoms]))
    np.testing.assert_allclose(atoms.get_forces(), expected[keys.FORCES].numpy(), atol=1e-5)
    assert atoms.get_potential_energies().sum() == pytest.approx(atoms.get_potential_energy())


def test_docstring_example() -> None:
    result = doctest.testmod(matris_moe)
    assert result.attempted and not result.failed


def test_needs_no_e3nn() -> None:
    code = """
import sys, types, pathlib, lightning_januspipe
package = types.ModuleType("lightning_januspipe.models")
package.__path__ = [str(pathlib.Path(lightning_januspipe.__file__).parent / "models")]
sys.modules.update({"e3nn": None, package.__name__: package})
from lightning_januspipe.models.matris_moe import MatRISMoE
MatRISMoE.from_size("tiny", ["Cu"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
