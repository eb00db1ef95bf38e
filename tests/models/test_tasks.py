"""A potential of several tasks is one potential for each task, which share all but readout and energies of atoms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.build import bulk
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

import lightning_januspipe
from lightning_januspipe import keys
from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.data import ASEDataModule, collate_structures, emt_structures
from lightning_januspipe.models import EquivariantPotential, PotentialModule, describe
from lightning_januspipe.models.initial_weights import load_weights
from lightning_januspipe.testing import quiet_trainer

TASKS = ["pbe", "r2scan"]
SPECIES = ["Al", "Ni", "Cu"]
ATOMS = {"pbe": {"Al": -1.0, "Ni": -2.0, "Cu": -3.0}, "r2scan": {"Al": -10.0, "Ni": -20.0, "Cu": -30.0}}


def potential_of(tasks: list[str] | None = TASKS, **arguments: Any) -> EquivariantPotential:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        more = {} if tasks is None else {"tasks": tasks}
        return EquivariantPotential(SPECIES, 4.0, num_layers=2, num_features=4, radial_hidden=[8], **more, **arguments)
    finally:
        torch.set_default_dtype(before)


def alone(potential: EquivariantPotential, task: int) -> EquivariantPotential:
    """Returns the potential of one task, made from the weights of one of several."""
    state = {}
    for name, value in potential.state_dict().items():
        if ".readouts." in name:
            if f".readouts.{task}." in name:
                state[name.replace(f".readouts.{task}.", ".readout.")] = value
        else:
            state[name] = value[:, task] if name.endswith((".scale", ".shift")) else value
    found = potential_of(None)
    found.load_state_dict(state)
    return found.eval()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Alloys and lone atoms, every second one with the energies of atoms of another level of theory."""
    frames = []
    for index, atoms in enumerate(emt_structures(24, sizes=(4, 8), species=("Cu", "Ni", "Al"), seed=1)):
        atoms.info["task"] = TASKS[index % 2]
        atoms.calc.results["energy"] += sum(ATOMS[TASKS[index % 2]][symbol] for symbol in atoms.symbols)
        frames.append(atoms)
    for task, symbol in [("pbe", "Al"), ("pbe", "Ni"), ("pbe", "Cu"), ("r2scan", "Cu"), ("r2scan", "Ni")]:
        atom = Atoms(symbol, [[0.0, 0.0, 0.0]], info={"config_type": "IsolatedAtom", "task": task})
        atom.calc = SinglePointCalculator(atom, energy=ATOMS[task][symbol])
        frames.append(atom)
    write(tmp_path / "both.extxyz", frames)
    return tmp_path / "both.extxyz"


def opened(file: Path, **options: Any) -> ASEDataModule:
    options = {"tasks": TASKS, "cache_dir": str(file.parent / "cache"), **options}
    return ASEDataModule(str(file), cutoff=4.0, species=SPECIES, dtype="float64", batch_size=6, **options)


def test_each_task_is_a_potential_of_its_own(file: Path) -> None:
    potential = potential_of(per_species_shift=ATOMS).eval()
    assert potential.energy_model.shift.tolist() == [[ATOMS[task][symbol] for task in TASKS] for symbol in SPECIES]
    data = opened(file).dataset("train")
    assert data is not None
    tasks = set()
    mixed = potential(collate_structures([data[index] for index in range(6)]))
    for index in range(6):
        batch = collate_structures([data[index]])
        tasks.add(int(batch[keys.TASK]))
        expected = alone(potential, int(batch[keys.TASK]))(batch)
        torch.testing.assert_close(mixed[keys.ENERGY][index], expected[keys.ENERGY][0], rtol=0, atol=1e-10)
        torch.testing.assert_close(mixed[keys.STRESS][index], expected[keys.STRESS][0], rtol=0, atol=1e-12)
    assert tasks == {0, 1}


def test_other_readouts_are_not_trained(file: Path) -> None:
    potential = potential_of()
    batch = next(iter(opened(file).train_dataloader()))
    batch[keys.TASK] = torch.ones_like(batch[keys.TASK])
    PotentialModule(potential).loss(potential(batch), batch).backward()
    gradients = {name: float(p.grad.abs().sum()) for name, p in potential.named_parameters() if "readouts" in name}
    assert all((value > 0) == (".readouts.1." in name) for name, value in gradients.items()) and len(gradients) == 6


