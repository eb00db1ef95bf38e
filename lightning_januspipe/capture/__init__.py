"""From any conservative LightningModule to stages: find the potential, trace it, cut it, prove it."""

from lightning_januspipe.capture.capture import Capture, capture_module
from lightning_januspipe.capture.errors import CaptureError
from lightning_januspipe.capture.stages import CapturedPotential, CapturedStage
from lightning_januspipe.capture.step import CapturedStep
from lightning_januspipe.capture.validate import Manner

__all__ = ["Capture", "CaptureError", "CapturedPotential", "CapturedStage", "CapturedStep", "Manner", "capture_module"]
