"""From any conservative LightningModule to stages: find the potential, trace it, cut it, prove it."""

from lightning_januspipe.capture.adapters import Adapter
from lightning_januspipe.capture.cache import ProgramCache
from lightning_januspipe.capture.capture import Capture, Stages, capture_module
from lightning_januspipe.capture.divided import DividedPotential
from lightning_januspipe.capture.errors import CaptureError
from lightning_januspipe.capture.explicit import ExplicitStages, run_stages
from lightning_januspipe.capture.proofs import Proofs
from lightning_januspipe.capture.stages import CapturedPotential, CapturedStage
from lightning_januspipe.capture.step import CapturedStep
from lightning_januspipe.capture.validate import Manner

__all__ = [
    "Adapter",
    "Capture",
    "CaptureError",
    "CapturedPotential",
    "CapturedStage",
    "CapturedStep",
    "DividedPotential",
    "ExplicitStages",
    "Manner",
    "ProgramCache",
    "Proofs",
    "Stages",
    "capture_module",
    "run_stages",
]
