import copy
import doctest
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from torch import Tensor
from torch.fx.experimental import _config as fx_config
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_januspipe import keys
from lightning_januspipe.models import ConservativePotential, EquivariantPotential, losses, radial, spherical
from lightning_januspipe.models import potential as potential_file
from lightning_januspipe.models.e3nn_compat import o3

Batch = dict[str, Tensor]
double = pytest.mark.usefixtures("float64")


def energies(potential: EquivariantPotential, batch: Batch, **changes: Tensor) -> Tensor:
    return potential({**batch, **changes})[keys.ENERGY].detach()


@double
@pytest.mark.parametrize("l_max", [1, 2])
def test_invariance(make_batch, make_structure, make_potential, l_max: int) -> None:
    batch = make_batch([make_structure(i) for i in range(3)])
    potential = make_potential(l_max=l_max).eval()
    reference = potential(batch)
    torch.manual_seed(1)
    rotation = -o3.rand_matrix()  # improper: parity is kept too
    shift = torch.randn(3, 3)[batch[keys.BATCH]]
    moved = potential(
        batch | {keys.POSITIONS: batch[keys.POSITIONS] @ rotation.T + shift, keys.CELL: batch[keys.CELL] @ rotation.T}
    )
    torch.testing.assert_close(moved[keys.ENERGY], reference[keys.ENERGY])
    torch.testing.assert_close(moved[keys.FORCES], reference[keys.FORCES] @ rotation.T)
    torch.testing.assert_close(moved[keys.STRESS], rotation @ reference[keys.STRESS] @ rotation.T)
    assert reference[keys.FORCES].abs().max() > 1e-3


@double
def test_permutation_and_structures_are_independent(make_batch, make_structure, make_potential) -> None:
    structures = [make_structure(i) for i in range(3)]
    potential = make_potential().eval()
    reference = potential(make_batch(structures))
    orders = [torch.randperm(len(atoms)) for atoms in structures]
    permuted = potential(make_batch([atoms[order.numpy()] for atoms, order in zip(structures, orders, strict=True)]))
    torch.testing.assert_close(permuted[keys.ENERGY], reference[keys.ENERGY])
    alone = [potential(make_batch([atoms])) for atoms in structures]
    torch.testing.assert_close(torch.cat([result[keys.ENERGY] for result in alone]), reference[keys.ENERGY])
    torch.testing.assert_close(torch.cat([result[keys.FORCES] for result in alone]), reference[keys.FORCES])
    forces = torch.cat([result[keys.FORCES][order] for result, order in zip(alone, orders, strict=True)])
    torch.testing.assert_close(permuted[keys.FORCES], forces)


@double
def test_supercell_is_extensive(make_batch, make_potential) -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=3)
    potential = make_potential().eval()
    one, two = potential(make_batch([atoms])), potential(make_batch([atoms * (2, 1, 1)]))
    torch.testing.assert_close(two[keys.ENERGY], 2 * one[keys.ENERGY])
    torch.testing.assert_close(two[keys.STRESS], one[keys.STRESS])


@double
def test_forces_are_finite_differences(make_batch, make_structure, make_potential) -> None:
    batch = make_batch([make_structure(i) for i in range(3)])
    potential = make_potential().eval()
    forces = potential(batch)[keys.FORCES]
    step = 1e-5
    for atom in (0, 5, 7):
        for axis in range(3):
            displacement = torch.zeros_like(forces)
            displacement[atom, axis] = step
            plus = energies(potential, batch, positions=batch[keys.POSITIONS] + displacement).sum()
            minus = energies(potential, batch, positions=batch[keys.POSITIONS] - displacement).sum()
            assert forces[atom, axis].item() == pytest.approx(-(plus - minus).item() / (2 * step), abs=1e-8, rel=1e-6)


@double
def test_stress_is_a_finite_difference(make_batch, make_structure, make_potential) -> None:
    structures = [make_structure(i) for i in range(3)]
    batch = make_batch(structures)
    potential = make_potential().eval()
    stress = potential(batch)[keys.STRESS]
    torch.testing.assert_close(stress, stress.transpose(1, 2))
    assert stress[1].abs().max() == 0.0  # a molecule
    step = 1e-5
    for a, b in ((0, 0), (0, 1), (1, 2), (2, 2)):
        strain = torch.zeros(3, 3)
        strain[a, b] += step / 2
        strain[b, a] += step / 2
        plus, minus = (
            energies(
                potential,
                batch,
                positions=batch[keys.POSITIONS] @ deformation,
                cell=batch[keys.CELL] @ deformation,
            )
            for deformation in (torch.eye(3) + strain, torch.eye(3) - strain)
        )
        for index in (0, 2):
            slope = (plus - minus)[index].item() / (2 * step)
            assert stress[index, a, b].item() == pytest.approx(
                slope / structures[index].cell.volume, rel=1e-5, abs=1e-9
            )


