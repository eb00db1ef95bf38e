"""The strategy for a Trainer of ``lightning``: ``lightning_januspipe.lightning.JanusPipeStrategy``."""

from lightning_januspipe.strategy.registry import strategy_class

JanusPipeStrategy = strategy_class("lightning")

__all__ = ["JanusPipeStrategy"]
