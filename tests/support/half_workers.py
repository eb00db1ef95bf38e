"""What the ranks of the tests of rounded rows run."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_januspipe.graph.half_rows import HalfRows, RowLayout, send_half_rows


def exchanged(dtype: torch.dtype, is_typed: bool) -> dict[str, Any]:
    """Sends rows of two types, one with numbers 1e12 times as large as the other.

    Args:
        dtype: what rows are rounded to.
        is_typed: whether each type has a scale.

    Returns:
        The largest error relative to the largest number of a row's type, and the bytes that were sent: all, those of
        scales, and those of the rows without rounding.
    """
    dist.init_process_group("gloo")
    sizes = torch.tensor([1e6, 1e-6], dtype=torch.float64)
    counts = torch.tensor([[3, 4], [2, 0]])  # from, to
    generator = torch.Generator().manual_seed(0)
    types = [[torch.randint(0, 2, (int(n),), generator=generator) for n in row] for row in counts]
    rows = [
        [torch.rand(len(t), 5, generator=generator, dtype=torch.float64) * sizes[t, None] for t in row] for row in types
    ]
    rank = dist.get_rank()

    def layout(given: list[Tensor]) -> RowLayout:
        joined = torch.cat(given)
        return RowLayout.of(joined if is_typed else torch.zeros_like(joined), [len(t) for t in given])

    send, receive = layout(types[rank]), layout([row[rank] for row in types])
    expected, of_rows = torch.cat([row[rank] for row in rows]), torch.cat([row[rank] for row in types])
    found, sent = torch.empty_like(expected), torch.cat(rows[rank])
    with patch.object(dist, "all_to_all_single", wraps=dist.all_to_all_single) as messages:
        send_half_rows(found, sent, HalfRows(dtype, send, receive), dist.group.WORLD, "rows")
    error = ((found - expected).abs().amax(1) / sizes[of_rows]).max()
    dist.destroy_process_group()
    return {
        "error": float(error),
        "bytes": len(messages.call_args.args[1]),
        "scales": 4 * sum(send.num_scales),
        "exact": sent.numel() * sent.element_size(),
    }
