"""TorchANI in an ordinary LightningModule, on pipelines.

Slow, and skipped where torchani is absent:

    python tests/clients/environments.py torchani --folder /some/folder --run
"""

from __future__ import annotations

from factories import factory

from .compare import ModelConformance, client_marks

pytestmark = client_marks("torchani")


class TestTorchANI(ModelConformance):
    """Padded molecules, of one to seven atoms; they are not sharded."""

    make_module = factory("torchani_models", "make_module")
    datamodules = {kind: factory("torchani_models", kind) for kind in ("molecules", "lone")}
    eager_reason = "a size that depends on values"
    strategies = {name: s for name, s in ModelConformance.strategies.items() if "graph_size" not in s}
