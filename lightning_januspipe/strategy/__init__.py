"""The strategy: what a Lightning Trainer calls."""
