"""Importing this file makes the ranks of the tests' pools capture sooner: cuts are moved once, not up to three times.

A cut is as valid wherever it is, and most of the time of a short run went into measuring cuts.
"""

from lightning_januspipe.capture import balance

assert balance._REFINEMENTS > 1, "the tests' ranks would not be sooner"
balance._REFINEMENTS = 1
