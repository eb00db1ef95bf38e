"""One stage and its four phases (JanusPipe, section on SymFold): FE, FF, BF and BE of the same layers on one rank.

Each graph of autograd is walked once. BF goes back through the graph of FF and stops where it enters the graph of FE,
keeping the gradients that arrive there; BE starts from these and from the cotangents of the stage's outputs. The naive
form, which walks the graph of FF again in BE, does a sixth more work and makes BE the longest phase by far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge
from torch.autograd.graph import Node as GraphNode

from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import StageFunction


@dataclass
class _Inflight:
    """What one micro-batch keeps between its phases; each field is dropped after the last phase that reads it."""

    boundary_in: list[Tensor]
    boundary_out: list[Tensor]
    energies: list[Tensor]
    observables: list[Tensor]
    coordinates: list[Tensor]
    seeds: list[Tensor] = field(default_factory=list)
    derivatives: list[Tensor] = field(default_factory=list)
    boundary_gradients: list[Tensor] = field(default_factory=list)
    entering: list[tuple[GradientEdge, Tensor]] = field(default_factory=list)
    boundary_part: list[Tensor | None] = field(default_factory=list)


class Stage:
    """Runs the four phases of one stage, for any number of micro-batches in flight.

    Args:
        function: the stage as a pure function.
        gradients: where parameter gradients are added up.
    """

    def __init__(self, function: StageFunction, gradients: GradientBuffers) -> None:
        self.function = function
        self._gradients = gradients
        self._inflight: dict[int, _Inflight] = {}

    @property
    def num_inflight(self) -> int:
        """Micro-batches between their FE and their BE."""
        return len(self._inflight)

    def clear(self) -> None:
        """Forget all micro-batches, after an error or an evaluation."""
        self._inflight.clear()

    def forward_energy(
        self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """FE: values for the next stage, and this stage's observables, both detached."""
        leaves = [h.detach().requires_grad_(_is_differentiable(h)) for h in boundary]
        with torch.enable_grad():
            out = self.function(tensors, leaves)
        self._inflight[microbatch] = _Inflight(leaves, out.boundary, out.energies, out.observables, out.coordinates)
        return [h.detach() for h in out.boundary], [y.detach() for y in out.observables]

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """FF: ∂E/∂h_in for the stage before, and this stage's part of ∂E/∂x, both detached.

        Args:
            microbatch: index of the micro-batch.
            boundary_gradients: ∂E/∂h_out from the stage after (none in the last stage).
            create_graph: keep what BF needs; off in evaluation.
        """
        state = self._inflight[microbatch]
        if boundary_gradients:
            # Of a boundary that takes no gradient (frozen parameters before it, no geometry) the seed is not used.
            state.seeds = [
                g.detach().requires_grad_(create_graph and _is_differentiable(g)) for g in boundary_gradients
            ]
        roots = [e for e in state.energies if e.requires_grad]
        seeds = [torch.ones_like(e) for e in roots]
        for value, seed in zip(state.boundary_out, state.seeds, strict=True):
            if value.requires_grad:
                roots.append(value)
                seeds.append(seed)
        inputs = [*state.coordinates, *(h for h in state.boundary_in if h.requires_grad)]
        with torch.enable_grad():
            found = _grad(roots, inputs, seeds, create_graph=create_graph, retain_graph=create_graph)
        num = len(state.coordinates)
        state.derivatives = [_or_zeros(g, x) for g, x in zip(found[:num], inputs[:num], strict=True)]
        rest = iter(found[num:])
        state.boundary_gradients = [_or_zeros(next(rest) if h.requires_grad else None, h) for h in state.boundary_in]
        gradients = [g.detach() for g in state.boundary_gradients]
        derivatives = [g.detach() for g in state.derivatives]
        if not create_graph:
            del self._inflight[microbatch]
        return gradients, derivatives

    def backward_force(
        self, microbatch: int, boundary_cotangents: Sequence[Tensor], derivative_cotangents: Sequence[Tensor]
    ) -> list[Tensor]:
        """BF: back through the graph of FF, once.

        Args:
            microbatch: index of the micro-batch.
            boundary_cotangents: u_in = ∂L/∂g_in from the stage before (none in the first stage).
            derivative_cotangents: v = ∂L/∂(∂E/∂x).

        Returns:
            u_out = ∂L/∂g_out for the stage after.
        """
        state = self._inflight[microbatch]
        roots, cotangents = [], []
        given = [*derivative_cotangents, *boundary_cotangents]
        for value, cotangent in zip([*state.derivatives, *state.boundary_gradients], given, strict=True):
            if value.requires_grad:
                roots.append(value)
                cotangents.append(cotangent)
        parameters = self.function.parameters
        seeds = [g for g in state.seeds if g.requires_grad]
        inputs = [*seeds, *(h for h in state.boundary_in if h.requires_grad), *parameters]
        forward_roots = [v for v in (*state.boundary_out, *state.energies) if v.grad_fn is not None]
        entering, remove = _hold_back(roots, forward_roots)
        try:
            found = _grad(roots, inputs, cotangents, retain_graph=True)
        finally:
            remove()
        num = len(seeds)
        given_back = iter(found[:num])
        sent = [_or_zeros(next(given_back) if g.requires_grad else None, g) for g in state.seeds]
        num_boundary = len(inputs) - num - len(parameters)
        state.boundary_part = found[num : num + num_boundary]
        self._gradients.add(parameters, found[num + num_boundary :])
        state.entering = [
            (GradientEdge(node, i), g)
            for node, gradients in entering.items()
            for i, g in enumerate(gradients)
            if g is not None
        ]
        state.derivatives, state.boundary_gradients, state.seeds = [], [], []
        return sent

    def backward_energy(
        self, microbatch: int, boundary_cotangents: Sequence[Tensor], observable_cotangents: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """BE: back through the graph of FE, once.

        Args:
            microbatch: index of the micro-batch.
            boundary_cotangents: λ_out = ∂L/∂h_out from the stage after (none in the last stage).
            observable_cotangents: ∂L/∂y of this stage's observables, None where the loss does not read one.

        Returns:
            λ_in = ∂L/∂h_in for the stage before.
        """
        state = self._inflight.pop(microbatch)
        roots: list[Tensor | GradientEdge] = []
        cotangents: list[Tensor] = []
        outputs = [*state.boundary_out, *state.observables]
        for value, cotangent in zip(outputs, [*boundary_cotangents, *observable_cotangents], strict=True):
            if value.requires_grad and cotangent is not None:
                roots.append(value)
                cotangents.append(cotangent)
        for edge, gradient in state.entering:
            roots.append(edge)
            cotangents.append(gradient)
        parameters = self.function.parameters
        leaves = [h for h in state.boundary_in if h.requires_grad]
        found = _grad(roots, [*leaves, *parameters], cotangents)
        self._gradients.add(parameters, found[len(leaves) :])
        sums = iter([_sum(a, b) for a, b in zip(found[: len(leaves)], state.boundary_part, strict=True)])
        return [_or_zeros(next(sums) if h.requires_grad else None, h) for h in state.boundary_in]


def _grad(
    roots: Sequence[Tensor | GradientEdge],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> list[Tensor | None]:
    """``torch.autograd.grad`` that gives None for what is not reached, also where nothing is differentiated."""
    if not roots or not inputs:
        return [None] * len(inputs)
    return list(
        torch.autograd.grad(
            list(roots),  # type: ignore[arg-type]
            list(inputs),
            list(cotangents),
            create_graph=create_graph,
            retain_graph=retain_graph,
            allow_unused=True,
        )
    )


def _hold_back(
    roots: Sequence[Tensor], forward_roots: Sequence[Tensor]
) -> tuple[dict[GraphNode, tuple[Tensor | None, ...]], Callable[[], None]]:
    """Stop gradients where the graph of FF enters the graph of FE, and keep them.

    Returns:
        The gradients by node, filled while the graph of FF is walked, and a function that lifts the stop.
    """
    forward = _reachable(n for n in (v.grad_fn for v in forward_roots) if n is not None)
    borders: set[GraphNode] = set()
    seen: set[GraphNode] = set()
    stack = [r.grad_fn for r in roots if r.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            if following is None or following in seen:
                continue
            if following not in forward:
                stack.append(following)
            elif following.next_functions:  # leaves (AccumulateGrad) take their gradient directly
                borders.add(following)
    kept: dict[GraphNode, tuple[Tensor | None, ...]] = {}

    def keep(node: GraphNode) -> Callable[[tuple[Tensor | None, ...]], tuple[None, ...]]:
        def hook(gradients: tuple[Tensor | None, ...]) -> tuple[None, ...]:
            kept[node] = gradients
            return tuple(None for _ in gradients)  # undefined gradients: nothing below does any work

        return hook

    handles = [node.register_prehook(keep(node)) for node in borders]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return kept, remove


def _reachable(roots: Iterable[GraphNode]) -> set[GraphNode]:
    seen: set[GraphNode] = set()
    stack = list(roots)
    while stack:
        node = stack.pop()
        if node not in seen:
            seen.add(node)
            stack.extend(n for n, _ in node.next_functions if n is not None and n not in seen)
    return seen


def _is_differentiable(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _or_zeros(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
