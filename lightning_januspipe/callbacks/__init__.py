"""Callbacks: throughput, costs and timeline of pipelined training, stages in the summary, errors in a table."""

from lightning_januspipe.callbacks.error_report import (
    QUANTITIES,
    ErrorReport,
    Errors,
    checkpoint_path,
    describe_drop,
    error_table,
)
from lightning_januspipe.callbacks.monitor import PipelineMonitor
from lightning_januspipe.callbacks.pipeline_timeline import PipelineTimeline
from lightning_januspipe.callbacks.summary import StageSummary
from lightning_januspipe.callbacks.throughput import Throughput, count_atoms, count_structures

__all__ = [
    "QUANTITIES",
    "ErrorReport",
    "Errors",
    "PipelineMonitor",
    "PipelineTimeline",
    "StageSummary",
    "Throughput",
    "checkpoint_path",
    "count_atoms",
    "count_structures",
    "describe_drop",
    "error_table",
]
