"""Traces the forward of a potential into one graph."""
