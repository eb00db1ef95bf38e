"""Mixtures of experts for potentials: each row is computed by the experts of its element."""

from lightning_januspipe.experts.element_experts import ElementExperts, GroupedLinear
from lightning_januspipe.experts.grouped import grouped_linear

__all__ = ["ElementExperts", "GroupedLinear", "grouped_linear"]
