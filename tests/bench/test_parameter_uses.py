"""Uses of parameters in a step, counted by hand for one micro-batch."""

from __future__ import annotations

import pytest

from lightning_januspipe.bench.emulate.schedules import COSTS
from lightning_januspipe.bench.parameter_uses import count_uses, parameter_uses, shares_in_use
from lightning_januspipe.schedule import build_schedule


def test_two_stages_are_used_in_turns() -> None:
    """FE0 | FE1 FF1 | FF0 BF0 | BF1 BE1 | BE0 WF0 | WF1 | WE0 | WE1: both are in use from FE1 to WE0."""
    schedule = build_schedule("wavek-zb", 1, 1, COSTS, chunks=2)
    assert count_uses(schedule, 0) == 4
    assert shares_in_use(schedule) == [pytest.approx(1 - (COSTS.fe + COSTS.we) / 2 / COSTS.total)]


def test_one_stage_is_used_once() -> None:
    header, _, *rows = parameter_uses("1", "1").splitlines()
    assert header.startswith("| stages of a rank") and len(rows) == 2
    assert rows[0] == "| 1 | 1 | 1 | 100% | 1 | 1 |" and rows[1].endswith("| 1 | 4 |")
