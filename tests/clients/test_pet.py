"""The backend of metatrain's PET in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where metatrain is absent:

    python tests/clients/environments.py pet --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("metatrain") is None, reason="metatrain is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestCrystals(ModelConformance):
    make_module = factory("pet_models", "make_of_crystals")
    datamodules = {"crystals": factory("pet_models", "crystals")}


class TestMolecules(ModelConformance):
    make_module = factory("pet_models", "make_of_molecules")
    datamodules = {"molecules": factory("pet_models", "molecules")}
