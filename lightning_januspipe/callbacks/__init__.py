"""Offers callbacks: throughput, costs and timeline of training, stages in the summary, errors and predictions."""

from lightning_januspipe.callbacks.error_report import (
    QUANTITIES,
    ErrorReport,
    Errors,
    checkpoint_path,
    describe_change,
    error_table,
)
from lightning_januspipe.callbacks.evaluation_report import EvaluationReport
from lightning_januspipe.callbacks.loss_weights import LossWeightSchedule
from lightning_januspipe.callbacks.monitor import PipelineMonitor
from lightning_januspipe.callbacks.pipeline_timeline import PipelineTimeline
from lightning_januspipe.callbacks.prediction_writer import PredictionWriter
from lightning_januspipe.callbacks.progress_bar import NarrowProgressBar
from lightning_januspipe.callbacks.summary import StageSummary
from lightning_januspipe.callbacks.throughput import Throughput, count_atoms, count_structures

__all__ = [
    "QUANTITIES",
    "ErrorReport",
    "Errors",
    "EvaluationReport",
    "LossWeightSchedule",
    "NarrowProgressBar",
    "PipelineMonitor",
    "PipelineTimeline",
    "PredictionWriter",
    "StageSummary",
    "Throughput",
    "checkpoint_path",
    "count_atoms",
    "count_structures",
    "describe_change",
    "error_table",
]
