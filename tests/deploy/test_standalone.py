"""An exported file gives what the potential gives, for structures of other sizes, in a process without this package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from lightning_januspipe import keys
from lightning_januspipe.calculator import JanusPipeCalculator
from lightning_januspipe.cli.main import main
from lightning_januspipe.compiled.compiled_potential import INPUTS, OUTPUTS
from lightning_januspipe.data import StructureDataset, collate_structures
from lightning_januspipe.deploy import export_potential
from lightning_januspipe.models import EquivariantPotential

SPECIES = ["H", "O", "Cu"]

ALONE = """
import json, sys, torch

class Refuse:
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("lightning_januspipe", "lightning", "ase"):
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
try:
    import lightning_januspipe
    raise SystemExit("the package can be imported here")
except ImportError:
    pass
run = torch._inductor.aoti_load_package(sys.argv[1])
found = []
for arguments in torch.load(sys.argv[2]):
    try:
        found.append(run(*arguments))
    except Exception as error:
        found.append(str(error))
torch.save(found, sys.argv[3])
print(json.dumps(run.get_metadata()))
"""


@pytest.fixture(scope="module")
def potential() -> EquivariantPotential:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    try:
        return EquivariantPotential(SPECIES, 3.5, num_layers=2, num_features=4, radial_hidden=[8]).eval()
    finally:
        torch.set_default_dtype(before)


@pytest.fixture(scope="module")
def exported(potential: EquivariantPotential, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.pt2"
    export_potential(potential, path)
    return path


def arguments(structures: list[Atoms]) -> list[torch.Tensor]:
    data = StructureDataset(structures, cutoff=3.5, species=SPECIES, dtype=torch.float64, require_labels=False)
    batch = collate_structures([data[i] for i in range(len(data))])
    return [batch[name] for name in INPUTS]


def alone(path: Path, given: list[list[torch.Tensor]], folder: Path) -> tuple[list, dict[str, str]]:
    """Returns what a process without this package gets from a file, results or errors, and the file's metadata."""
    torch.save(given, folder / "given.pt")
    script = folder / "alone.py"
    script.write_text(ALONE)
    command = [sys.executable, "-I", str(script), str(path), str(folder / "given.pt"), str(folder / "found.pt")]
    done = subprocess.run(command, cwd=folder, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt"), json.loads(done.stdout)


def test_in_a_process_without_this_package(potential: EquivariantPotential, exported: Path, tmp_path: Path) -> None:
    crystal = bulk("Cu", "fcc", a=3.6, cubic=True) * (3, 2, 2)
    crystal.rattle(0.1, seed=1)
    water = molecule("H2O")
    cases = [[crystal], [Atoms("Cu")], [Atoms("CuO", [[0, 0, 0], [0, 0, 9.0]])], [water, crystal, Atoms("O"), water]]
    given = [arguments(case) for case in cases]
    results, told = alone(exported, given, tmp_path)
    for one, found in zip(given, results, strict=True):
        expected = potential(dict(zip(INPUTS, one, strict=True)))
        for name, value in zip(OUTPUTS, found, strict=True):
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)
    assert json.loads(told["species"]) == SPECIES and float(told["cutoff"]) == 3.5 and told["dtype"] == "float64"
    assert list(json.loads(told["inputs"])) == list(INPUTS) and json.loads(told["outputs"]) == list(OUTPUTS)


