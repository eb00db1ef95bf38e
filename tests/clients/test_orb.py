"""Orb's conservative potential with its own loss, on pipelines and graph ranks.

Slow, and skipped where orb-models is absent:

    python tests/clients/environments.py orb --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("orb_models") is None, reason="orb-models is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


CELLS = ModelConformance.strategies


class TestOrb(ModelConformance):
    make_module = factory("orb_small", "make_module")
    datamodules = {kind: factory("orb_small", kind) for kind in ("crystals", "molecules")}
    # Its loss is NaN where the force errors of all atoms are too large for its confidence head: of one structure, say.
    strategies = {name: {**s, "num_microbatches": min(s["num_microbatches"], 2)} for name, s in CELLS.items()}
