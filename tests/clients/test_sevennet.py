"""SevenNet in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where SevenNet is absent:

    python tests/clients/environments.py sevennet --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("sevenn") is None, reason="sevenn is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestSevenNet(ModelConformance):
    """Forces and stress are sums over derivatives with respect to edge vectors."""

    make_module = factory("sevennet_models", "make_module")
    datamodules = {kind: factory("sevennet_models", kind) for kind in ("crystals", "molecules")}
