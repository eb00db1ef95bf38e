"""Bubbles of all ranks, in numbers and in words."""

from __future__ import annotations

import pytest

from lightning_januspipe.schedule.step_report import Report


def test_bubbles_of_all_ranks() -> None:
    """A rank that works most has the smallest bubble; the others wait for it."""
    report = Report(10.0, 8.0, (1, 1), {}, {}, (8.0, 6.0))
    assert report.bubbles == pytest.approx((0.2, 0.4)) and report.bubble_fraction == pytest.approx(0.2)
    told = "bubbles 30.0% on average, 40.0% on rank 1; rank 0 works 14% more than the mean"
    assert report.describe_bubbles() == told


def test_ranks_that_are_alike() -> None:
    assert Report(10.0, 8.0, (1, 1), {}, {}, (8.0, 8.0)).describe_bubbles() == "bubbles 20.0%"
    assert Report(10.0, 8.0, (1, 1), {}, {}).describe_bubbles() == "bubbles 20.0%"
