"""Training that is saved, interrupted and resumed, in files and in folders, on the same mesh and on others."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import checkpoint_workers as workers
import pytest
import torch
from compiled_workers import train_and_save_changing_over
from pools import pool_of, slow

from lightning_januspipe.checkpoint.sharded import consolidate, is_folder, read_folder
from lightning_januspipe.cli.consolidate import main
from lightning_januspipe.testing import RankError, RankPool

FOLDERS = {"save_distributed_checkpoint": True}
# With two stages on a rank, if that is faster.
CHUNKS = {"schedule": "wavek-zb"}


def same(expected: dict[str, Any], found: dict[str, Any], what: str = "") -> None:
    """Two modules' states are the same to 1e-9."""
    assert expected.keys() == found.keys(), what
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{what} {n}: {m}"
        )


@pytest.fixture(scope="module")
def uninterrupted(pool: RankPool, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Eight steps, two epochs, of plain Lightning in one process."""
    (found,) = pool.run(workers.train, None, str(tmp_path_factory.mktemp("reference")), world_size=1)
    return found


@pytest.fixture
def fragile() -> Iterator[RankPool]:
    """Processes of a test that kills them."""
    with pool_of(1) as ranks:
        yield ranks


MESHES = {
    "2x1 to 1x2": (({}, 2), ({"pipeline_size": 1, "data_size": 2}, 2)),
    "4x1 to 2x2": ((CHUNKS, 4), (CHUNKS | {"pipeline_size": 2, "data_size": 2}, 4)),
    "1 to 3x1": ((None, 1), ({}, 3)),
}


def interrupt_and_resume(
    pool: RankPool, expected: dict[str, Any], folder: Path, how: str, rank: int | None, meshes: str, **more: Any
) -> None:
    """End a run at a random step, resume it on another mesh from "last", and compare."""
    (before, num_before), (after, num_after) = MESHES[meshes]
    # What plain Lightning saves at a signal in the last batch of an epoch lacks the schedule's step at its end.
    steps = [2, 3, 5] if before is None and how == "sigterm" else [2, 3, 4, 5]
    step = random.SystemRandom().choice(steps)
    what = f"{how} after step {step}, {meshes}"
    saving = ("every step", "on exception")
    if before is not None:
        before, after = before | more, after | more
    stopped = {"stop": (how, step, rank), "callbacks": saving}
    ended: list[dict[str, Any]] = []
    try:
        ended = pool.run(workers.train, before, str(folder), stopped, world_size=num_before, timeout=120)
    except RankError as error:
        assert how == "sigkill" and f"rank {rank} died" in str(error), what
    if how == "exception":
        assert "RuntimeError: a callback has failed" in ended[rank or 0]["ended"]
    if how == "sigterm":
        # Every rank has ended after the same batch: that of the signal, or the next that does not end an epoch.
        assert [e["ended"] for e in ended] == ["SIGTERMException: "] * num_before, what
        assert {e["step"] for e in ended} in ({step}, {step + 1}, {step + 2}), what
    resumed = {"resume": "last", "callbacks": saving}
    for found in pool.run(workers.train, after, str(folder), resumed, world_size=num_after, timeout=120):
        assert found["ended"] == "" and found["step"] == 8 and found["resumed"].startswith(str(folder)), what
        same(expected["state"], found["state"], what)


def test_exception_on_one_rank(pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    """The others do not wait for it, no checkpoint is saved then, and the last one in training is found."""
    interrupt_and_resume(pool, uninterrupted, tmp_path, "exception", 1, "2x1 to 1x2")


def test_sigterm_on_one_rank(pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    interrupt_and_resume(pool, uninterrupted, tmp_path, "sigterm", 2, "4x1 to 2x2", **FOLDERS)


def test_sigkill(pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path) -> None:
    with pool_of(2) as ranks, pytest.raises(RankError, match="rank 1 died"):
        ranks.run(workers.train, {}, str(tmp_path), {"stop": ("sigkill", 3, 1)}, world_size=2, timeout=120)
    for found in pool.run(workers.train, {}, str(tmp_path), {"resume": "last"}, world_size=3):
        same(uninterrupted["state"], found["state"])


@pytest.mark.slow
def test_compiled_phases_take_over_in_a_resumed_run_too(
    pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    train, auto = train_and_save_changing_over, {"compile": "auto"}
    stopped = {"stop": ("exception", 5, None), "callbacks": ("every step",)}
    for found in pool.run(train, auto, str(tmp_path), stopped, world_size=2):
        assert "a callback has failed" in found["ended"]
    on_replicas = {**auto, "pipeline_size": 1, "data_size": 2}
    for found in pool.run(train, on_replicas, str(tmp_path), {"resume": "last"}, world_size=2):
        assert found["step"] == 8
        same(uninterrupted["state"], found["state"])


@pytest.mark.slow
@pytest.mark.parametrize("saves", [{}, FOLDERS], ids=["files", "folders"])
@pytest.mark.parametrize("meshes", MESHES)
@pytest.mark.parametrize(
    ("how", "rank"), [("exception", None), ("exception", 0), ("sigterm", 0), ("sigterm", None), ("sigkill", 0)]
)
def test_interrupted(
    uninterrupted: dict[str, Any], tmp_path: Path, how: str, rank: int | None, meshes: str, saves: dict[str, Any]
) -> None:
    with pool_of(4) as ranks:
        interrupt_and_resume(ranks, uninterrupted, tmp_path, how, rank, meshes, **saves)


@pytest.mark.parametrize("saves", [{}, FOLDERS], ids=["file", "folder"])
def test_killed_while_saving(
    fragile: RankPool, pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path, saves: dict[str, Any]
) -> None:
    """What was saved before is whole and is found, what is left of the new one is not."""
    with pytest.raises(RankError, match="died"):
        fragile.run(workers.killed_in_saving, saves, str(tmp_path), 4, world_size=1)
    hidden = [name for name in workers.names(tmp_path) if name.startswith(".januspipe-")]
    assert len(hidden) == 1 and set(workers.names(tmp_path)) == {"last.ckpt", "step=3.ckpt", *hidden}
    (found,) = pool.run(workers.train, saves, str(tmp_path), {"resume": "last"}, world_size=1)
    assert found["resumed"] == str(tmp_path / "last.ckpt")
    same(uninterrupted["state"], found["state"])


@pytest.mark.parametrize(("saves", "rank"), [slow({}, 0), (FOLDERS, 1)], ids=["file", "folder"])
def test_a_full_disk_and_a_damaged_checkpoint(pool: RankPool, tmp_path: Path, saves: dict[str, Any], rank: int) -> None:
    """If one rank cannot write, all end with one error, and the checkpoint before is whole. Then that is damaged."""
    for found in pool.run(workers.train, saves, str(tmp_path), {"stop": ("full disk", 3, rank)}, world_size=2):
        assert found["ended"] == (
            f"CheckpointError: {tmp_path}/step=3.ckpt could not be saved: File too large. What was saved before is "
            "unchanged."
        )
    assert workers.names(tmp_path) == ["last.ckpt", "step=2.ckpt"]
    last = tmp_path / "last.ckpt"
    part = max(last.glob("*.distcp"), key=lambda p: p.stat().st_size) if saves else last
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    ended = {
        found["ended"] for found in pool.run(workers.train, saves, str(tmp_path), {"resume": "last"}, world_size=2)
    }
    assert len(ended) == 1 and f"CheckpointError: the checkpoint {last} is damaged: the checksum of" in ended.pop()


def test_exception_on_all_ranks_is_saved(pool: RankPool, tmp_path: Path) -> None:
    """All have ended at the same place, so the checkpoint of ``save_on_exception`` is gathered."""
    more = {"stop": ("exception", 4, None), "callbacks": ("last on exception",)}
    for found in pool.run(workers.train, {}, str(tmp_path), more, world_size=2, timeout=120):
        assert "a callback has failed" in found["ended"] and not found["warnings"]
    assert workers.names(tmp_path) == ["last.ckpt -> step=4.ckpt", "step=3.ckpt", "step=4.ckpt"]
    saved = torch.load(tmp_path / "step=4.ckpt")
    assert saved["global_step"] == 4 and saved["optimizer_states"][0]["state"]


def test_folders_and_averages(pool: RankPool, tmp_path: Path) -> None:
    """A folder written in the middle of an epoch by two ranks goes on in one process, and as one file."""
    averaged = ("every step", "average")
    (expected,) = pool.run(workers.train, None, str(tmp_path / "one"), {"callbacks": averaged}, world_size=1)
    more = {"num_steps": 3, "callbacks": averaged}
    pool.run(workers.train, FOLDERS, str(tmp_path / "two"), more, world_size=2)
    folder, file = tmp_path / "two" / "last.ckpt", tmp_path / "file.ckpt"
    assert is_folder(folder) and len(list(folder.glob("*.distcp"))) == 2
    main([str(folder), str(file)])
    resumed = {"resume": str(folder), "callbacks": averaged}
    (found,) = pool.run(workers.train, {}, str(tmp_path / "three"), resumed, world_size=1)
    same(expected["state"], found["state"], "from the folder")

    # The file is what plain Lightning would have saved after the same steps.
    (_,) = pool.run(workers.train, None, str(tmp_path / "plain"), more, world_size=1)
    plain, ours = (torch.load(f, weights_only=True) for f in (tmp_path / "plain" / "last.ckpt", file))
    assert ours.keys() == plain.keys() | {"januspipe"}
    for name in ("state_dict", "current_model_state", "averaging_state"):
        same(plain[name], ours[name], name)
    assert plain["optimizer_states"][0]["param_groups"] == ours["optimizer_states"][0]["param_groups"]
    for i, state in plain["optimizer_states"][0]["state"].items():
        same(state, ours["optimizer_states"][0]["state"][i], f"optimizer {i}")
    for name in ("loops", "lr_schedulers", "global_step", "epoch", "hyper_parameters"):
        assert plain.get(name) == ours.get(name)


def test_folders_are_those_that_lightning_consolidates(pool: RankPool, tmp_path: Path) -> None:
    from lightning.fabric.utilities.load import _load_distributed_checkpoint
    from lightning.pytorch.utilities.consolidate_checkpoint import _format_checkpoint

    pool.run(workers.train, FOLDERS, str(tmp_path), {"num_steps": 1}, world_size=2)
    theirs = _format_checkpoint(_load_distributed_checkpoint(tmp_path / "last.ckpt"))
    ours = read_folder(tmp_path / "last.ckpt")
    assert theirs.keys() == ours.keys()
    same(ours["state_dict"], theirs["state_dict"])
    state = ours["optimizer_states"][0]
    names = set(state["param_groups"][0]["params"])
    assert set(state["state"]) == names and names < set(ours["state_dict"]) and "potential" in min(names)


def test_files_of_model_checkpoint(pool: RankPool, tmp_path: Path) -> None:
    """Best, last as a link, and the removal of those before: as plain Lightning, for files and for folders."""
    more = {"num_steps": 6, "callbacks": ("two best",)}
    pool.run(workers.train, None, str(tmp_path / "plain"), more, world_size=1)
    expected = workers.names(tmp_path / "plain")
    assert len(expected) == 3 and "->" in expected[0]
    for name, saves in (("files", {}), ("folders", FOLDERS)):
        pool.run(workers.train, saves, str(tmp_path / name), more, world_size=2)
        assert workers.names(tmp_path / name) == expected
        assert all(p.is_dir() == (saves is FOLDERS) for p in (tmp_path / name).iterdir())


def test_weights_only(pool: RankPool, tmp_path: Path) -> None:
    more = {"num_steps": 4, "callbacks": ("weights",)}
    for name, saves in (("file", {}), ("folder", FOLDERS)):
        pool.run(workers.train, saves, str(tmp_path / name), more, world_size=2)
    consolidate(tmp_path / "folder" / "step=4.ckpt", tmp_path / "one.ckpt")
    files = [tmp_path / "file" / "step=4.ckpt", tmp_path / "one.ckpt"]
    for file in files:
        saved = torch.load(file, weights_only=True)
        assert "optimizer_states" not in saved and "januspipe" not in saved and "callbacks" not in saved
    (expected,) = pool.run(workers.evaluate, None, str(files[0]), True, world_size=1)
    for strategy, path in (({}, files[1]), ({}, tmp_path / "folder" / "step=4.ckpt")):
        (found,) = pool.run(workers.evaluate, strategy, str(path), True, world_size=1)
        assert found[0]["val_loss"] == pytest.approx(expected[0]["val_loss"], rel=1e-9)


@pytest.mark.parametrize(("strategy", "num"), [({}, 1), slow(FOLDERS, 2)], ids=["one process", "2x1"])
@pytest.mark.parametrize("step", [2, 4], ids=["in the epoch", "at its end"])
def test_random_numbers(pool: RankPool, tmp_path: Path, strategy: dict[str, Any], num: int, step: int) -> None:
    """Shuffling, and random numbers of all kinds in callbacks, go on as if nothing had happened."""
    more = {"callbacks": ("every step", "noise"), "shuffle": True}
    expected = pool.run(workers.train, strategy, str(tmp_path / "one"), more, world_size=num)
    pool.run(workers.train, strategy, str(tmp_path / "two"), more | {"num_steps": step}, world_size=num)
    resumed = more | {"resume": str(tmp_path / "two" / "last.ckpt")}
    for a, b in zip(expected, pool.run(workers.train, strategy, str(tmp_path), resumed, world_size=num), strict=True):
        same(a["state"], b["state"])


@pytest.mark.parametrize(
    ("before", "step", "saves"),
    [
        (None, 6, "every epoch"),
        *(
            slow(before, step, saves)
            for before in (None, {})
            for step, saves in [(3, "at the end"), (4, "at the end"), (6, "every epoch")]
            if (before, step) != (None, 6)
        ),
    ],
)
def test_epochs_that_a_number_of_steps_has_ended(
    pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path, before: Any, step: int, saves: str
) -> None:
    """Lightning counts such an epoch as done, but it goes on, so that the last epoch ends after the same steps."""
    pool.run(workers.train, before, str(tmp_path), {"num_steps": step, "callbacks": (saves,)}, world_size=1)
    more = {"num_steps": -1, "arguments": {"max_epochs": 2}, "resume": str(tmp_path / "end.ckpt"), "callbacks": ()}
    for found in pool.run(workers.train, {}, str(tmp_path), more, world_size=2):
        assert found["ended"] == "" and found["step"] == 8
        same(uninterrupted["state"], found["state"])


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_that_is_trained_stays_in_the_file(
    pool: RankPool, uninterrupted: dict[str, Any], tmp_path: Path, size: int
) -> None:
    """The file is written over in place before the first optimizer step of the run that goes on from it."""
    pool.run(workers.train, None, str(tmp_path), {"num_steps": 4}, world_size=1)
    file = tmp_path / "last.ckpt"
    more = {"resume": str(file), "callbacks": ("written over",)}
    for found in pool.run(workers.train, {}, str(tmp_path / "on"), more, world_size=size):
        assert found["ended"] == "" and not any(file.read_bytes())
        same(uninterrupted["state"], found["state"])


def test_parameters_of_other_stages_leave_memory(pool: RankPool, tmp_path: Path) -> None:
    """Where the module is made in ``configure_model``; the trained module and its checkpoints are the same."""
    more: dict[str, Any] = {"num_features": 16, "num_steps": 6}
    more["arguments"] = {"limit_val_batches": 1, "num_sanity_val_steps": 1, "val_check_interval": 3}
    (expected,) = pool.run(workers.train, None, str(tmp_path / "one"), more, world_size=1)
    whole, moments = expected["bytes"]
    for name, saves in (("files", {}), ("folders", FOLDERS)):
        ranks = pool.run(workers.train, saves | CHUNKS, str(tmp_path / name), more, world_size=2)
        for found in ranks:
            assert found["ended"] == ""
            assert 0 < found["bytes"][0] < 0.75 * whole and found["bytes"][1] < 0.75 * moments
            assert found["metrics"]["val_loss"] == pytest.approx(expected["metrics"]["val_loss"], rel=1e-9)
            same(expected["state"], found["state"], name)
        assert sum(r["bytes"][0] for r in ranks) < 1.05 * whole
    consolidate(tmp_path / "folders" / "last.ckpt", tmp_path / "folders.ckpt")
    for file in (tmp_path / "files" / "last.ckpt", tmp_path / "folders.ckpt"):
        plain, ours = (torch.load(f) for f in (tmp_path / "one" / "last.ckpt", file))
        same(plain["state_dict"], ours["state_dict"])
        for i, state in plain["optimizer_states"][0]["state"].items():
            same(state, ours["optimizer_states"][0]["state"][i])


def test_parameters_of_some_ranks_are_up_to_date_on_all(pool: RankPool, tmp_path: Path) -> None:
    """Weights that two of four ranks train, not the first, which writes the file."""
    more: dict[str, Any] = {"num_features": 8, "tied": True, "num_steps": 3}
    (expected,) = pool.run(workers.train, None, str(tmp_path / "one"), more, world_size=1)
    for found in pool.run(workers.train, {}, str(tmp_path / "four"), more, world_size=4):
        same(expected["state"], found["state"])
    plain, ours = (torch.load(tmp_path / name / "last.ckpt") for name in ("one", "four"))
    same(plain["state_dict"], ours["state_dict"])


def test_batches_of_another_kind_are_proven_with_all_parameters(pool: RankPool, tmp_path: Path) -> None:
    """The micro-batches of the second batch have one structure, as none had when the potential was captured."""
    more: dict[str, Any] = {"num_features": 8, "num_steps": 2, "num_train": 6, "callbacks": ()}
    two = {"num_microbatches": 2}
    (expected,) = pool.run(workers.train, two, str(tmp_path), more, world_size=1)
    for found in pool.run(workers.train, two, str(tmp_path), more, world_size=2):
        assert found["ended"] == "" and found["bytes"][0] < expected["bytes"][0]
        same(expected["state"], found["state"])


def test_parameters_come_back_after_an_exception_on_all_ranks(pool: RankPool, tmp_path: Path) -> None:
    """The checkpoint of an exception is whole, though no rank is, and training goes on from it elsewhere."""
    more: dict[str, Any] = {"num_features": 8}
    (expected,) = pool.run(workers.train, None, str(tmp_path / "one"), more, world_size=1)
    stopped = more | {"stop": ("exception", 3, None), "callbacks": ("on exception",)}
    pool.run(workers.train, {}, str(tmp_path), stopped, world_size=2, timeout=120)
    resumed = more | {"resume": str(tmp_path / "on_exception.ckpt")}
    for found in pool.run(workers.train, {}, str(tmp_path / "two"), resumed, world_size=3):
        same(expected["state"], found["state"])


def test_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint folder: it has no meta\.pt"):
        read_folder(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "no checkpoint folder" in capsys.readouterr().err
