"""PyTorch Geometric's ViSNet and DimeNet++ in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where torch-geometric is absent:

    python tests/clients/environments.py pyg --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("torch_geometric") is None, reason="torch-geometric is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestViSNet(ModelConformance):
    make_module = factory("pyg_models", "make_visnet")
    datamodules = {"molecules": factory("pyg_models", "molecules")}


class TestDimeNet(ModelConformance):
    make_module = factory("pyg_models", "make_dimenet")
    datamodules = {"molecules": factory("pyg_models", "molecules")}
