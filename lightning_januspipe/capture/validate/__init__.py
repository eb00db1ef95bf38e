"""Compares a captured potential with the module that it was captured from."""
