from __future__ import annotations

import logging

import pytest
from ase.build import molecule
from ase.io import write
from torch.utils.data import ConcatDataset, DataLoader, Subset

from lightning_januspipe.data import ASEDataModule, StructureDataset, collate_structures, emt_structures
from lightning_januspipe.models import EquivariantPotential, PotentialModule
from lightning_januspipe.testing import quiet_trainer

SPECIES = ["Al", "Ni", "Cu"]

pytestmark = pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning")


def make_module(**options) -> PotentialModule:
    return PotentialModule(EquivariantPotential(SPECIES, 3.0, num_layers=1, num_features=2), **options)


@pytest.fixture
def referenced(tmp_path):
    """File of alloys whose labels have a prefix; one has no stress."""
    structures = []
    for index, atoms in enumerate(emt_structures(6, sizes=(4,))):
        bare = atoms.copy()
        bare.info["REF_energy"] = atoms.get_potential_energy()
        if index != 4:
            bare.info["REF_stress"] = atoms.get_stress(voigt=False)
        bare.arrays["REF_forces"] = atoms.get_forces()
        structures.append(bare)
    write(tmp_path / "ref.extxyz", structures)
    return str(tmp_path / "ref.extxyz")


REF = {"energy_key": "REF_energy", "forces_key": "REF_forces", "cutoff": 3.0, "species": SPECIES}


def test_a_weighted_label_that_no_structure_has(referenced) -> None:
    message = (
        r"stress_weight=100, but none of the 6 training structures has a stress label 'stress'\. Keys found: .*"
        r"'REF_stress' \(info\) in 5 of 6.*Set stress_key of the data"
    )
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_epochs=1).fit(make_module(stress_weight=100), ASEDataModule(referenced, **REF))
    loader = DataLoader(StructureDataset(referenced, **REF), batch_size=2, collate_fn=collate_structures)
    with pytest.raises(ValueError, match=message):
        quiet_trainer(max_epochs=1).fit(make_module(stress_weight=100), loader)
    quiet_trainer(max_epochs=1).fit(make_module(), ASEDataModule(referenced, **REF))
    with pytest.raises(ValueError, match="force_weight=1, but none of .* has a forces label None"):
        options = {**REF, "forces_key": None}
        quiet_trainer(max_epochs=1).fit(make_module(), ASEDataModule(referenced, **options))
    quiet_trainer(max_epochs=1).fit(make_module(force_weight=0.0), ASEDataModule(referenced, **options))


def test_molecules_have_no_stress(tmp_path) -> None:
    molecules = [molecule("H2O"), molecule("H2")]
    for atoms in molecules:
        atoms.info.update(energy=1.0, stress=[0.0] * 6)
        atoms.arrays["forces"] = 0 * atoms.positions
    dataset = StructureDataset(molecules, cutoff=3.0)
    module = PotentialModule(EquivariantPotential(["H", "O"], 3.0, num_layers=1, num_features=2), stress_weight=1.0)
    with pytest.raises(ValueError, match="has a stress label 'stress', because none has a volume"):
        quiet_trainer(max_epochs=1).fit(module, DataLoader(dataset, collate_fn=collate_structures))


def test_partly_missing_labels_are_said(referenced) -> None:
    options = {**REF, "stress_key": "REF_stress"}
    module = make_module(stress_weight=1.0)
    with pytest.warns(UserWarning, match="1 of 6 training structures have no stress label 'REF_stress': their"):
        quiet_trainer(max_epochs=1).fit(module, ASEDataModule(referenced, **options))
    dataset = StructureDataset(referenced, **options)
    parts = ConcatDataset([Subset(dataset, [0, 1]), Subset(Subset(dataset, [2, 4]), [1])])
    loader = DataLoader(parts, collate_fn=collate_structures)
    with pytest.warns(UserWarning, match="1 of 3 training structures have no stress label"):
        quiet_trainer(max_epochs=1).fit(make_module(stress_weight=1.0), loader)
    only = DataLoader(Subset(dataset, [4]), collate_fn=collate_structures)
    with pytest.warns(UserWarning, match="no test structure has a stress label 'REF_stress': losses there are without"):
        quiet_trainer().test(module, only, verbose=False)


def test_missing_energies_and_forces_are_allowed_where_asked_for(referenced, tmp_path) -> None:
    structures = emt_structures(3, sizes=(4,))
    del structures[1].calc.results["forces"], structures[2].calc.results["energy"]
    write(tmp_path / "gaps.extxyz", structures)
    options = {"cutoff": 3.0, "species": SPECIES, "batch_size": 2}
    with pytest.raises(ValueError, match=r"gaps.extxyz, frame 1 has no forces label"):
        ASEDataModule(str(tmp_path / "gaps.extxyz"), **options).setup("fit")
    module = make_module()
    data = ASEDataModule(str(tmp_path / "gaps.extxyz"), require_labels=False, **options)
    trainer = quiet_trainer(max_epochs=1)
    with pytest.warns(UserWarning, match="1 of 3 training structures have no (energy|forces) label") as said:
        trainer.fit(module, data)
    messages = " ".join(str(one.message) for one in said)
    assert "no energy label" in messages and "no forces label" in messages
    assert trainer.callback_metrics["train_loss"].isfinite()


def test_labels_that_the_loss_does_not_use_are_said_once(referenced: str, caplog: pytest.LogCaptureFixture) -> None:
    data = ASEDataModule(referenced, **REF, stress_key="REF_stress", val_size=1)
    loader = DataLoader(StructureDataset(referenced, **REF, stress_key="REF_stress"), collate_fn=collate_structures)
    line = "{} of {} training structures have a {} label, which the loss does not use with {}=0"
    for given, weights, expected in (
        (loader, {}, [line.format(5, 6, "stress", "stress_weight")]),
        (loader, {"stress_weight": 1.0}, []),
        (loader, {"stress_weight": 1.0, "force_weight": 0.0}, [line.format(6, 6, "forces", "force_weight")]),
        (data, {"stress_weight": 1.0, "energy_weight": 0.0}, [line.format(5, 5, "energy", "energy_weight")]),
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            quiet_trainer(max_epochs=2).fit(make_module(**weights), given)
        said = [record.getMessage() for record in caplog.records]
        assert [one for one in said if "does not use" in one] == expected
