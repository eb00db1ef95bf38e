"""Holds potentials in stages, captured or declared by their author."""
