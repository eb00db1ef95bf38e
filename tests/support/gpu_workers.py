"""What the tests on one GPU need."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator


class SharedGPU(CUDAAccelerator):
    """Has all processes compute on the first GPU; Lightning's own accelerator refuses a GPU that is named twice."""

    @staticmethod
    def parse_devices(devices: Any) -> list[int]:
        """Returns the first GPU for each process."""
        return [0] * (len(devices) if isinstance(devices, list) else int(devices))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """Returns the devices of the processes."""
        return [torch.device("cuda", index) for index in devices]
