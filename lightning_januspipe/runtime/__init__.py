"""Runs one rank's part of a training, without Lightning."""
