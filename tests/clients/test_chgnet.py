"""CHGNet's own package in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where chgnet is absent:

    python tests/clients/environments.py chgnet --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("chgnet") is None, reason="chgnet is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestCHGNet(ModelConformance):
    make_module = factory("chgnet_models", "make_module")
    datamodules = {"crystals": factory("chgnet_models", "crystals")}
