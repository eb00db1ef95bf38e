"""fairchem-core's eSEN and UMA in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where fairchem-core is absent:

    python tests/clients/environments.py fairchem --folder /some/folder --run
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import calculator_ranks
import numpy as np
import pytest
import torch
from ase import Atoms
from capture_models import assert_parity
from factories import factory
from torch import Tensor, nn

from lightning_januspipe.calculator import FairchemAtomsAdapter, JanusPipeCalculator
from lightning_januspipe.capture import capture_module
from lightning_januspipe.testing import RankPool

from .calculator_checks import boxed, check_calculator, check_checkpoint, check_single_precision, crystal, results_of
from .compare import ModelConformance, client_marks

pytestmark = client_marks("fairchem", "fairchem-core")


class TestESEN(ModelConformance):
    """On given edges."""

    make_module = factory("fairchem_models", "make_esen")
    datamodules = {kind: factory("fairchem_models", kind) for kind in ("crystals", "molecules")}


class TestESENThatMakesEdges(ModelConformance):
    make_module = factory("fairchem_models", "make_esen_own_edges")
    datamodules = {"crystals": factory("fairchem_models", "crystals")}


class TestUMA(ModelConformance):
    """Without dropout, whose numbers a plain Trainer draws otherwise."""

    make_module = factory("fairchem_models", "make_uma")
    datamodules = {kind: factory("fairchem_models", kind) for kind in ("crystals", "molecules")}


MODELS = ["esen", "esen_own_edges", "uma"]


@pytest.mark.parametrize("model", MODELS)
def test_calculator(model: str) -> None:
    """The model's own forward on fairchem's batches, with edges that ASE finds where the model makes none."""
    program: Any = import_module("fairchem_models")
    module = getattr(program, f"make_{model}")().eval()

    def own(atoms: Atoms) -> dict[str, Any]:
        whole = boxed(atoms)
        whole.info = dict.fromkeys(("charge", "spin"), 0)
        data = program.atomicdata_list_to_batch([program.unlabelled(whole, edges=model != "esen_own_edges")])
        energy, forces, stress = program.predict(module.model, data)
        return {"energy": energy.detach(), "forces": forces.detach(), "stress": stress.reshape(3, 3).detach()}

    check_calculator(module, own, unknown="Fm", compiles=True, most_misfits=3)  # cells of one atom


def predict_unit(folder: Path) -> Any:
    """Returns what evaluates a file of fairchem's: a small UMA of two tasks, with normalizers and element energies."""
    from fairchem.core.units.mlip_unit.api.inference import InferenceSettings, MLIPInferenceCheckpoint
    from fairchem.core.units.mlip_unit.predict import MLIPPredictUnit
    from hydra.utils import instantiate

    program: Any = import_module("fairchem_models")
    uma, norms = "fairchem.core.models.uma", "fairchem.core.modules.normalization"
    tasks = ["omat", "omol"]
    backbone = program.SMALL | {"num_experts": 4, "use_composition_embedding": True, "use_dataset_embedding": True}
    head = {"head_cls": f"{uma}.escn_md.MLP_EFS_Head", "dataset_names": tasks, "head_kwargs": {"wrap_property": False}}
    config = {
        "_target_": "fairchem.core.models.base.HydraModel",
        "backbone": backbone | {"model": f"{uma}.escn_moe.eSCNMDMoeBackbone", "dataset_list": tasks, "otf_graph": True},
        "heads": {"efs": {"module": f"{uma}.escn_moe.DatasetSpecificSingleHeadWrapper", **head}},
        "pass_through_head_outputs": True,
        "model_id": "UMA-test",
    }
    references = {
        "_target_": f"{norms}.element_references.ElementReferences",
        "element_references": {"_target_": "torch.DoubleTensor", "_args_": [[-0.1 * z for z in range(100)]]},
    }

    def task(name: str, kind: str) -> dict[str, Any]:
        return {
            "_target_": "fairchem.core.units.mlip_unit.mlip_unit.Task",
            "name": f"{name}_{kind}",
            "level": "atom" if kind == "forces" else "system",
            "property": kind,
            "out_spec": {
                "_target_": "fairchem.core.units.mlip_unit.mlip_unit.OutputSpec",
                "dim": [1],
                "dtype": "float64",
            },
            "normalizer": {"_target_": f"{norms}.normalizer.Normalizer", "mean": 0.0, "rmsd": 2.5},
            "datasets": [name],
            "element_references": references if kind == "energy" else None,
        }

    averaged = torch.optim.swa_utils.AveragedModel(program.seeded_model(lambda: instantiate(config)))
    kinds = [task(name, kind) for name in tasks for kind in ("energy", "forces", "stress")]
    torch.save(MLIPInferenceCheckpoint(config, {}, averaged.state_dict(), kinds), folder / "small.pt")
    settings = InferenceSettings(base_precision_dtype=torch.float64, activation_checkpointing=False)
    return MLIPPredictUnit(str(folder / "small.pt"), inference_settings=settings)


