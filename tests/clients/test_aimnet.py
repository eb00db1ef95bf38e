"""AIMNet2 in an ordinary LightningModule, on pipelines. Packed batches can be sharded over graph ranks.

Slow, and skipped where aimnet is absent:

    python tests/clients/environments.py aimnet --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import PIPELINES, ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("aimnet") is None, reason="aimnet is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestPadded(ModelConformance):
    """Molecules padded to one size, with a Coulomb energy of the charges."""

    make_module = factory("aimnet_models", "make_dense")
    datamodules = {"molecules": factory("aimnet_models", "molecules_padded")}
    strategies = PIPELINES


class TestPacked(ModelConformance):
    """Molecules one after the other, with a matrix of neighbours."""

    make_module = factory("aimnet_models", "make_packed")
    datamodules = {"molecules": factory("aimnet_models", "molecules_packed")}
