"""Cuts a traced program into stages of equal cost."""
