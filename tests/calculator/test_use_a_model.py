"""The Python of docs/use-a-model.md runs as it stands there, after a training."""

from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from lightning_januspipe.data import atoms_to_sample
from lightning_januspipe.models import PotentialModule
from lightning_januspipe.testing import quiet_trainer

from .conftest import crystal

ROOT = Path(__file__).resolve().parents[2]
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "use-a-model.md").read_text(), re.DOTALL)


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
    (simulation,) = (block for block in BLOCKS if "Langevin" in block)
    imports = "\n".join(line for line in simulation.splitlines() if "import" in line)
    launched = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    alone = shared.replace("graph_size=2", "graph_size=1").replace("dist.get_rank()", "0")
    found = [_run(f"{imports}\n{shared}", launched), _run(f"{imports}\n{alone}", [])]
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def _run(script: str, launched: list[str]) -> float:
    """Runs a script in the present folder, and returns the number that it prints last."""
    Path("simulate.py").write_text(script)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launched, "simulate.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.splitlines()[-1])
