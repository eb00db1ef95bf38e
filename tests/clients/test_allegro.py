"""Allegro in NequIP's own LightningModule, on pipelines and graph ranks.

Slow, and skipped where nequip-allegro is absent:

    python tests/clients/environments.py allegro --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("allegro") is None, reason="nequip-allegro is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestAllegro(ModelConformance):
    make_module = factory("allegro_models", "make_module")
    datamodules = {"crystals": factory("allegro_models", "crystals")}


class TestAllegroWithoutCells(ModelConformance):
    make_module = factory("allegro_models", "make_without_stress")
    datamodules = {"molecules": factory("allegro_models", "molecules")}
