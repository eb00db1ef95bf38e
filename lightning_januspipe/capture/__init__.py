"""From any conservative LightningModule to stages: find the potential, trace it, cut it, prove it."""

from lightning_januspipe.capture.adapters import Adapter
from lightning_januspipe.capture.cache.store import ProgramCache
from lightning_januspipe.capture.capture import Capture, Stages, capture_module
from lightning_januspipe.capture.stages.captured import CapturedPotential, CapturedStage
from lightning_januspipe.capture.stages.explicit import ExplicitStages, run_stages
from lightning_januspipe.capture.stages.staged_potential import DividedPotential
from lightning_januspipe.capture.validate.against_eager import Manner
from lightning_januspipe.errors import CaptureError

__all__ = [
    "Adapter",
    "Capture",
    "CaptureError",
    "CapturedPotential",
    "CapturedStage",
    "DividedPotential",
    "ExplicitStages",
    "Manner",
    "ProgramCache",
    "Stages",
    "capture_module",
    "run_stages",
]
