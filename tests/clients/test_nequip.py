"""NequIP's own LightningModules, data module and command line, unmodified, trained in a pipeline.

Slow, and skipped where NequIP is absent:

    pip install nequip==0.19.1 && python -m pytest -m slow tests/clients/test_nequip.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ase.stress import voigt_6_to_full_3x3_stress
from factories import data_of, module_of

from .calculator_checks import check_calculator
from .compare import (
    ROOT,
    TWO_STAGES,
    ClientConformance,
    InductorConformance,
    Runs,
    assert_same,
    client_marks,
    execute,
    pipeline,
    sent_per,
    summary,
)

pytestmark = client_marks("nequip")

ACCUMULATED = ["--batch-size", "1", "--accumulate", "4"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs("nequip_program.py", tmp_path_factory.mktemp("nequip"))


def assert_same_averages(reference: Path, found: Path) -> None:
    """NequIP's moving averages are buffers of the state dict, and their number of updates is beside them."""
    first, second = (torch.load(p, weights_only=False) for p in (reference, found))
    assert any(name.startswith("ema.ema_weight") for name in first["state"])
    assert first["ema"] == second["ema"] is not None


def test_whole_batches(run: Runs) -> None:
    """Crystals with stresses and metrics of a moving average."""
    options = ["--ema", "--validate"]
    reference, found = run(*options), run(*options, *pipeline(1))
    assert_same(reference, found)
    assert sent_per(found.with_suffix(".log")) == {"atom"}
    assert_same_averages(reference, found)


def test_microbatches_are_accumulation(run: Runs) -> None:
    reference, found = run("--ema", *ACCUMULATED), run("--ema", *pipeline(4))
    assert_same(reference, found, losses=False)  # those of single structures there, of batches here
    assert_same_averages(reference, found)


MORE_GRAPH_RANKS = {f"{size}-graph-ranks": {"graph_size": size, "num_microbatches": 1} for size in (3, 4)}


class TestCrystals(ClientConformance):
    """Crystals smaller than the cutoff, which no graph rank has as a whole."""

    make_module = module_of("nequip_program", "--layers", "4")
    datamodules = {"crystals": data_of("nequip_program")}
    strategies = {**ClientConformance.strategies, **MORE_GRAPH_RANKS}


class TestCrystalsByInductor(InductorConformance):
    make_module = module_of("nequip_program")
    datamodules = {"crystals": data_of("nequip_program")}


class TestWithoutCells(ClientConformance):
    """Also more graph ranks than some structures have atoms."""

    make_module = module_of("nequip_program", "--layers", "4", "--structures", "molecules")
    datamodules = {kind: data_of("nequip_program", "--structures", kind) for kind in ("molecules", "lone")}
    strategies = {**ClientConformance.strategies, **MORE_GRAPH_RANKS}


class TestBatchesOfOne(ClientConformance):
    make_module = module_of("nequip_program", "--structures", "molecules")
    datamodules = {"molecules": data_of("nequip_program", "--structures", "molecules", "--batch-size", "1")}
    strategies = TWO_STAGES


@pytest.mark.parametrize(("devices", "pipeline_size"), [(4, 1), (8, 2)])
def test_graph_ranks_and_replicas(devices: int, pipeline_size: int, run: Runs) -> None:
    """As two replicas that each train their whole batches in one process."""
    common = ["--layers", "4"]
    sizes = f'"pipeline_size": {pipeline_size}, "data_size": 2, "graph_size": 2'
    found = run(*common, "--devices", str(devices), "--janus", f'{{"num_microbatches": 1, {sizes}}}')
    whole = '{"num_microbatches": 1, "pipeline_size": 1, "data_size": 2}'
    assert_same(run(*common, "--devices", "2", "--janus", whole), found)


def test_three_ranks_go_on_from_a_checkpoint(run: Runs) -> None:
    """A run of two epochs, and one that stops after the first and goes on."""
    common = ["--layers", "4", "--ema"]
    first = run(*common, *pipeline(1, devices=3))
    checkpoint = first.with_name(f"{first.stem}-epoch=0.ckpt")
    found = run(*common, *pipeline(1, devices=3), "--epochs", "2", "--resume", str(checkpoint))
    reference = run(*common, "--epochs", "2")
    assert_same(reference, found, losses=False)  # it has those of the second epoch only
    assert_same_averages(reference, found)
    assert sent_per(found.with_suffix(".log")) == {"atom"}


def test_models_that_compile_themselves(run: Runs) -> None:
    """Compiled by no rank, also not for the validation before training; the reference is the model as it is."""
    assert_same(run("--ema", "--validate"), run("--ema", "--validate", "--compile-mode", "compile", *pipeline(1)))


def test_command_line(tmp_path: Path) -> None:
    """``nequip-train`` with the recipe, for an epoch of structures in random order."""
    programs = Path(sys.executable).parent
    execute([sys.executable, str(ROOT / "recipes" / "alloys.py"), "alloys.extxyz"], tmp_path, "alloys")
    kinds = {
        "plain": ["trainer.devices=1", "trainer.strategy=auto"],
        "pipeline": ["trainer.strategy.num_microbatches=1"],
    }
    found = {}
    for kind, options in kinds.items():
        common = ["trainer.max_epochs=1", "+trainer.use_distributed_sampler=false"]
        common.append(f"trainer.callbacks.0.dirpath={tmp_path / kind}")
        command = [str(programs / "nequip-train"), "-cp", str(ROOT / "recipes"), "-cn", "nequip"]
        execute([*command, *common, *options], tmp_path, kind)
        found[kind] = summary(tmp_path / kind / "last.ckpt")
    assert_same(found["plain"], found["pipeline"])
    assert sent_per(tmp_path / "pipeline.log") == {"atom"}


@pytest.mark.parametrize("ema", [False, True])
def test_calculator(ema: bool) -> None:
    from nequip.data.transforms import ChemicalSpeciesToAtomTypeMapper, NeighborListTransform
    from nequip.integrations.ase import NequIPCalculator

    before = torch.get_default_dtype()
    try:
        module = module_of("nequip_program", *(["--ema"] if ema else []))()
        (model,) = [part for part in module.modules() if getattr(part, "is_graph_model", False)]
        transforms = [ChemicalSpeciesToAtomTypeMapper(["Al", "Cu", "Ni"]), NeighborListTransform(4.0)]
        other = NequIPCalculator(model.eval(), "cpu", transforms=transforms)

        def own(atoms: Any) -> dict[str, Any]:
            other.calculate(atoms)
            stress = voigt_6_to_full_3x3_stress(other.results["stress"]) if atoms.pbc.all() else None
            return {**other.results, "stress": stress}

        check_calculator(module, own, compiles=True)
    finally:
        torch.set_default_dtype(before)
