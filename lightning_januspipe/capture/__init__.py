"""Turns the potential of any conservative LightningModule into stages: finds, traces, cuts and validates it."""

from lightning_januspipe.capture.activations import ActivationCosts, ActivationFactories
from lightning_januspipe.capture.adapters import Adapter
from lightning_januspipe.capture.cache.store import ProgramCache
from lightning_januspipe.capture.capture import Capture, StageOrigin, capture_module
from lightning_januspipe.capture.stages.captured import CapturedPotential, CapturedStage
from lightning_januspipe.capture.stages.explicit import ExplicitStages, run_stages
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.validate.against_eager import PhaseMode
from lightning_januspipe.errors import CaptureError

__all__ = [
    "ActivationCosts",
    "ActivationFactories",
    "Adapter",
    "Capture",
    "CaptureError",
    "CapturedPotential",
    "CapturedStage",
    "ExplicitStages",
    "PhaseMode",
    "ProgramCache",
    "StageOrigin",
    "StagedPotential",
    "capture_module",
    "run_stages",
]
