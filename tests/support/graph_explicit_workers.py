"""What graph ranks do in the tests of potentials that divide themselves."""

from __future__ import annotations

import explicit_models
import torch
import torch.distributed as dist
from capture_models import OTHER, TRACED, Step, make_batch
from graph_workers import start
from torch import nn

from lightning_januspipe.capture import Capture, CaptureError, capture_module
from lightning_januspipe.graph import GraphGroup, call_tensors, prove_together


def captured(potential: nn.Module, num_stages: int = 2) -> tuple[Step, Capture]:
    """A step with a potential in its own stages."""
    module = Step(potential)
    batches = make_batch(TRACED), make_batch(OTHER)
    return module, capture_module(module, module.training_step, *batches, [list(range(num_stages))], stages="explicit")


def prove(kind: str, sizes: tuple[int, ...]) -> str:
    """Prove a division of a model over all ranks; returns the reason of a refusal."""
    torch.set_default_dtype(torch.float64)
    rank, num_ranks, group = start()
    module, found = captured(getattr(explicit_models, kind)())
    agreed = [found]  # measured times have cut it
    dist.broadcast_object_list(agreed, 0, group=group)
    (found,) = agreed
    tensors = call_tensors(found.potential, module, module.training_step, make_batch(sizes))
    try:
        prove_together(found.potential, module.potential, tensors, GraphGroup(num_ranks, rank, group))
    except CaptureError as error:
        return str(error)
    finally:
        dist.destroy_process_group(group)
    return ""