@double
def test_antisymmetric_strain_is_dropped(make_batch, make_structure, make_potential) -> None:
    batch = make_batch([make_structure(i) for i in range(2)])
    model = make_potential().energy_model
    strain = 0.1 * torch.randn(2, 3, 3)
    energy = model(batch, batch[keys.POSITIONS], strain)
    torch.testing.assert_close(model(batch, batch[keys.POSITIONS], strain.transpose(1, 2)), energy)
    assert not torch.allclose(model(batch, batch[keys.POSITIONS], 0 * strain), energy)


@double
def test_second_derivatives_are_exact(make_batch, make_structure, make_potential) -> None:
    batch = make_batch([make_structure(1), Atoms("Au", cell=[2.9, 2.9, 2.9], pbc=True)])
    potential = make_potential(num_layers=2, num_features=2, num_bessel=2, trainable_bessel=True)
    model = potential.energy_model
    names = [name for name, _ in model.named_parameters()]

    def energy(positions: Tensor, strain: Tensor, *parameters: Tensor) -> Tensor:
        parameter_dict = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(model, parameter_dict, (batch, positions, strain))

    inputs = (batch[keys.POSITIONS].clone().requires_grad_(), torch.zeros(2, 3, 3, requires_grad=True))
    torch.manual_seed(0)
    assert torch.autograd.gradcheck(energy, (*inputs, *model.parameters()), fast_mode=True)
    assert torch.autograd.gradgradcheck(energy, (*inputs, *model.parameters()), fast_mode=True)


@double
def test_energy_is_smooth_at_the_cutoff(make_batch, make_potential) -> None:
    potential = make_potential().eval()
    at_cutoff = dimer_energy(potential, make_batch, 3.5 - 1e-6)
    beyond = dimer_energy(potential, make_batch, 3.5 + 1e-6)
    assert at_cutoff == pytest.approx(beyond, abs=1e-12)
    assert dimer_energy(potential, make_batch, 2.5) != pytest.approx(beyond, abs=1e-4)


def dimer_energy(potential: EquivariantPotential, make_batch, distance: float) -> float:
    return energies(potential, make_batch([Atoms("CuAu", [[0, 0, 0], [0, 0, distance]])])).item()


