"""``januspipe bench two-ranks`` and ``simulation``, with eager phases and with compiled ones."""

from __future__ import annotations

from typing import Any

import pytest
from compiled_workers import run_once_interpreted

from lightning_januspipe.bench import training_steps as bench
from lightning_januspipe.bench.work import Work
from lightning_januspipe.cli.main import main
from lightning_januspipe.testing import RankPool

WORK = Work(num_atoms=8, batch_size=2, steps=2, num_layers=2, num_features=4, dtype="float64")


class _Pool:
    """Stands for ranks whose steps take ten percent longer than simulated."""

    asked: list[tuple[int, dict[str, Any]]]

    def __init__(self, ranks: int) -> None:
        self._ranks = ranks

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *_: object) -> None: ...

    def run(self, function: Any, work: Work, strategy: dict[str, Any], *_: Any, **__: Any) -> list[bench.RunTiming]:
        self.asked.append((self._ranks, strategy))
        return [bench.RunTiming(1.1, 0.9, 0.5, 1000, [1.0, 1.0], [1.1, 1.2])] * self._ranks


@pytest.mark.parametrize("compiled", [False, True])
def test_configurations(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], compiled: bool) -> None:
    """All schedules, but where phases are compiled those that split stages; or the ones that are asked for."""
    monkeypatch.setattr(bench, "RankPool", _Pool)
    flags = ["--compile"] if compiled else []
    folded, unfolded = ["wavek-zb", "wavek", "1f1b-fold", "gpipe"], ["hanayo-2nd", "1f1b-2nd"]
    expected = {(2, name) for name in (folded if compiled else [*folded, *unfolded])}
    for name, more in (("simulation", set()), ("two-ranks", {(1, None)})):
        _Pool.asked = []
        main(["bench", name, "--runs", "1", *flags])
        assert {(ranks, strategy.get("schedule")) for ranks, strategy in _Pool.asked} == expected | more
        assert all(strategy["compile"] is compiled for _, strategy in _Pool.asked)
    assert "| two ranks, wavek | 1.100 | 1.100 to 1.100 | 1.00 | 0.900, 0.900 | 0, 0 | 0.5 |" in capsys.readouterr().out
    _Pool.asked = []
    main(["bench", "simulation", "--runs", "3", "--schedules", "[wavek]", *flags])
    assert [strategy["schedule"] for _, strategy in _Pool.asked] == ["wavek"] * 3
    assert "| wavek | 1.000 | 1.150 | +15.0 % | +10.0 to +20.0 % |" in capsys.readouterr().out


@pytest.mark.slow
def test_compiled_steps_are_compared_with_their_simulation(pool: RankPool) -> None:
    strategy = {"num_microbatches": 2, "schedule": "wavek"}
    compiled = pool.run(run_once_interpreted, WORK, {**strategy, "compile": True}, True, world_size=2)
    (alone,) = pool.run(bench.run_once, WORK, {"num_microbatches": 2}, world_size=1)
    for rank in compiled:
        assert rank.loss == pytest.approx(alone.loss, rel=1e-9)
        assert len(rank.predicted) == len(rank.recorded) == WORK.steps
        assert all(0 < predicted < 2 * real for predicted, real in zip(rank.predicted, rank.recorded, strict=True))
