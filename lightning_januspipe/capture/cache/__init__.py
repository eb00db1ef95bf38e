"""Keeps traced programs from one run to the next."""
