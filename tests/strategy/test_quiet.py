"""Warnings and lines that mean nothing with the strategy are left out, and no others."""

from __future__ import annotations

import logging
import warnings

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_januspipe import JanusPipeStrategy
from lightning_januspipe.strategy.quiet import ignore_unreduced, ignore_warnings


@pytest.mark.parametrize(
    ("message", "is_shown"),
    [
        ("It is recommended to use `self.log('val_loss', ..., sync_dist=True)` when logging on epoch level in", True),
        (
            "You're resuming from a checkpoint that ended before the epoch ended and your dataloader is not resumable. "
            "This can cause",
            False,
        ),
        ("`isinstance(treespec, LeafSpec)` is deprecated, use", False),
        ("frame 3 has no energy", True),
    ],
)
def test_warnings(message: str, is_shown: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ignore_warnings()
        warnings.warn(message, stacklevel=1)
    assert bool(caught) == is_shown


def test_values_that_are_not_reduced() -> None:
    """A pipeline leaves the warning out; replicas, and other strategies after it, have it again."""
    shown = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        for is_ignored in (True, True, False, False):
            ignore_unreduced(is_ignored)
            caught.clear()
            warnings.warn(
                "It is recommended to use `self.log('a', ..., sync_dist=True)` when logging on epoch level",
                stacklevel=1,
            )
            shown.append(bool(caught))
        assert warnings.filters == filters
    assert shown == [False, False, True, True]


def test_tips(caplog: pytest.LogCaptureFixture) -> None:
    JanusPipeStrategy()
    with caplog.at_level(logging.INFO):
        rank_zero_info("💡 Tip: For seamless cloud logging and experiment tracking, try installing [litlogger]")
        rank_zero_info("the best checkpoint")
    assert [record.getMessage() for record in caplog.records] == ["the best checkpoint"]
