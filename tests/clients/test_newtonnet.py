"""NewtonNet in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where newtonnet is absent:

    python tests/clients/environments.py newtonnet --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("newtonnet") is None, reason="newtonnet is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestNewtonNet(ModelConformance):
    make_module = factory("newtonnet_models", "make_module")
    datamodules = {kind: factory("newtonnet_models", kind) for kind in ("crystals", "molecules")}
