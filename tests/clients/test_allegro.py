"""Allegro in NequIP's own LightningModule, on pipelines and graph ranks.

Slow, and skipped where nequip-allegro is absent:

    python tests/clients/environments.py allegro --folder /some/folder --run
"""

from __future__ import annotations

from factories import factory

from .compare import ModelConformance, client_marks

pytestmark = client_marks("allegro", "nequip-allegro")


class TestAllegro(ModelConformance):
    make_module = factory("allegro_models", "make_module")
    datamodules = {"crystals": factory("allegro_models", "crystals")}


class TestAllegroWithoutCells(ModelConformance):
    make_module = factory("allegro_models", "make_without_stress")
    datamodules = {"molecules": factory("allegro_models", "molecules")}
