"""SchNetPack's own task, data module, callbacks and command line, unmodified, trained in a pipeline.

Slow, and skipped where SchNetPack is absent. It pins an older sympy than torch needs, and so is installed without its
dependencies (see environments.py):

    python tests/clients/environments.py schnetpack --folder FOLDER --run
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data.dataloader as dataloader
from factories import data_of, module_of

from .calculator_checks import check_calculator
from .compare import (
    PROGRAMS,
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

pytestmark = client_marks("schnetpack")

ACCUMULATED = ["--batch-size", "1", "--accumulate", "4"]
MODELS = ["painn", "schnet"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs("schnetpack_program.py", tmp_path_factory.mktemp("schnetpack"))


@pytest.mark.parametrize("model", MODELS)
def test_whole_batches(model: str, run: Runs) -> None:
    """Crystals with stresses and validation: SchNetPack's moving average, its metrics and the best model it saves."""
    common = ["--model", model, "--ema", "--validate"]
    found = run(*common, *pipeline(1))
    assert_same(run(*common), found)
    assert sent_per(found.with_suffix(".log")) == {"atom"}


def test_microbatches_are_accumulation(run: Runs) -> None:
    assert_same(run(*ACCUMULATED), run(*pipeline(4)), losses=False)  # of single structures there, of batches here


GRAPH_RANKS = {f"{size}-graph-ranks": {"graph_size": size, "num_microbatches": 1} for size in (3, 4)}


class TestPaiNN(ClientConformance):
    """Crystals smaller than the cutoff, which no graph rank has as a whole."""

    make_module = module_of("schnetpack_program")
    datamodules = {"crystals": data_of("schnetpack_program")}
    strategies = {**ClientConformance.strategies, **GRAPH_RANKS}


class TestPaiNNWithoutCells(ClientConformance):
    """Also more graph ranks than some structures have atoms."""

    make_module = module_of("schnetpack_program", "--structures", "molecules")
    datamodules = {kind: data_of("schnetpack_program", "--structures", kind) for kind in ("molecules", "lone")}
    strategies = {**ClientConformance.strategies, **GRAPH_RANKS}


class TestPaiNNByInductor(InductorConformance):
    make_module = module_of("schnetpack_program")
    datamodules = {"crystals": data_of("schnetpack_program")}


class TestSchNet(ClientConformance):
    make_module = module_of("schnetpack_program", "--model", "schnet")
    datamodules = {"crystals": data_of("schnetpack_program", "--model", "schnet")}


class TestSchNetWithoutCells(ClientConformance):
    make_module = module_of("schnetpack_program", "--model", "schnet", "--structures", "molecules")
    datamodules = {
        kind: data_of("schnetpack_program", "--model", "schnet", "--structures", kind) for kind in ("molecules", "lone")
    }


class TestBatchesOfOne(ClientConformance):
    make_module = module_of("schnetpack_program", "--structures", "molecules")
    datamodules = {"molecules": data_of("schnetpack_program", "--structures", "molecules", "--batch-size", "1")}
    strategies = TWO_STAGES


@pytest.mark.parametrize(("devices", "pipeline_size"), [(4, 1), (8, 2)])
def test_graph_ranks_and_replicas(devices: int, pipeline_size: int, run: Runs) -> None:
    """As two replicas that each train their whole batches in one process."""
    common = ["--structures", "crystals"]
    sizes = f'"pipeline_size": {pipeline_size}, "data_size": 2, "graph_size": 2'
    found = run(*common, "--devices", str(devices), "--janus", f'{{"num_microbatches": 1, {sizes}}}')
    whole = '{"num_microbatches": 1, "pipeline_size": 1, "data_size": 2}'
    assert_same(run(*common, "--devices", "2", "--janus", whole), found)


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "painn", "--options", '{"shared_filters": true}'],
        ["--model", "schnet", "--options", '{"shared_interactions": true}'],
    ],
)
def test_three_ranks(options: list[str], run: Runs) -> None:
    """Ranks that share parameters."""
    common = ["--layers", "4", *options]
    found = run(*common, *pipeline(1, devices=3))
    assert_same(run(*common), found)
    assert sent_per(found.with_suffix(".log")) == {"atom"}


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``spktrain`` with the recipe in float64, for an epoch in random order, and the test after it."""
    monkeypatch.setattr(dataloader, "T_co", getattr(dataloader, "_T_co", None), raising=False)  # to read checkpoints
    execute([sys.executable, str(ROOT / "recipes" / "alloys.py"), "alloys.db"], tmp_path, "alloys")
    split = tmp_path / "split.npz"
    indices = np.random.default_rng(0).permutation(100)
    np.savez(split, train_idx=indices[:80], val_idx=indices[80:90], test_idx=indices[90:])
    # The order has a generator of its own: Lightning seeds the common one again where it has started processes.
    kinds = {
        "plain": ["trainer.devices=1", "trainer.strategy=auto"],
        "pipeline": ["trainer.strategy.num_microbatches=1"],
    }
    double = "data.transforms.2._target_=schnetpack.transform.CastTo64"
    for kind, options in kinds.items():
        command = [str(Path(sys.executable).parent / "spktrain"), "--config-dir", str(ROOT), "+recipes=schnetpack"]
        common = [f"run.id={kind}", "trainer.max_epochs=1", "trainer.precision=64", double]
        common += ["+model.input_dtype_str=float64", "+trainer.use_distributed_sampler=false"]
        common += [f"+data.split_file={split}", "data.train_sampler_cls=torch.utils.data.RandomSampler"]
        common += ["+data.train_sampler_args={generator: {_target_: torch.Generator}}", "+data._convert_=all"]
        # SchNetPack 2.1.1 asks for what torch 2.5 and 2.6 changed.
        compatible = {"path": PROGRAMS / "compatible", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
        log = execute([*command, *common, *options], tmp_path, kind, **compatible)
        assert "test_forces_mae" in log and "Best model stored" in log
    folders = {kind: tmp_path / "runs" / kind / "checkpoints" / "last.ckpt" for kind in kinds}
    assert_same(summary(folders["plain"]), summary(folders["pipeline"]))
    assert sent_per(tmp_path / "pipeline.log") == {"atom"}


@pytest.mark.parametrize("model", MODELS)
def test_calculator(model: str) -> None:
    """Elements are not checked: SchNetPack's embeddings have rows for all of them."""
    module = module_of("schnetpack_program", "--model", model)()
    from schnetpack.interfaces.ase_interface import AtomsConverter
    from schnetpack.transform import ASENeighborList

    converter = AtomsConverter(ASENeighborList(cutoff=4.0), dtype=torch.float64)

    def own(atoms: Any) -> dict[str, Any]:
        found = {name: value.detach().numpy() for name, value in module.model(converter(atoms)).items()}
        return {**found, "stress": found["stress"].reshape(3, 3)}

    module.eval()
    check_calculator(module, own, unknown=None, compiles=True)
