"""A tiny MatRIS-MoE that every process builds alike."""

from __future__ import annotations

from typing import Any

import torch


def matris() -> Any:
    """Returns a module with a tiny MatRIS-MoE, for the data of ``tiny``."""
    from lightning_januspipe.models import MatRISMoE, PotentialModule

    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    sizes = {"cutoff": 5.0, "angle_cutoff": 3.0, "num_features": 8, "expert_features": 6, "num_experts": 5}
    return PotentialModule(MatRISMoE.from_size("tiny", ["Cu", "Ni", "Al"], **sizes), stress_weight=1.0)