@pytest.mark.parametrize("lazy", [False, True])
def test_each_task_has_its_energies_of_atoms(file: Path, lazy: bool) -> None:
    shifts = opened(file, lazy=lazy).statistics().task_shifts
    assert dict(zip(SPECIES, shifts["pbe"], strict=True)) == ATOMS["pbe"]
    assert shifts["r2scan"][1:] == (-20.0, -30.0)
    assert 0 < abs(shifts["r2scan"][0] + 10.0) < 1.0  # fitted, with the binding energy
    given = opened(file, lazy=lazy, reference_energies=ATOMS).statistics()
    assert given.task_shifts == {task: tuple(ATOMS[task].values()) for task in TASKS}
    assert given.energy_rms < 1.0
    with pytest.raises(ValueError, match="there is no isolated atom of Al with the task 'r2scan' in the training"):
        opened(file, lazy=lazy, reference_energies="isolated_atoms").statistics()
    with pytest.raises(ValueError, match=r"reference_energies has nothing for the task 'r2scan', only \['pbe'\]"):
        opened(file, reference_energies={"pbe": ATOMS["pbe"]})


@pytest.mark.filterwarnings("ignore")
def test_from_training_to_the_calculator(file: Path, tmp_path: Path) -> None:
    """Also from the weights of one task, as in fine-tuning with replayed data."""
    first = PotentialModule(potential_of(None, per_species_shift=1.0))
    first_data = opened(file, tasks=None)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(first, first_data)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    module = PotentialModule(potential_of(per_species_shift=ATOMS), initial_weights=str(tmp_path / "first.ckpt"))
    assert load_weights(module, module.potential, tmp_path / "first.ckpt") == []
    state, before = module.potential.state_dict(), first.potential.state_dict()
    assert all(
        torch.equal(state[name.replace(".readout.", f".readouts.{task}.")], value)
        for name, value in before.items()
        if "scale" not in name and "shift" not in name
        for task in (0, 1)
    )
    assert module.potential.energy_model.shift[:, 1].tolist() == list(ATOMS["r2scan"].values())
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(module, opened(file))
    trainer.save_checkpoint(tmp_path / "both.ckpt")

    found = describe(tmp_path / "both.ckpt")
    assert found["tasks"] == TASKS and found["energies_of_atoms"] == ATOMS
    loaded = lightning_januspipe.load(tmp_path / "both.ckpt")
    atoms = bulk("Cu", cubic=True)
    energies = []
    for task in TASKS:
        atoms.calc = JanusPipeCalculator(tmp_path / "both.ckpt", task=task)
        atoms.info["task"] = "pbe"  # the calculator's own goes before it
        energies.append(atoms.get_potential_energy())
        atoms.calc = JanusPipeCalculator(loaded)
        atoms.info["task"] = task
        assert atoms.get_potential_energy() == energies[-1]
        assert atoms.get_potential_energies().sum() == pytest.approx(energies[-1], abs=1e-10)
    assert abs(energies[1] - energies[0]) > 50  # of four atoms
    del atoms.info["task"]
    with pytest.raises(ValueError, match=r"info\['task'\]=None; expected one of \['pbe', 'r2scan'\]"):
        atoms.get_potential_energy()
    with pytest.raises(ValueError, match=r"task='hf', but the potential has the tasks \['pbe', 'r2scan'\]"):
        JanusPipeCalculator(loaded, task="hf")
    with pytest.raises(ValueError, match="task='pbe', but the potential was trained without tasks: leave it out"):
        JanusPipeCalculator(first, task="pbe")
    with pytest.raises(ValueError, match=r"the potential has the tasks \['pbe', 'r2scan'\], and the data none"):
        quiet_trainer().validate(loaded, opened(file, tasks=None, val_size=4))


@pytest.mark.filterwarnings("ignore")
def test_prediction_by_one_task(file: Path, tmp_path: Path) -> None:
    write(tmp_path / "new.extxyz", [bulk("Cu", cubic=True), bulk("Ni")])
    potential = potential_of(per_species_shift=ATOMS)
    energies = {}
    for task in TASKS:
        data = opened(file, predict_file=str(tmp_path / "new.extxyz"), predict_task=task)
        (found,) = quiet_trainer().predict(PotentialModule(potential), data)
        energies[task] = found[keys.ENERGY]
    assert float((energies["pbe"] - energies["r2scan"])[0]) > 50
    with pytest.raises(ValueError, match="predict_task='hf' with tasks=.*; expected a file, and one of the tasks"):
        opened(file, predict_file="new.extxyz", predict_task="hf")


def test_errors() -> None:
    with pytest.raises(ValueError, match="per_species_shift has no values for the tasks"):
        potential_of(per_species_shift={"pbe": [1.0, 2.0, 3.0]})
    with pytest.raises(ValueError, match="tasks='pbe'; expected a list of distinct names"):
        EquivariantPotential(SPECIES, 4.0, tasks="pbe")
