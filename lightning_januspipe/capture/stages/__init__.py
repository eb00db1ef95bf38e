"""Potentials in stages, captured or declared by their author."""