def test_arguments_may_be_laid_out_in_memory_in_any_way(
    potential: EquivariantPotential, exported: Path, tmp_path: Path
) -> None:
    crystal = bulk("Cu", "fcc", a=3.6, cubic=True)
    crystal.rattle(0.1, seed=3)
    right = arguments([crystal, molecule("H2O")])
    cases = [transposed(argument) for argument in right]
    given = [right[:i] + [case] + right[i + 1 :] for i, case in enumerate(cases)]
    assert sum(not case.is_contiguous() for case in cases) == len(INPUTS)
    every = [*given, cases]
    expected = potential(dict(zip(INPUTS, right, strict=True)))
    for found in alone(exported, every, tmp_path)[0]:
        for name, value in zip(OUTPUTS, found, strict=True):
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the same values with other strides: in reverse order of dimensions, every second one in memory."""
    order = list(reversed(range(tensor.dim())))
    reversed_twice = torch.stack([tensor.permute(order), torch.zeros_like(tensor).permute(order)], dim=-1)
    return reversed_twice[..., 0].permute(order)


def test_wrong_arguments_are_refused(exported: Path, tmp_path: Path) -> None:
    crystal = bulk("Cu", "fcc", a=3.6, cubic=True)
    names = list(INPUTS)

    def changed(name: str, value: torch.Tensor) -> list[torch.Tensor]:
        given = arguments([crystal, molecule("H2O")])
        given[names.index(name)] = value
        return given

    right = dict(zip(names, arguments([crystal, molecule("H2O")]), strict=True))
    edges, num_atoms, num_edges = right["edge_index"], len(right["species"]), right["edge_index"].shape[1]
    another, negative, joined = edges.clone(), edges.clone(), edges.clone()
    another[0, 7], negative[1, 3], joined[1, 0] = num_atoms, -1, num_atoms - 1
    cases = [
        ("positions", right["positions"].float(), "positions has another type; expected float64"),
        ("species", right["species"].int(), "species has another type; expected int64"),
        ("species", right["species"] + 1, r"species has the value 3; expected 0 to 2: an index in the list of species"),
        ("species", right["species"] - 1, "species has the value -1; expected 0 to 2"),
        ("species", right["species"][1:], rf"species has shape \({num_atoms - 1},\); expected \(N,\)"),
        ("edge_index", edges.T, rf"edge_index has shape \({num_edges}, 2\); expected \(2, E\)"),
        ("edge_index", another, f"edge_index has the value {num_atoms}; expected 0 to {num_atoms - 1}"),
        ("edge_index", negative, f"edge_index has the value -1; expected 0 to {num_atoms - 1}"),
        ("edge_index", joined, "edge 0 joins atoms of two structures"),
        ("edge_index", edges[:, 1:], rf"cell_shifts has shape \({num_edges}, 3\); expected \(E, 3\)"),
        ("cell_shifts", right["cell_shifts"] * 3.6, "cell_shifts has the value -?3.6.*; expected whole numbers"),
        ("cell", right["cell"][0], r"cell has shape \(3, 3\); expected \(B, 3, 3\)"),
        ("cell", right["cell"][:1], "batch has the value 1; expected 0 to 0: an index of a structure"),
    ]
    found, _ = alone(exported, [changed(name, value) for name, value, _ in cases], tmp_path)
    for (name, _, message), error in zip(cases, found, strict=True):
        assert isinstance(error, str), f"{name} was accepted"
        assert re.search(message, error), error


def test_gives_what_the_calculator_gives(potential: EquivariantPotential, exported: Path) -> None:
    atoms = bulk("Cu", "fcc", a=3.6, cubic=True)
    atoms.rattle(0.1, seed=2)
    (energy, forces, _) = torch._inductor.aoti_load_package(str(exported))(*arguments([atoms]))
    atoms.calc = JanusPipeCalculator(potential)
    assert abs(float(energy) - atoms.get_potential_energy()) < 1e-10
    assert abs(forces.numpy() - atoms.get_forces()).max() < 1e-10


def test_what_cannot_be_exported(potential: EquivariantPotential, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.pt: torch loads files whose names end in \.pt2"):
        export_potential(potential, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="Linear has no attributes 'species' and 'cutoff'"):
        export_potential(torch.nn.Linear(1, 1), tmp_path / "model.pt2")
    several = EquivariantPotential(["Cu"], 3.5, num_layers=1, num_features=2, tasks=["pbe", "r2scan"])
    for task in (None, "hf"):
        with pytest.raises(ValueError, match=rf"task={task!r}, but Equivariant.* has the tasks \['pbe', 'r2scan'\]"):
            export_potential(several, tmp_path / "model.pt2", task=task)
    with pytest.raises(ValueError, match="task='pbe', but EquivariantPotential has the tasks .'default'"):
        export_potential(potential, tmp_path / "model.pt2", task="pbe")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_told_before_anything_is_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, the checkpoint itself, a file in place of a folder, and a folder that refuses."""
    folder, checkpoint, file = tmp_path / "a folder.pt2", tmp_path / "epoch 3.pt2", tmp_path / "file"
    folder.mkdir()
    checkpoint.touch()
    file.touch()
    for path, reason in (
        (folder, "is a folder; give the name of a file"),
        (tmp_path / "." / checkpoint.name, "is the checkpoint, which the exported file would replace"),
        (file / "new" / "model.pt2", "cannot be made: .*file is no folder"),
    ):
        with pytest.raises(ValueError, match=reason):
            export_potential(checkpoint, path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="device='cuda:0', but torch finds no GPU"):
        export_potential(checkpoint, tmp_path / "model.pt2", device="cuda:0")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ValueError, match=r"new.model\.pt2 cannot be made: .* cannot be written to"):
        export_potential(checkpoint, tmp_path / "new" / "model.pt2")
    assert sorted(tmp_path.iterdir()) == sorted([folder, checkpoint, file])


def test_a_wrong_file_is_not_kept(
    potential: EquivariantPotential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is compiled is compared with the potential before the file gets its name."""
    from lightning_januspipe.deploy import standalone

    def other(*_: object, **more: object) -> None:
        Path(str(more["package_path"])).write_bytes(b"")

    class Wrong:
        def __call__(self, *given: torch.Tensor) -> list[torch.Tensor]:
            found = potential(dict(zip(INPUTS, given, strict=True)))
            return [found[keys.ENERGY], found[keys.FORCES] * 1.001, found[keys.STRESS]]

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", other)
    monkeypatch.setattr(torch._inductor, "aoti_load_package", lambda _: Wrong())
    with pytest.raises(ValueError, match="gives another forces than the potential"):
        standalone.export_potential(potential, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["export", str(tmp_path / "no.ckpt"), "model.pt2"])
    assert exit_info.value.code == 2
    assert "no.ckpt does not exist; expected a checkpoint" in capsys.readouterr().err
