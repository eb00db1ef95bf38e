"""An exported file gives what the potential gives, for structures of other sizes, in a process without this package."""

from __future__ import annotations

import json
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
torch.save([run(*arguments) for arguments in torch.load(sys.argv[2])], sys.argv[3])
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


def test_in_a_process_without_this_package(potential: EquivariantPotential, exported: Path, tmp_path: Path) -> None:
    crystal = bulk("Cu", "fcc", a=3.6, cubic=True) * (3, 2, 2)
    crystal.rattle(0.1, seed=1)
    water = molecule("H2O")
    cases = [[crystal], [Atoms("Cu")], [Atoms("CuO", [[0, 0, 0], [0, 0, 9.0]])], [water, crystal, Atoms("O"), water]]
    given = [arguments(case) for case in cases]
    torch.save(given, tmp_path / "given.pt")
    script = tmp_path / "alone.py"
    script.write_text(ALONE)
    command = [sys.executable, "-I", str(script), str(exported), str(tmp_path / "given.pt"), str(tmp_path / "found.pt")]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for one, found in zip(given, torch.load(tmp_path / "found.pt"), strict=True):
        expected = potential(dict(zip(INPUTS, one, strict=True)))
        for name, value in zip(OUTPUTS, found, strict=True):
            torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)
    told = json.loads(done.stdout)
    assert json.loads(told["species"]) == SPECIES and float(told["cutoff"]) == 3.5 and told["dtype"] == "float64"
    assert list(json.loads(told["inputs"])) == list(INPUTS) and json.loads(told["outputs"]) == list(OUTPUTS)


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
        with pytest.raises(ValueError, match=rf"task={task!r}, and Equivariant.* has the tasks \['pbe', 'r2scan'\]"):
            export_potential(several, tmp_path / "model.pt2", task=task)
    with pytest.raises(ValueError, match="task='pbe', and EquivariantPotential has the tasks .'default'"):
        export_potential(potential, tmp_path / "model.pt2", task="pbe")
    assert list(tmp_path.iterdir()) == []


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
