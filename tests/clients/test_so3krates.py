"""So3krates for torch in an ordinary LightningModule, on pipelines and graph ranks.

Slow, and skipped where So3krates-torch is absent:

    python tests/clients/environments.py so3krates --folder /some/folder --run
"""

from __future__ import annotations

from factories import factory

from .compare import ModelConformance, client_marks

pytestmark = client_marks("so3krates_torch", "So3krates-torch")


class TestSo3krates(ModelConformance):
    make_module = factory("so3krates_models", "make_module")
    datamodules = {"crystals": factory("so3krates_models", "crystals")}


class TestSo3kratesWithoutStress(ModelConformance):
    make_module = factory("so3krates_models", "make_without_stress")
    datamodules = {"molecules": factory("so3krates_models", "molecules")}
