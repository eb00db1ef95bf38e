"""Nequix's model for torch in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where nequix is absent:

    python tests/clients/environments.py nequix --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("nequix") is None, reason="nequix is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestNequix(ModelConformance):
    make_module = factory("nequix_models", "make_module")
    datamodules = {"crystals": factory("nequix_models", "crystals")}