def test_single_atom_without_edges(make_batch, make_potential) -> None:
    batch = make_batch([Atoms("Cu")])
    assert batch[keys.EDGE_INDEX].shape == (2, 0)
    potential = make_potential()
    result = potential(batch)
    assert result[keys.FORCES].tolist() == [[0.0, 0.0, 0.0]]
    assert result[keys.STRESS].abs().max() == 0.0
    shifted = make_potential(per_species_shift={"H": 0, "O": 0, "Cu": 7.0, "Au": 0})(batch)
    torch.testing.assert_close(shifted[keys.ENERGY], result[keys.ENERGY] + 10.0)
    (result[keys.ENERGY].sum() + result[keys.FORCES].square().sum()).backward()
    gradients = [p.grad for p in potential.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


@double
def test_edges_of_zero_length_carry_nothing(make_batch, make_structure, make_potential) -> None:
    batch = make_batch([make_structure(1), make_structure(0)])
    padded = batch | {
        keys.EDGE_INDEX: torch.cat([batch[keys.EDGE_INDEX], torch.tensor([[0, 4], [0, 4]])], dim=1),
        keys.CELL_SHIFTS: torch.cat([batch[keys.CELL_SHIFTS], torch.zeros(2, 3)]),
    }
    gradients = []
    for edges in (batch, padded):
        potential = make_potential()
        result = potential(edges)
        loss = sum(value.square().sum() for value in result.values())
        gradients.append([result[keys.FORCES], *torch.autograd.grad(loss, list(potential.parameters()))])
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_follows_the_module(make_batch, make_structure, make_potential, dtype: torch.dtype) -> None:
    batch = make_batch([make_structure(0)])
    batch = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    result = make_potential().to(dtype)(batch)
    assert {name: value.dtype for name, value in result.items()} == {
        keys.ENERGY: torch.float64,  # the sum of shifts that may be large
        keys.FORCES: dtype,
        keys.STRESS: dtype,
    }


def test_training_mode_decides_about_the_graph(make_batch, make_structure, make_potential) -> None:
    batch = make_batch([make_structure(0)])
    before = {name: value.clone() for name, value in batch.items()}
    potential = make_potential()
    assert all(value.requires_grad for value in potential(batch).values())
    with torch.no_grad():
        result = potential.eval()(batch)
    assert not any(value.requires_grad for value in result.values())
    assert result[keys.FORCES].abs().max() > 0
    for name, value in batch.items():
        assert torch.equal(value, before[name])
        assert not value.requires_grad
    with torch.inference_mode(), pytest.raises(RuntimeError, match="inference_mode"):
        potential(batch)


def test_copies_and_state_dicts_compute_the_same(make_batch, make_structure, make_potential) -> None:
    batch = make_batch([make_structure(0)])
    potential = make_potential(trainable_scale_shift=True).eval()
    reference = energies(potential, batch)
    other = make_potential(trainable_scale_shift=True, per_species_shift=0.0).eval()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    other.load_state_dict(potential.state_dict())
    for same in (other, copy.deepcopy(potential), pickle.loads(pickle.dumps(potential))):
        assert torch.equal(energies(same, batch), reference)
        assert not any(isinstance(module, torch.jit.ScriptModule) for module in same.modules())


@double
def test_symbolic_trace_computes_other_batches(make_batch, make_structure, make_potential) -> None:
    model = make_potential(num_layers=2, trainable_bessel=True).energy_model
    names = (keys.SPECIES, keys.EDGE_INDEX, keys.CELL_SHIFTS, keys.CELL, keys.BATCH)
    parameters = {**dict(model.named_parameters()), **dict(model.named_buffers())}

    def energy_and_gradient(parameters: Batch, positions: Tensor, strain: Tensor, *tensors: Tensor) -> list[Tensor]:
        batch = dict(zip(names, tensors, strict=True))
        energy = torch.func.functional_call(model, parameters, (batch, positions, strain))
        return [energy, *torch.autograd.grad([energy.sum()], [positions, strain])]

    def arguments(count: int) -> tuple[Any, ...]:
        batch = make_batch([make_structure(i) for i in range(7 - count, 7)])
        positions, strain = batch[keys.POSITIONS].requires_grad_(), torch.zeros_like(batch[keys.CELL]).requires_grad_()
        return parameters, positions, strain, *(batch[name] for name in names)

    with fx_config.patch(use_duck_shape=False):  # else three structures and three coordinates are one symbol
        graph = make_fx(energy_and_gradient, tracing_mode="symbolic")(*arguments(3))
    for count in (1, 2, 7):
        inputs = arguments(count)
        torch.testing.assert_close(graph(*inputs), energy_and_gradient(*inputs), rtol=1e-12, atol=1e-12)
    one_atom = make_batch([Atoms("Cu")])
    inputs = (
        parameters,
        one_atom[keys.POSITIONS].requires_grad_(),
        torch.zeros(1, 3, 3, requires_grad=True),
        *(one_atom[name] for name in names),
    )
    torch.testing.assert_close(graph(*inputs), energy_and_gradient(*inputs))


@double
def test_export_with_automatic_sizes_computes_other_batches(make_batch, make_structure, make_potential) -> None:
    model = make_potential(num_layers=2).energy_model
    names = (keys.SPECIES, keys.EDGE_INDEX, keys.CELL_SHIFTS, keys.CELL, keys.BATCH)

    def arguments(count: int) -> tuple[Batch, Tensor, Tensor]:
        batch = make_batch([make_structure(i) for i in range(7 - count, 7)])
        return {name: batch[name] for name in names}, batch[keys.POSITIONS], torch.zeros_like(batch[keys.CELL])

    auto = torch.export.Dim.AUTO
    sizes = {keys.SPECIES: {0: auto}, keys.EDGE_INDEX: {1: auto}, keys.CELL_SHIFTS: {0: auto}, keys.CELL: {0: auto}}
    program = torch.export.export(
        model,
        arguments(3),
        dynamic_shapes=(sizes | {keys.BATCH: {0: auto}}, {0: auto}, {0: auto}),
        strict=False,
    )
    for count in (1, 2, 7):
        torch.testing.assert_close(
            program.module()(*arguments(count)), model(*arguments(count)), rtol=1e-12, atol=1e-12
        )


def test_forces_of_any_energy_model(make_batch, make_structure) -> None:
    class Springs(torch.nn.Module):
        def forward(self, batch: Batch, positions: Tensor, strain: Tensor) -> Tensor:
            strained = positions + torch.bmm(positions[:, None], strain[batch[keys.BATCH]])[:, 0]
            energy = 0.5 * strained.square().sum(-1)
            return energy.new_zeros(strain.shape[0]).index_add(0, batch[keys.BATCH], energy)

    batch = make_batch([make_structure(0)])
    result = ConservativePotential(Springs())(batch)
    torch.testing.assert_close(result[keys.FORCES], -batch[keys.POSITIONS])
    volume = make_structure(0).cell.volume
    expected = batch[keys.POSITIONS].T @ batch[keys.POSITIONS] / volume
    torch.testing.assert_close(result[keys.STRESS][0], expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"species": []}, "species must be a list"),
        ({"species": "CuAu"}, "species must be a list"),
        ({"species": ["Cu", "Cu"]}, "distinct"),
        ({"num_layers": 0}, "num_layers"),
        ({"cutoff": 0.0}, "cutoff"),
        ({"avg_num_neighbors": 0.0}, "avg_num_neighbors"),
        ({"per_species_shift": {"Cu": 1.0}}, "no value for"),
        ({"per_species_scale": [1.0]}, "one for each"),
    ],
)
def test_rejects(make_potential: Callable, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_potential(**changes)


@pytest.mark.parametrize("module", [losses, potential_file, radial, spherical])
def test_docstring_examples(module) -> None:
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
    assert result.attempted
    assert not result.failed
