"""How ranks are started, and what the Trainer's options do to loops and loaders: as in plain Lightning."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import launching_workers as workers
import lightning
import pytest
from logging_workers import DDP, check
from pools import slow

import lightning_januspipe
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.testing import RankPool, reserved_port

PIPELINE: dict[str, Any] = {"num_microbatches": 1, "schedule": "wavek"}
REPLICAS: dict[str, Any] = {"pipeline_size": 1, "data_size": 2, "num_microbatches": 1}

# -- options of the Trainer ------------------------------------------------------------------------------------------

STEPS = {
    "fast_dev_run": 1, "fast_dev_run=2": 2, "limits": 4, "parts": 4, "overfit": 3, "overfit a part": 4, "sanity": 4,
    "all sanity": 4, "every second epoch": 16, "every second batch": 8, "every half epoch": 4,
    "every third batch of all": 8, "max_time": 5, "max_steps": 5, "min_steps": 7, "reload": 12, "barebones": 8,
    "accumulate": 4, "anomaly": 4,
}  # fmt: skip


@pytest.mark.parametrize("world", [1, 2])
def test_options_of_the_trainer(pool: RankPool, tmp_path: Path, world: int) -> None:
    """Steps, validations, the samples of each batch, logged values and parameters are those of plain Lightning."""
    names = list(STEPS) if world == 2 else ["fast_dev_run", "parts", "sanity", "every second batch", "barebones"]
    (expected,) = pool.run(workers.fit_with_options, None, names, str(tmp_path), world_size=1)
    assert {name: expected[name]["steps"] for name in names} == {name: STEPS[name] for name in names}
    if world == 2:
        assert expected["sanity"]["counts"]["sanity"] == 2 and expected["all sanity"]["counts"]["sanity"] == 3
        assert expected["every second batch"]["counts"]["validations"] == 4 and expected["reload"]["asked"] == 3
    for rank, found in enumerate(pool.run(workers.fit_with_options, PIPELINE, names, str(tmp_path), world_size=world)):
        check(expected, found, f"rank {rank}")
    assert not list(tmp_path.iterdir()), "fast_dev_run wrote files"


def test_options_in_the_other_lightning(pool: RankPool, tmp_path: Path) -> None:
    pytest.importorskip("pytorch_lightning")
    arguments = (["fast_dev_run", "fast_dev_run=2", "sanity", "barebones"], str(tmp_path), "pytorch_lightning")
    (expected,) = pool.run(workers.fit_with_options, None, *arguments, world_size=1)
    for found in pool.run(workers.fit_with_options, PIPELINE, *arguments, world_size=2):
        check(expected, found)


# -- seeds and samplers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, slow(1)])
def test_seeded_workers(pool: RankPool, num_workers: int) -> None:
    """Workers of the ranks of one pipeline draw alike; those of replicas draw what they draw under DDP."""
    ddp = pool.run(workers.seeded_workers, DDP, num_workers, world_size=2)
    if num_workers:
        first, second = ({x % 1 for batch in seen["seen"] for x in batch} for seen in ddp)
        assert not first & second
    assert pool.run(workers.seeded_workers, REPLICAS, num_workers, world_size=2) == ddp
    mesh = pool.run(workers.seeded_workers, {**REPLICAS, "pipeline_size": 2}, num_workers, world_size=4)
    assert mesh[0] == mesh[2] and mesh[1] == mesh[3]
    if num_workers:  # without workers samples are made with the numbers of this process, of which a step takes some
        assert [r["seen"] for r in mesh[:2]] == [r["seen"] for r in ddp]


@pytest.mark.parametrize("how", ["shuffled", "batch sampler"])
def test_samplers(pool: RankPool, how: str) -> None:
    """By replica: DDP's share with ``use_distributed_sampler``, and without it what the same seed gives every rank.

    In a pipeline each step takes a random number, so that the latter are others than DDP's from the second epoch on.
    """
    for distributed, world in itertools.product([True, False], [1, 2]):
        # In one process no sampler is replaced: as in plain Lightning, and other than in DDP.
        expected = pool.run(workers.sampled, DDP, how, distributed and world > 1, world_size=world)
        assert len({x for seen in expected for batch in seen for x in batch}) == 16
        found = {
            "pipeline": pool.run(workers.sampled, PIPELINE, how, distributed, world_size=world),
            "replicas": pool.run(workers.sampled, REPLICAS, how, distributed, world_size=2) if world == 2 else expected,
        }
        assert found["replicas"] == expected
        assert all(rank == found["pipeline"][0] for rank in found["pipeline"])
        epochs = found["pipeline"][0][:4], found["pipeline"][0][4:]
        assert all(len({x for batch in epoch for x in batch}) == 16 for epoch in epochs), "samples are missing"
        assert epochs[0] != epochs[1], "the epochs are shuffled alike"
        if world == 1:
            assert found["pipeline"] == expected
        elif not distributed:
            assert epochs[0] == expected[0][:4]


# -- launchers -------------------------------------------------------------------------------------------------------

SLURM = {
    "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "20001", "SLURM_NODELIST": "localhost", "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_LOCALID": "0",
}  # fmt: skip


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1")


def started(
    folder: Path,
    sizes: dict[str, int],
    strategy: dict[str, Any],
    environments: list[dict[str, str]],
    launcher: Sequence[str],
    port: int,
) -> list[dict[str, Any]]:
    """Starts a process for each environment, and returns what each rank has written.

    Args:
        folder: Where ranks write.
        sizes: Arguments of the Trainer.
        strategy: Arguments of the strategy.
        environments: Variables of each process.
        launcher: What Python runs, to run the script.
        port: The port of the ranks' store.
    """
    here = Path(__file__).parents[1]
    paths = os.pathsep.join([str(here / "support"), str(here.parent), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", *launcher, str(here / "support" / "launching_workers.py"), str(folder)]
    command += [json.dumps(sizes), json.dumps(strategy)]
    common = {**os.environ, "PYTHONPATH": paths, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    logs = [folder / f"log-{i}" for i in range(len(environments))]
    processes = [
        subprocess.Popen(command, env={**common, **own}, stdout=log.open("w"), stderr=subprocess.STDOUT)
        for own, log in zip(environments, logs, strict=True)
    ]
    try:
        codes = [p.wait(250) for p in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * len(codes), "\n".join(log.read_text()[-2000:] for log in logs)
    files = sorted(folder.glob("[0-9]*.json"), key=lambda f: int(f.stem))
    return [json.loads(f.read_text()) for f in files]


@pytest.mark.parametrize("launcher", [slow("slurm"), slow("nodes"), "torchrun"])
def test_launchers(pool: RankPool, tmp_path: Path, launcher: str) -> None:
    """Tasks of srun on two machines; a script on each of two, which starts a second process; torchrun on one.

    Ranks have the script's precision of matrix products, also where the Trainer has started them.
    """
    strategy: dict[str, Any] = PIPELINE
    sizes = {"devices": 1, "num_nodes": 2}
    environments = [{**SLURM, "SLURM_PROCID": i, "SLURM_NODEID": i} for i in "01"]
    if launcher == "nodes":
        sizes["devices"], environments = 2, [{"NODE_RANK": i} for i in "01"]
        strategy = {**PIPELINE, "pipeline_size": 2, "data_size": 2}  # the replicas see the same
    elif launcher == "torchrun":
        sizes, environments = {"devices": 2, "num_nodes": 1}, [{}]
    with reserved_port() as port:
        run = (*TORCHRUN, f"--master-port={port}") if launcher == "torchrun" else ()
        ranks = started(tmp_path, sizes, strategy, environments, run, port)
    of_node, num_nodes = sizes["devices"], sizes["num_nodes"]
    assert [r["rank"] for r in ranks] == [[i, i % of_node, i // of_node, num_nodes] for i in range(num_nodes * of_node)]
    (expected,) = pool.run(workers.fit_in_order, world_size=1)
    for found in ranks:
        assert found["precision"] == ["medium", True]
        check(expected, {k: v for k, v in found.items() if k not in ("rank", "precision")})


def test_sizes_that_fit() -> None:
    """No process is started to find out."""

    def shape(**arguments: Any) -> MeshShape:
        arguments = {"strategy": "januspipe", **arguments}
        return lightning.Trainer(accelerator="cpu", logger=False, **arguments).strategy.mesh_shape  # type: ignore[no-any-return]

    assert shape(devices=1) == shape(devices="auto") == MeshShape(1, 1)
    assert shape(devices=2, num_nodes=2) == MeshShape(4, 1)
    both = lightning_januspipe.JanusPipeStrategy(pipeline_size=2, data_size="auto")
    assert shape(devices=4, num_nodes=2, strategy=both) == MeshShape(2, 4)


@pytest.mark.parametrize(
    ("devices", "num_nodes", "strategy", "message"),
    [
        (3, 1, {"pipeline_size": 2}, r"= 2 × 1 × 1 = 2, but there are 3 processes"),
        (2, 1, {"pipeline_size": 2, "data_size": 2}, r"= 2 × 2 × 1 = 4, but there are 2 processes"),
        (2, 2, {"pipeline_size": 3}, r"= 3 × 1 × 1 = 3, but there are 4 processes"),
        ("auto", 1, {"data_size": 2}, r"= 1 × 2 × 1 = 2, but there are 1 processes"),
    ],
)
def test_sizes_that_do_not_fit(devices: Any, num_nodes: int, strategy: dict[str, Any], message: str) -> None:
    """The Trainer refuses them, before any process waits for another."""
    with pytest.raises(ValueError, match=message):
        lightning.Trainer(
            accelerator="cpu",
            devices=devices,
            num_nodes=num_nodes,
            strategy=lightning_januspipe.JanusPipeStrategy(**strategy),
        )


TORCHELASTIC = {
    "TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0",
    "GROUP_RANK": "0",
}  # fmt: skip


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"},
            "SLURM_NTASKS=2, but .* needs 4 tasks.*--ntasks-per-node=2",
        ),
        (TORCHELASTIC, ""),
        ({**TORCHELASTIC, "WORLD_SIZE": "8"}, r"(?s)product.*does not match the world size \(8\)"),
    ],
    ids=["slurm", "torchrun", "torchrun with more"],
)
def test_processes_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], message: str) -> None:
    """Others than the Trainer's were started from outside."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def make() -> Any:
        return lightning.Trainer(accelerator="cpu", devices=2, num_nodes=2, strategy="januspipe", logger=False)

    if environment is TORCHELASTIC:
        assert make().strategy.mesh_shape == MeshShape(4, 1)
    else:
        with pytest.raises(ValueError, match=message):
            make()
