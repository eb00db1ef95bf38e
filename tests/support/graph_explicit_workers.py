"""What graph ranks do in the tests of potentials that divide themselves."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import explicit_models
import graph_models
import plain_modules
import torch
import torch.distributed as dist
from capture_models import OTHER, TRACED, Batch, Step, make_batch
from graph_workers import start
from torch import nn

from lightning_januspipe.capture import Capture, CaptureError, capture_module
from lightning_januspipe.graph import GraphAxis, GraphGroup, call_tensors, verify_explicit_sharding
from lightning_januspipe.testing import quiet_trainer


def captured(potential: nn.Module, num_stages: int = 2) -> tuple[Step, Capture]:
    """Returns a step with a potential in its own stages."""
    module = Step(potential)
    batches = make_batch(TRACED), make_batch(OTHER)
    return module, capture_module(module, module.training_step, *batches, [list(range(num_stages))], stages="explicit")


def verify(kind: str, sizes: tuple[int, ...]) -> str:
    """Verifies that a model can be sharded over all ranks; returns the reason of a refusal."""
    torch.set_default_dtype(torch.float64)
    rank, num_ranks, group = start()
    module, found = captured(getattr(explicit_models, kind)())
    agreed = [found]  # measured times have cut it
    dist.broadcast_object_list(agreed, 0, group=group)
    (found,) = agreed
    tensors = call_tensors(found.potential, module, module.training_step, make_batch(sizes))
    try:
        axis = GraphAxis(found.potential, module.potential, GraphGroup(num_ranks, rank, group))
        verify_explicit_sharding(axis, found.potential, module.potential, tensors)
    except CaptureError as error:
        return str(error)
    finally:
        dist.destroy_process_group(group)
    return ""


class _Counting(explicit_models.Read):
    """Counts how often it was called in training; needs the default type of double precision."""

    def __init__(self, table: nn.Embedding, width: int) -> None:
        super().__init__(table, width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, inputs: explicit_models.Features, features: explicit_models.Features) -> explicit_models.Features:
        self.calls += float(self.training)
        found = super().forward(inputs, features)
        assert torch.zeros(1).dtype == torch.float64
        return found


class _Module(plain_modules.Explicit):
    """Validates its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.potential.parts[-1] = _Counting(self.potential.parts[0].table, 6)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.enable_grad():
            out = self.potential(batch)
        loss = plain_modules.losses(batch, out["energy"], out["forces"], out["stress"])
        self.log("loss", loss.detach(), batch_size=len(out["energy"]))


def validated(strategy: dict[str, Any] | None) -> tuple[float, float]:
    """Validates where Lightning uses inference mode, as it does with NCCL.

    Returns:
        How often a part has counted a call in training, and the loss.
    """
    module = _Module()
    trainer = quiet_trainer(strategy, precision="64-true", inference_mode=strategy is not None)
    data: Any = graph_models.Data()
    with patch("lightning.pytorch.loops.utilities._distributed_is_initialized", lambda: False):
        found = trainer.validate(module, data.train_dataloader(), verbose=False)
    return float(module.potential.parts[-1].calls), found[0]["loss"]


kept: list[Exception] = []


class _Failing(explicit_models.Read):
    """Fails on one rank."""

    def forward(self, inputs: explicit_models.Features, features: explicit_models.Features) -> explicit_models.Features:
        if dist.is_initialized() and dist.get_rank() == 1:
            raise ValueError("no such table")
        return super().forward(inputs, features)


def failed(strategy: dict[str, Any], folder: str) -> tuple[str, float]:
    """Returns how training ended on this rank, and when. The rank that failed lives on until the other has ended."""
    ended = Path(folder) / "ended"
    module = plain_modules.Explicit()
    module.potential.parts[-1] = _Failing(module.potential.parts[0].table, 6)
    trainer, data = quiet_trainer(strategy, max_steps=1), graph_models.Data()
    began = time.monotonic()
    try:
        trainer.fit(module, data.train_dataloader())
    except Exception as error:
        kept.append(error)
        seconds = time.monotonic() - began
        if int(os.environ["RANK"]) == 0:
            ended.touch()
        while not ended.exists() and time.monotonic() - began < 60:
            time.sleep(0.1)
        return f"{type(error).__name__}: {error}", seconds
    return "", 0.0
