"""The command line ``januspipe``."""
