"""Structures of a second file are replayed beside those that a potential is fine-tuned on."""

from __future__ import annotations

import disk_workers as workers
import pytest
import torch

from lightning_januspipe import keys
from lightning_januspipe.data import ASEDataModule, collate_structures


@pytest.fixture
def make(tmp_path):
    """Function that writes 8 structures to train on and 5 to replay, and sets a data module up."""
    train = workers.write_file(tmp_path / "train.extxyz", workers.frames(8)[:8])
    old = [atoms * (2, 1, 1) for atoms in workers.frames(5)[:5]]
    for atoms, twice in zip(workers.frames(5), old, strict=False):
        twice.info.update(energy=2 * atoms.get_potential_energy())
        twice.arrays["forces"] = torch.tensor(atoms.get_forces()).repeat(2, 1).numpy()
    replay = workers.write_file(tmp_path / "replay.extxyz", old)

    def run(**options) -> ASEDataModule:
        module = ASEDataModule(str(train), cutoff=4.0, cache_dir=str(tmp_path / "cache"), batch_size=3, **options)
        module.setup("fit")
        return module

    return run, str(replay)


def sizes(module: ASEDataModule) -> list[int]:
    dataset = module.dataset("train")
    return [len(dataset[index][keys.POSITIONS]) for index in range(len(dataset))]


@pytest.mark.parametrize("lazy", [False, True])
def test_mixture(make, lazy):
    run, replay = make
    alone, mixed = run(lazy=lazy), run(replay_file=replay, replay_ratio=0.5, lazy=lazy)
    own = sizes(alone)
    assert sizes(mixed)[:8] == own and len(sizes(mixed)) == 12
    assert sizes(mixed) == sizes(run(replay_file=replay, replay_ratio=0.5, lazy=not lazy))
    assert sizes(mixed) != sizes(run(replay_file=replay, replay_ratio=0.5, seed=3, lazy=lazy))
    assert mixed.statistics() == alone.statistics()
    batches = list(mixed.train_dataloader())
    assert [batch[keys.CELL].shape[0] for batch in batches] == [3, 3, 3, 3]
    assert sum(batch[keys.POSITIONS].shape[0] for batch in batches) == sum(sizes(mixed))
    samples = [mixed.dataset("train")[index] for index in range(12)]
    assert collate_structures(samples)[keys.ENERGY].shape == (12,)


def test_all_are_replayed_before_one_is_again(make):
    run, replay = make
    found = [float(s[keys.ENERGY]) for s in list(run(replay_file=replay, replay_ratio=1.5).dataset("train"))[8:]]
    counts = [found.count(energy) for energy in set(found)]
    assert len(found) == 12 and sorted(counts) == [2, 2, 2, 3, 3]


def test_budget_and_checks_see_both_files(make):
    run, replay = make
    module = run(replay_file=replay, max_atoms=24)
    assert sum(batch[keys.CELL].shape[0] for batch in module.train_dataloader()) == 16
    with pytest.warns(UserWarning, match=r"3 of 4 validation structures are training data|training data too"):
        run(replay_file=replay, val_file=replay)


def test_errors(make):
    run, replay = make
    with pytest.raises(ValueError, match="replay_ratio=0.01 of 8 training structures is less than one structure"):
        run(replay_file=replay, replay_ratio=0.01)
    with pytest.raises(ValueError, match="replay_ratio=-1; expected a positive number"):
        run(replay_file=replay, replay_ratio=-1)
    with pytest.raises(ValueError, match=r"replay.extxyz, frame \d holds the unknown species"):
        run(replay_file=replay, species=["Cu", "Ni"], train_size=1)
