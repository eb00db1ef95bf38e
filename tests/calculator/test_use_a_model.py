"""The Python of docs/use-a-model.md runs as it stands there, after a training."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
from torch.utils.data import DataLoader

from lightning_januspipe.data import atoms_to_sample
from lightning_januspipe.models import PotentialModule
from lightning_januspipe.testing import quiet_trainer

from .conftest import crystal

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "use-a-model.md").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_page(trained: PotentialModule, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sample = atoms_to_sample(crystal(0), species=["Al", "Cu"], cutoff=4.0, dtype="float64", require_labels=False)
    trainer = quiet_trainer()
    trainer.validate(copy.deepcopy(trained), DataLoader([sample], batch_size=None), verbose=False)
    trainer.save_checkpoint("lightning_logs/version_0/checkpoints/best.ckpt")
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 7
    names: dict[str, object] = {}
    for block in blocks:
        if "schnetpack" not in block:  # which is not installed where this runs
            exec(block, names)
    energies = [image.get_potential_energy() for image in names["images"]]
    assert max(energies[1:-1]) > max(energies[0], energies[-1])  # a barrier
    assert names["barostat"].nsteps == 50 and names["dynamics"].nsteps == 100
    assert abs(names["crystal"].get_stress()).max() < 0.01


def test_the_adapter_of_the_page_is_the_one_that_is_tested() -> None:
    """Without the type hints that the tested file has."""
    tested = (ROOT / "tests" / "clients" / "programs" / "mace_calculator.py").read_text()
    bare = re.sub(r": (Any|torch\.dtype)\b| -> [^:]+(?=:)", "", tested[tested.index("class ") :])
    assert bare.strip() in PAGE
