"""Runs the command line: ``python -m lightning_januspipe.cli``."""

from lightning_januspipe.cli.main import main

if __name__ == "__main__":
    main()
