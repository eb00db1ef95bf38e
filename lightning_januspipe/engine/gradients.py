"""Sums the parameter gradients of one optimizer step aside, and accumulates them into ``.grad``.

Lightning calls ``zero_grad`` between ``training_step`` and ``backward``, so ``p.grad`` must not be written earlier.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class GradientBuffers:
    """Sums the gradients of each parameter; gradients in half precision are summed in float32.

    Args:
        only: The parameters whose gradients are kept; None for all.
    """

    def __init__(self, only: Collection[nn.Parameter] | None = None) -> None:
        self._only = None if only is None else frozenset(only)
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._owned: set[nn.Parameter] = set()

    def add(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        """Adds one gradient to each parameter's sum (None adds nothing)."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None or (self._only is not None and parameter not in self._only):
                continue
            total = self._sums.get(parameter)
            if total is None:
                self._sums[parameter] = gradient.detach()
            elif parameter in self._owned:
                total.add_(gradient.detach())
            else:  # what autograd returned may be shared with another gradient
                self._sums[parameter] = total.to(_summed_in(total.dtype)) + gradient.detach()
                self._owned.add(parameter)

    def get(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns a parameter's sum so far, None if there is none."""
        return self._sums.get(parameter)

    def take(self, parameter: nn.Parameter) -> Tensor | None:
        """Returns a parameter's sum, None if there is none, and forgets it."""
        self._owned.discard(parameter)
        return self._sums.pop(parameter, None)

    def items(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Returns all parameters that have a sum, with their sums."""
        return list(self._sums.items())

    def sums(self) -> list[Tensor]:
        """Returns all sums so far."""
        return list(self._sums.values())

    def accumulate_into_grad(self, scale: float, but: Collection[nn.Parameter] = ()) -> None:
        """Adds the sums, times ``scale``, to ``p.grad``, and forgets them.

        Args:
            scale: The factor.
            but: Parameters whose sums stay here, because they are reduced from here.
        """
        for parameter in [p for p in self._sums if p not in but]:
            total = self.take(parameter)
            assert total is not None
            scaled = (total * scale).to(parameter.dtype)
            parameter.grad = scaled if parameter.grad is None else parameter.grad + scaled

    def clear(self) -> None:
        """Forgets all sums."""
        self._sums.clear()
        self._owned.clear()


def _summed_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def require_finite_gradients(named: Iterable[tuple[str, Tensor | None]], rank: int) -> None:
    """Refuses gradients that are NaN or infinite, before they are reduced and spread to all ranks.

    Args:
        named: Gradients, or parts of them, with the names of their parameters.
        rank: This global rank.

    Raises:
        FloatingPointError: A gradient of this rank is not finite.
    """
    found = [(n, g) for n, g in named if g is not None and not g.is_sparse and g.numel()]
    if not found:
        return
    largest = torch.stack([m.double() for m in torch._foreach_norm([g for _, g in found], math.inf)])
    are_finite = torch.isfinite(largest).tolist()
    bad = list(dict.fromkeys(n for (n, _), is_finite in zip(found, are_finite, strict=True) if not is_finite))
    if bad:
        more = f" and of {len(bad) - 3} more parameters" if len(bad) > 3 else ""
        raise FloatingPointError(
            f"on global rank {rank} the gradient of {', '.join(bad[:3])}{more} is NaN or infinite, although the loss "
            "is finite. Look for operations whose derivative is not finite at some structures (a square root or norm "
            "at zero, a division by a distance), for hooks that change gradients, or lower the learning rate."
        )


def reduce_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup, divide_by: int = 1) -> None:
    """Sums ``p.grad`` over a group (a missing gradient counts as zero), and divides.

    There is one collective for each dtype: all gradients travel in one buffer. A parameter that has no gradient on any
    rank keeps none, as in one process.

    Args:
        parameters: The same parameters on every rank of the group, in the same order.
        group: The ranks that hold a copy.
        divide_by: 1 for a sum, the group's size for a mean.
    """
    parameters = [p for p in parameters if p.requires_grad]
    if not parameters:
        return
    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=device)
    dist.all_reduce(present, group=group)
    used = [p for p, n in zip(parameters, present.tolist(), strict=True) if n > 0]
    for dtype in dict.fromkeys(p.dtype for p in used):
        same = [p for p in used if p.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).detach().reshape(-1) for p in same])
        dist.all_reduce(flat, group=group)
        if divide_by != 1:
            flat /= divide_by
        for p, g in zip(same, flat.split([p.numel() for p in same]), strict=True):
            p.grad = g.view_as(p).clone() if p.grad is None else p.grad.copy_(g.view_as(p))
