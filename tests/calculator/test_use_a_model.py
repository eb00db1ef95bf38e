"""The Python and the commands of docs/use-a-model.md run as they stand there, after a training."""

from __future__ import annotations

import copy
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from ase.io import read
from torch.utils.data import DataLoader

from lightning_januspipe.data import atoms_to_sample
from lightning_januspipe.models import PotentialModule
from lightning_januspipe.testing import quiet_trainer

from .conftest import crystal

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "use-a-model.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.filterwarnings("ignore")
def test_page(trained: PotentialModule, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample = atoms_to_sample(crystal(0), species=["Al", "Cu"], cutoff=4.0, dtype="float64", require_labels=False)
    trainer = quiet_trainer()
    trainer.validate(copy.deepcopy(trained), DataLoader([sample], batch_size=None), verbose=False)
    trainer.save_checkpoint("lightning_logs/version_0/checkpoints/best.ckpt")
    assert len(BLOCKS) == 9
    names: dict[str, object] = {}
    for block in BLOCKS:
        # SchNetPack is not installed where this runs; several processes take torchrun.
        if "schnetpack" not in block and "graph_size" not in block:
            exec(block, names)
    energies = [image.get_potential_energy() for image in names["images"]]
    assert max(energies[1:-1]) > max(energies[0], energies[-1])  # a barrier
    assert names["barostat"].nsteps == 50 and names["dynamics"].nsteps == 100
    assert abs(names["crystal"].get_stress()).max() < 0.01
    frequencies = names["bands"].energies[0]
    assert abs(frequencies[0]).max() < 1e-3, "acoustic at Γ"
    assert frequencies[1:-1].min() > 1e-3 and 0.015 < frequencies.max() < 0.06, "stable"
    (shared,) = (block for block in BLOCKS if "graph_size" in block)
    launched = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    alone = shared.replace("graph_size=2", "graph_size=1").replace("dist.get_rank()", "0")
    found = [_run(shared, launched), _run(alone, [])]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_commands(tmp_path: Path) -> None:
    """Also that of docs/export.md, for the same checkpoint; the training is shorter than that of the recipe."""
    pages = PAGE + (ROOT / "docs" / "export.md").read_text()
    lines = "".join(re.findall(r"```bash\n(.*?)```", pages, re.DOTALL)).replace("\\\n", " ").splitlines()
    fewer = ["--data.num_train", "24", "--data.num_val", "4", "--data.num_test", "6", "--trainer.max_epochs", "2"]
    first = ["januspipe", "fit", "--config", str(ROOT / "recipes" / "quickstart.yaml"), *fewer]
    commands = [first, *(shlex.split(line) for line in lines if line.startswith("januspipe"))]
    commands = [command for command in commands if "model.pt" not in command]  # metatomic is not installed here
    assert [command[1] for command in commands] == ["fit", "predict", "test", "export"]
    for command in commands:
        run = [sys.executable, "-m", "lightning_januspipe.cli", *command[1:]]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert len(read(tmp_path / "predictions.extxyz", ":")) == 6 and (tmp_path / "model.pt2").is_file()
    for version, more in (("version_0", {"learning-curves.png"}), ("version_2", set())):
        found = {path.name for path in (tmp_path / "lightning_logs" / version / "evaluation").iterdir()}
        pictures = {f"parity-{quantity}.png" for quantity in ("energy", "forces", "stress")}
        assert found == pictures | more | {"errors.csv", "hardest.extxyz"}


def _run(script: str, launched: list[str]) -> float:
    """Runs a script in the present folder, and returns the number that it prints last."""
    Path("simulate.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launched, "simulate.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.splitlines()[-1])
