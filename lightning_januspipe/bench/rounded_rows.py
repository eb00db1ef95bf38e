"""Measures what rounded rows between graph ranks and ranks with experts do to the parameter gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from lightning_januspipe.bench.training_steps import StepGradients, gradient_errors, gradients_once
from lightning_januspipe.bench.work import Work
from lightning_januspipe.testing import RankPool


class ExpertWork(Work):
    """Describes work with a small MatRIS-MoE."""

    def potential(self, samples: Any, species: Sequence[str]) -> nn.Module:
        """Returns a small MatRIS-MoE in the default dtype."""
        from lightning_januspipe.models import MatRISMoE

        sizes = {"cutoff": self.cutoff, "angle_cutoff": 3.5, "num_features": self.num_features}
        return MatRISMoE.from_size("tiny", species, **sizes, expert_features=2 * self.num_features)


def exchange_errors(num_atoms: int = 32, batch_size: int = 4, num_features: int = 32) -> str:
    """Shows errors of the gradients of a force loss with rows that are rounded between two ranks.

    Args:
        num_atoms: Atoms of a structure: an alloy of copper, nickel and aluminium with the forces of ASE's EMT.
        batch_size: Structures in the step, each a micro-batch.
        num_features: Width of a MatRIS-MoE with two blocks, and half the width of its experts.
    """
    work = ExpertWork(num_atoms=num_atoms, batch_size=batch_size, num_features=num_features, cutoff=4.5)
    one: dict[str, Any] = {"pipeline_size": 1, "num_microbatches": batch_size}
    halos = {**one, "graph_size": 2}
    both = {**halos, "expert_size": 2}
    configurations = {
        "float32, one rank": (1, one),
        "float32, 2 graph ranks": (2, halos),
        **{f"float32, 2 graph ranks, halos in {d}": (2, {**halos, "exchange_dtype": d}) for d in ("fp16", "bf16")},
        "float32, 2 graph ranks that share experts": (2, both),
        **{
            f"float32, 2 graph ranks that share experts, halos and rows in {d}": (2, {**both, "exchange_dtype": d})
            for d in ("fp16", "bf16")
        },
    }
    reference = _joined(work, 1, one, "64-true").gradients
    lines = [
        "| configuration | relative error of the gradient | of its worst parameter | exchanges (MB) |",
        "|---|---|---|---|",
    ]
    for name, (ranks, strategy) in configurations.items():
        found = _joined(work, ranks, strategy, "32-true")
        whole, worst = gradient_errors(found.gradients, reference)
        lines.append(f"| {name} | {whole:.1e} | {worst:.1e} | {found.message_bytes / 1e6:.2f} |")
    return "\n".join(lines)


def _joined(work: Work, ranks: int, strategy: dict[str, Any], precision: str) -> StepGradients:
    with RankPool(ranks) as pool:
        found = pool.run(gradients_and_bytes, work, strategy, precision, timeout=1800)
    return replace(found[0], message_bytes=sum(rank.message_bytes for rank in found))


def gradients_and_bytes(work: Work, strategy: dict[str, Any], precision: str) -> StepGradients:
    """Returns the gradients of one step, and the bytes of rows that this rank sent to others."""
    sent = 0
    exchange = dist.all_to_all_single

    def counted(output: torch.Tensor, given: torch.Tensor, receive: Any, send: list[int], group: Any = None) -> Any:
        nonlocal sent
        sent += (sum(send) - send[dist.get_rank(group)]) * (given.shape[1] if given.dim() > 1 else 1)
        return exchange(output, given, receive, send, group=group)

    with mock.patch.object(dist, "all_to_all_single", counted):
        found = gradients_once(work, strategy, precision)
    return replace(found, message_bytes=sent)
