"""What the ranks of tests on files of predictions run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny


def structures(number: int) -> list[Any]:
    """Returns labelled alloys; every third has a ``config_type``, and the second no labels."""
    from lightning_januspipe.data import emt_structures

    found = emt_structures(number, sizes=(4, 8, 16))
    for index, atoms in enumerate(found):
        atoms.info |= {"frame": index, **({"config_type": "third"} if index % 3 == 0 else {})}
    if number > 1:
        found[1].calc = None
    return found


def predicted(strategy: dict[str, Any] | None, file: str, output: str, batch_size: int, budget: int | None) -> int:
    """Predicts the structures of a file into another one, and returns how many batches this rank had."""
    from lightning_januspipe.callbacks import PredictionWriter
    from lightning_januspipe.data import ASEDataModule
    from lightning_januspipe.testing import quiet_trainer

    data = ASEDataModule(
        file,
        predict_file=file,
        species=["Cu", "Ni", "Al"],
        dtype="float64",
        batch_size=batch_size,
        max_atoms=budget,
        require_labels=False,
    )
    trainer = quiet_trainer(strategy, use_distributed_sampler=True, callbacks=[PredictionWriter(output)])
    return len(trainer.predict(tiny.module(), data) or [])


def leftovers(folder: str) -> list[str]:
    """Returns the names of hidden files."""
    return sorted(path.name for path in Path(folder).glob(".*"))


def reported(strategy: dict[str, Any] | None, file: str, folder: str) -> float:
    """Tests on the structures of a file with a report in a folder, and returns the logged error of the forces."""
    from lightning_januspipe.callbacks import EvaluationReport
    from lightning_januspipe.data import ASEDataModule
    from lightning_januspipe.testing import quiet_trainer

    data = ASEDataModule(
        file, test_file=file, species=["Cu", "Ni", "Al"], dtype="float64", batch_size=2, require_labels=False
    )
    trainer = quiet_trainer(strategy, use_distributed_sampler=True, callbacks=[EvaluationReport(folder)])
    (found,) = trainer.test(tiny.module(), data, verbose=False)
    return float(found["test_forces_mae"])
