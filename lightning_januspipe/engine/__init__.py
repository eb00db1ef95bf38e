"""Runs the phases of stages in the order of a schedule: stages, messages, gradients."""