class TasksStep(nn.Module):
    """Stands for a LightningModule that trains a UMA on structures of two tasks."""

    def __init__(self, potential: nn.Module) -> None:
        super().__init__()
        self.potential = potential

    def training_step(self, batch: Any) -> Tensor:
        out = self.potential(batch.clone())
        losses = [
            out[f"{name}_{kind}"][kind].square().mean() for name in ("omat", "omol") for kind in ("energy", "forces")
        ]
        return losses[0] + 10 * losses[1] + 2 * losses[2] + 30 * losses[3]


def test_tasks_in_training(tmp_path: Path) -> None:
    """Each structure has the outputs of its own task; indices of tasks do not follow the order of the batches."""
    program: Any = import_module("fairchem_models")

    def batch(*names: str) -> Any:
        structures = [program.unlabelled(crystal() * (1 + i % 2, 1, 1), edges=False) for i in range(len(names))]
        for data, name in zip(structures, names, strict=True):
            data.dataset = [name]
        return program.atomicdata_list_to_batch(structures)

    module = TasksStep(predict_unit(tmp_path).model.module.double().train().requires_grad_(True))
    traced, other = batch("omol", "omat"), batch("omat", "omol", "omol")
    captured = capture_module(module, module.training_step, traced, other, [(0, 1)], None).potential
    assert_parity(captured, module, batch("omol", "omol", "omat", "omol"))


@pytest.mark.parametrize("task", ["omat", "omol"])
def test_calculator_of_the_package(task: str, tmp_path: Path) -> None:
    """The calculator of fairchem, which makes a UMA of several tasks from a file; one of them is compiled too."""
    from fairchem.core import FAIRChemCalculator

    unit = predict_unit(tmp_path)
    model, own = unit.model.module, results_of(FAIRChemCalculator(unit, task_name=task))
    with pytest.raises(ValueError, match=r"task=None; the model has the tasks \['omat', 'omol'\]"):
        JanusPipeCalculator(model)
    own(crystal())  # which puts the model into double precision
    adapter, compiles = FairchemAtomsAdapter(model, task), task == "omol"
    check_calculator(model, own, unknown="Fm", adapter=adapter, compiles=compiles, most_misfits=3)


def test_charge_and_spin(tmp_path: Path) -> None:
    """They are those of the structure, and their change is seen."""
    from fairchem.core import FAIRChemCalculator

    unit = predict_unit(tmp_path)
    atoms, energies = crystal(), []
    for made in (FAIRChemCalculator(unit, task_name="omol"), None):
        atoms.calc = made or JanusPipeCalculator(
            unit.model.module, adapter=FairchemAtomsAdapter(unit.model.module, "omol")
        )
        for charge, spin in ((0, 1), (2, 3)):
            atoms.info = {"charge": charge, "spin": spin}
            energies.append(atoms.get_potential_energy())
    assert abs(energies[0] - energies[1]) > 1e-6
    np.testing.assert_allclose(energies[2:], energies[:2], rtol=0, atol=1e-10)


def test_checkpoint(tmp_path: Path) -> None:
    check_checkpoint("fairchem_models", "make_esen", "crystals", tmp_path)


@pytest.mark.parametrize("model", MODELS)
def test_single_precision(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_single_precision(factory("fairchem_models", f"make_{model}")(), monkeypatch)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("periodic", [True, False])
def test_graph_ranks(pool: RankPool, model: str, periodic: bool) -> None:
    arguments = ("fairchem_models", f"make_{model}", periodic)
    for found in pool.run(calculator_ranks.differences, *arguments, world_size=2, timeout=600):
        calculator_ranks.check(found, periodic)
