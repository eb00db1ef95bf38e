"""Holds the strategy for a Trainer of ``pytorch_lightning``.

``pip install lightning`` installs both Lightnings, and then ``lightning_januspipe.JanusPipeStrategy`` is that of
``lightning``. Projects that import ``pytorch_lightning`` name this one in their configurations.
"""

from lightning_januspipe.strategy.registry import strategy_class

JanusPipeStrategy = strategy_class("pytorch_lightning")

__all__ = ["JanusPipeStrategy"]
