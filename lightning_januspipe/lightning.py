"""Holds the strategy for a Trainer of ``lightning``."""

from lightning_januspipe.strategy.registry import strategy_class

JanusPipeStrategy = strategy_class("lightning")

__all__ = ["JanusPipeStrategy"]
