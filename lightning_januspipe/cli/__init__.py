"""Defines the command line ``januspipe``."""
