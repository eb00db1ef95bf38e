"""So3krates for torch in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where So3krates-torch is absent:

    python tests/clients/environments.py so3krates --folder /some/folder --run
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from factories import factory

from .compare import ModelConformance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(find_spec("so3krates_torch") is None, reason="So3krates-torch is not installed"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class TestSo3krates(ModelConformance):
    make_module = factory("so3krates_models", "make_module")
    datamodules = {"crystals": factory("so3krates_models", "crystals")}


class TestSo3kratesWithoutStress(ModelConformance):
    make_module = factory("so3krates_models", "make_without_stress")
    datamodules = {"molecules": factory("so3krates_models", "molecules")}
