"""Finds the potential in a user's LightningModule."""
