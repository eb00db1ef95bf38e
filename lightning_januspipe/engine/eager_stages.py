"""Lists what runs the phases of a stage eagerly, by what it keeps between them."""

from __future__ import annotations

from collections.abc import Mapping

from lightning_januspipe.engine.offloading_stage import offloading_stage
from lightning_januspipe.engine.recomputing_stage import recomputing_stage
from lightning_januspipe.engine.single_process import StageFactory, eager_stage

EAGER_STAGES: Mapping[str, StageFactory] = {
    "keep": eager_stage,
    "offload": offloading_stage,
    "recompute": recomputing_stage,
}
"""What makes a stage that runs eagerly, for each activation that is possible without compiled phases."""


def eager_stages(activation: str) -> StageFactory:
    """Returns what makes stages that run eagerly; what needs compiled phases keeps everything.

    Args:
        activation: What stages keep between their phases.
    """
    return EAGER_STAGES.get(activation, eager_stage)
