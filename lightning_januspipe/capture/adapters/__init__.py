"""What is special to the models of one package, in one file each; nothing is imported that is not installed."""

from lightning_januspipe.capture.adapters.adapter import (
    GROUP,
    Adapter,
    adapted,
    adapters_of,
    capturing,
    joined,
    separated,
)

__all__ = ["GROUP", "Adapter", "adapted", "adapters_of", "capturing", "joined", "separated"]
