"""MatterSim's M3GNet in its own ``Potential``, on pipelines and graph ranks.

Slow, and skipped where mattersim is absent:

    python tests/clients/environments.py mattersim --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("mattersim") is None, reason="mattersim is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestM3GNet(ModelConformance):
    make_module = factory("mattersim_models", "make_module")
    datamodules = {kind: factory("mattersim_models", kind) for kind in ("crystals", "molecules")}
