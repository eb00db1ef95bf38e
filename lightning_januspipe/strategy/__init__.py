"""Holds the strategy, which a Lightning Trainer calls."""
