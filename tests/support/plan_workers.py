"""What ranks do in the tests of ``januspipe plan``: run with ``RankPool.run``."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

from lightning_januspipe.graph import exchange
from lightning_januspipe.testing import quiet_trainer


def sent_in_a_step(module: Any, data: Any, num_microbatches: int) -> tuple[float, int]:
    """Returns the bytes that this graph rank sends in exchanges of the first training step, and their number."""
    sent: list[float] = []
    num_ranks = dist.get_world_size() if dist.is_initialized() else 2

    def all_to_all(into: Any, rows: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(rows.nbytes)
        return dist.all_to_all_single(into, rows, *args, **kwargs)

    def all_reduce(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(2 * tensor.nbytes * (num_ranks - 1) / num_ranks)
        return dist.all_reduce(tensor, *args, **kwargs)

    def all_gather(into: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append((num_ranks - 1) * tensor.nbytes)
        return dist.all_gather(into, tensor, *args, **kwargs)

    counted = SimpleNamespace(all_to_all_single=all_to_all, all_reduce=all_reduce, all_gather=all_gather)
    sizes = {"pipeline_size": 1, "graph_size": num_ranks, "num_microbatches": num_microbatches, "schedule": "gpipe"}
    trainer = quiet_trainer(sizes, devices=num_ranks, max_steps=1, limit_val_batches=0)
    with patch.object(exchange, "dist", counted):
        trainer.fit(module(), datamodule=data())
    return sum(sent), len(sent)
