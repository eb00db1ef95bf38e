"""TorchMD-Net's models in its own LightningModule, on pipelines and graph ranks.

Slow, and skipped where torchmd-net is absent:

    python tests/clients/environments.py torchmdnet --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("torchmdnet") is None, reason="torchmd-net is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestGraphNetwork(ModelConformance):
    make_module = factory("torchmdnet_models", "make_gn")
    datamodules = {"molecules": factory("torchmdnet_models", "molecules")}


class TestTensorNet(ModelConformance):
    make_module = factory("torchmdnet_models", "make_tensornet")
    datamodules = {"molecules": factory("torchmdnet_models", "molecules")}


class TestEquivariantTransformer(ModelConformance):
    make_module = factory("torchmdnet_models", "make_et")
    datamodules = {"molecules": factory("torchmdnet_models", "molecules")}
