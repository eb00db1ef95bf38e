"""Helps the models of some packages through capture: one file for each package, imported only where it is installed."""

from lightning_januspipe.capture.adapters.capture_adapter import (
    GROUP,
    Adapter,
    adapted,
    adapters_of,
    capturing,
    joined,
    separated,
)

__all__ = ["GROUP", "Adapter", "adapted", "adapters_of", "capturing", "joined", "separated"]
