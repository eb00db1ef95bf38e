"""fairchem-core's eSEN and UMA in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where fairchem-core is absent:

    python tests/clients/environments.py fairchem --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest

from .compare import ClientConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("fairchem") is None, reason="fairchem-core is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

STRATEGIES = {
    "two-stages": {"pipeline_size": 2, "num_microbatches": 1},
    "two-stages-4-microbatches": {"pipeline_size": 2, "num_microbatches": 4},
    "two-graph-ranks": {"graph_size": 2, "num_microbatches": 1},
    "two-stages-of-two-graph-ranks": {"pipeline_size": 2, "graph_size": 2, "num_microbatches": 4},
}


def make(name: str) -> Any:
    """Returns what a function of ``fairchem_models`` makes."""
    import fairchem_models

    return getattr(fairchem_models, name)()


def make_esen() -> Any:
    """ESEN on given edges."""
    return make("make_esen")


def make_esen_own_edges() -> Any:
    """ESEN that makes its edges."""
    return make("make_esen_own_edges")


def crystals() -> Any:
    """Periodic structures of 4 to 16 atoms."""
    return make("crystals")


def molecules() -> Any:
    """Molecules of 3 to 7 atoms in a box."""
    return make("molecules")


class FairchemConformance(ClientConformance):
    """Trains two steps, as a trace takes long."""

    strategies = STRATEGIES
    steps = 2

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.preload = ("fairchem_models",)


class TestESEN(FairchemConformance):
    make_module = make_esen
    datamodules = {"crystals": crystals, "molecules": molecules}


class TestESENThatMakesEdges(FairchemConformance):
    make_module = make_esen_own_edges
    datamodules = {"crystals": crystals}
