"""fairchem-core's eSEN and UMA in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where fairchem-core is absent:

    python tests/clients/environments.py fairchem --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("fairchem") is None, reason="fairchem-core is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestESEN(ModelConformance):
    """On given edges."""

    make_module = factory("fairchem_models", "make_esen")
    datamodules = {kind: factory("fairchem_models", kind) for kind in ("crystals", "molecules")}


class TestESENThatMakesEdges(ModelConformance):
    make_module = factory("fairchem_models", "make_esen_own_edges")
    datamodules = {"crystals": factory("fairchem_models", "crystals")}


class TestUMA(ModelConformance):
    """Without dropout, whose numbers a plain Trainer draws otherwise."""

    make_module = factory("fairchem_models", "make_uma")
    datamodules = {kind: factory("fairchem_models", kind) for kind in ("crystals", "molecules")}
