"""Experts that are chosen by element, so that a mixture of them leaves the energy surface smooth."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lightning_januspipe.experts.grouped import grouped_linear


class GroupedLinear(nn.Module):
    """Applies to each row the linear map of its group.

    Args:
        num_groups: Number of maps.
        in_features: Width of the rows.
        out_features: Width of the results.
        bias: Whether each map has a bias.

    Raises:
        ValueError: A number is less than 1.
    """

    def __init__(self, num_groups: int, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        for name, value in (("num_groups", num_groups), ("in_features", in_features), ("out_features", out_features)):
            if value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        self.weight = nn.Parameter(torch.empty(num_groups, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_groups, out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws weights and biases as ``torch.nn.Linear`` does."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, group: Tensor) -> Tensor:
        """Maps rows.

        Args:
            x: (R, in_features) rows.
            group: (R,) the group of each row.

        Returns:
            (R, out_features)
        """
        result = grouped_linear(x, self.weight, group)
        return result if self.bias is None else result + self.bias[group]


class ElementExperts(nn.Module):
    """Computes each row by the experts of its element, weighted by the element's gates.

    An expert is a gated perceptron, SiLU(core) · sigmoid(gate), as in MatRIS, and a linear map after it where
    ``hidden_features`` is given. The experts of an element are the ``top_k`` with the largest learned logits, and their
    gates are the softmax of these logits. They depend on no position: along a trajectory the same experts are active,
    and the energy stays smooth. (That the MatRIS-MoE of Janus, arXiv 2604.15821, routes by element is published; gates
    and shared expert are a choice of this package.)

    Args:
        num_elements: Number of elements.
        num_experts: Number of experts.
        in_features: Width of the rows.
        out_features: Width of the results.
        top_k: Number of experts of each element.
        has_shared: Whether one more expert, a gated perceptron without a hidden width, computes all rows, with a weight
            of 1.
        hidden_features: Width of each expert's gated perceptron, whose results a linear map then takes to
            ``out_features``; None for experts without this map.
        bias: Whether the maps of the experts have biases.

    Raises:
        ValueError: A number is out of its range.

    Example:
        >>> experts = ElementExperts(num_elements=3, num_experts=8, in_features=16, out_features=16, top_k=2)
        >>> experts(torch.ones(5, 16), torch.tensor([0, 1, 1, 2, 0])).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        num_elements: int,
        num_experts: int,
        in_features: int,
        out_features: int,
        top_k: int = 2,
        has_shared: bool = False,
        hidden_features: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if num_elements < 1:
            raise ValueError(f"num_elements={num_elements}; expected at least 1")
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k={top_k}; expected 1 to num_experts={num_experts}")
        self.top_k = top_k
        self.logits = nn.Parameter(torch.empty(num_elements, num_experts))
        self.reset_parameters()
        width = out_features if hidden_features is None else hidden_features
        self.core = GroupedLinear(num_experts, in_features, width, bias)
        self.gate = GroupedLinear(num_experts, in_features, width, bias)
        self.out = None if hidden_features is None else GroupedLinear(num_experts, width, out_features, bias)
        self.shared_core = nn.Linear(in_features, out_features) if has_shared else None
        self.shared_gate = nn.Linear(in_features, out_features) if has_shared else None

    def reset_parameters(self) -> None:
        """Draws the logits of the gates; the experts draw their own weights."""
        nn.init.normal_(self.logits)

    def routes(self) -> tuple[Tensor, Tensor]:
        """Returns the gates and the experts of each element, both (num_elements, top_k)."""
        logits, experts = self.logits.topk(self.top_k, dim=1)
        return logits.softmax(dim=1), experts

    def num_inactive(self) -> int:
        """Returns the number of parameters of the experts that no row of one element reads."""
        num_experts = self.logits.shape[1]
        of_experts = [p for part in (self.core, self.gate, self.out) if part is not None for p in part.parameters()]
        return sum(p.numel() for p in of_experts) // num_experts * (num_experts - self.top_k)

    def forward(self, x: Tensor, element: Tensor) -> Tensor:
        """Computes rows.

        Args:
            x: (R, in_features) rows of atoms or edges.
            element: (R,) index of the element that chooses the experts of each row: the atom's, or that of the atom
                that an edge belongs to.

        Returns:
            (R, out_features)
        """
        gates, experts = self.routes()
        # One expert of each row at a time: rows stay rows, which may be sharded over graph ranks.
        parts = [gates[element, i, None] * self._expert(x, experts[element, i]) for i in range(self.top_k)]
        if self.shared_core is not None and self.shared_gate is not None:
            parts.append(nn.functional.silu(self.shared_core(x)) * self.shared_gate(x).sigmoid())
        return torch.stack(parts).sum(0)

    def _expert(self, x: Tensor, expert: Tensor) -> Tensor:
        gated = nn.functional.silu(self.core(x, expert)) * self.gate(x, expert).sigmoid()
        return gated if self.out is None else self.out(gated, expert)
