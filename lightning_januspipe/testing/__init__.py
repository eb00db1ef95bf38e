"""Tests that a module trains the same in a pipeline as in one process: for this project's tests and for users' own."""

from lightning_januspipe.testing.conformance import PotentialConformance
from lightning_januspipe.testing.interpreted import interpreted_phases
from lightning_januspipe.testing.parity import assert_matches_single_process, compare_records
from lightning_januspipe.testing.pool import RankError, RankPool, reserved_port
from lightning_januspipe.testing.runs import RunRecord, train_in_pipeline, train_reference
from lightning_januspipe.testing.trainer import quiet_trainer

__all__ = [
    "PotentialConformance",
    "RankError",
    "RankPool",
    "RunRecord",
    "assert_matches_single_process",
    "compare_records",
    "interpreted_phases",
    "quiet_trainer",
    "reserved_port",
    "train_in_pipeline",
    "train_reference",
]
