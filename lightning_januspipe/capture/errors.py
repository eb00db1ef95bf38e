"""The error a user meets when a LightningModule cannot be turned into stages."""

from __future__ import annotations


class CaptureError(ValueError):
    """The potential cannot be captured; the message says what was found, what was expected and what to do."""
