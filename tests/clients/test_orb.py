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


class TestOrb(ModelConformance):
    """Batches of eight structures, in micro-batches of two."""

    make_module = factory("orb_small", "make_module")
    datamodules = {kind: factory("orb_small", kind) for kind in ("crystals", "molecules")}


class TestRunningMeans(ModelConformance):
    """Means that the loss updates are those of plain training where a batch is one micro-batch."""

    make_module = factory("orb_small", "make_with_running_means")
    datamodules = {"crystals": factory("orb_small", "crystals")}
    strategies = {name: s for name, s in ModelConformance.strategies.items() if s["num_microbatches"] == 1}
