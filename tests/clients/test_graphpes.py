"""graph-pes in its own TrainingTask of ``pytorch_lightning``, on pipelines and graph ranks.

Slow, and skipped where graph-pes is absent:

    python tests/clients/environments.py graphpes --folder /some/folder --run
"""

from __future__ import annotations

from factories import factory

from .compare import ModelConformance, client_marks

pytestmark = client_marks("graph_pes", "graph-pes")


class TestSum(ModelConformance):
    """Reference energies, a pair potential and PaiNN; the step differentiates each of them."""

    make_module = factory("graphpes_models", "make_sum")
    datamodules = {"crystals": factory("graphpes_models", "crystals")}


class TestSumWithoutStress(ModelConformance):
    make_module = factory("graphpes_models", "make_sum_without_stress")
    datamodules = {"molecules": factory("graphpes_models", "molecules")}


class TestTensorNet(ModelConformance):
    make_module = factory("graphpes_models", "make_tensornet")
    datamodules = {"crystals": factory("graphpes_models", "crystals")}


class TestNequIP(ModelConformance):
    make_module = factory("graphpes_models", "make_nequip")
    datamodules = {"crystals": factory("graphpes_models", "crystals")}
