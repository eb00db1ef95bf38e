"""One stage and its phases (JanusPipe, section on SymFold): FE, FF, BF and BE of the same layers on one rank.

Each graph of autograd is walked once. BF goes back through the graph of FF and stops where it enters the graph of FE,
keeping the gradients that arrive there; BE starts from these and from the cotangents of the stage's outputs. The naive
form, which walks the graph of FF again in BE, does a sixth more work and makes BE the longest phase by far.

Two variations: with ``defer``, BF and BE leave the products that only parameters wait for to WF and WE; and a stage
may be *apart*, with FE and BE on one rank and FF and BF on another one that evaluates FE again (unfolded baselines).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from lightning_januspipe.engine.autocast import OFF, Autocast, autocast_as
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import StageFunction
from lightning_januspipe.engine.weight_split import (
    PATH,
    WEIGHTS,
    Deferred,
    Graph,
    Rooted,
    explore,
    gradients_of,
    walk,
    walk_to_parameters,
)


@dataclass
class _Inflight:
    """What one micro-batch keeps between its phases; each field is dropped after the last phase that reads it."""

    boundary_in: list[Tensor]
    boundary_out: list[Tensor]
    energies: list[Tensor]
    observables: list[Tensor]
    coordinates: list[Tensor]
    apart: bool = False
    seeds: list[Tensor] = field(default_factory=list)
    derivatives: list[Tensor] = field(default_factory=list)
    boundary_gradients: list[Tensor] = field(default_factory=list)
    energy_graph: Graph | None = None
    entering: Rooted = field(default_factory=list)
    boundary_part: list[Tensor | None] | None = None
    force_weights: Deferred | None = None
    energy_weights: Deferred | None = None


class Stage:
    """Runs the phases of one stage, for any number of micro-batches in flight.

    A micro-batch runs FE, FF, BF, BE, and if these are deferred WF any time after BF, and then WE after BE. In a stage
    that is apart, one rank runs FE and BE (and WE), the other one :meth:`recompute_energy`, FF and
    :meth:`backward_force_apart`.

    Args:
        function: the stage as a pure function.
        gradients: where parameter gradients are added up.
        autocast: what FF differentiates under; all other phases run outside autocast.
    """

    def __init__(self, function: StageFunction, gradients: GradientBuffers, autocast: Autocast = OFF) -> None:
        self.function = function
        self._gradients, self._autocast = gradients, autocast
        self._inflight: dict[int, _Inflight] = {}

    @property
    def num_inflight(self) -> int:
        """Micro-batches between their first and their last phase here."""
        return len(self._inflight)

    def clear(self) -> None:
        """Forget all micro-batches, after an error or an evaluation."""
        self._inflight.clear()

    def forward_energy(
        self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """FE: values for the next stage, and this stage's observables, both detached."""
        state = self._evaluate(tensors, boundary)
        self._inflight[microbatch] = state
        return [h.detach() for h in state.boundary_out], [y.detach() for y in state.observables]

    def recompute_energy(self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> None:
        """FE again, on the rank that runs FF and BF of a stage whose FE and BE are on another one."""
        state = self._evaluate(tensors, boundary)
        state.apart, state.observables = True, []
        self._inflight[microbatch] = state

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor | None], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """FF: ∂E/∂h_in for the stage before, and this stage's part of ∂E/∂x, both detached.

        Args:
            microbatch: index of the micro-batch.
            boundary_gradients: ∂E/∂h_out from the stage after (none in the last stage), None where a value leads to no
                energy.
            create_graph: keep what BF needs; off in evaluation.
        """
        state = self._inflight[microbatch]
        if boundary_gradients:
            # Of a boundary that takes no gradient (frozen parameters before it, no geometry) the seed is not used.
            state.seeds = [
                torch.zeros_like(h) if g is None else g.detach().requires_grad_(create_graph and _is_differentiable(g))
                for h, g in zip(state.boundary_out, boundary_gradients, strict=True)
            ]
        roots = [(e, torch.ones_like(e)) for e in state.energies if e.requires_grad]
        seeded = zip(state.boundary_out, state.seeds, boundary_gradients or state.seeds, strict=True)
        roots += [(h, seed) for h, seed, given in seeded if h.requires_grad and given is not None]
        inputs = [*state.coordinates, *_differentiated(state.boundary_in)]
        with torch.enable_grad(), autocast_as(self._autocast):
            found = gradients_of(roots, inputs, create_graph=create_graph, retain_graph=create_graph)
        num = len(state.coordinates)
        state.derivatives = [_or_zeros(g, x) for g, x in zip(found[:num], inputs[:num], strict=True)]
        state.boundary_gradients = _for_all(found[num:], state.boundary_in)
        gradients = [g.detach() for g in state.boundary_gradients]
        derivatives = [g.detach() for g in state.derivatives]
        if not create_graph:
            del self._inflight[microbatch]
        return gradients, derivatives

    @autocast_as(OFF)
    def backward_force(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor],
        derivative_cotangents: Sequence[Tensor],
        *,
        defer: bool = False,
    ) -> list[Tensor]:
        """BF: back through the graph of FF, once.

        Args:
            microbatch: index of the micro-batch.
            boundary_cotangents: u_in = ∂L/∂g_in from the stage before (none in the first stage).
            derivative_cotangents: v = ∂L/∂(∂E/∂x).
            defer: leave to WF what only parameters wait for.

        Returns:
            u_out = ∂L/∂g_out for the stage after.
        """
        state = self._inflight[microbatch]
        assert not state.apart, "the other rank runs BE: use backward_force_apart"
        roots = _rooted([*state.derivatives, *state.boundary_gradients], [*derivative_cotangents, *boundary_cotangents])
        seeds, leaves = _differentiated(state.seeds), _differentiated(state.boundary_in)
        parameters = self.function.parameters
        energy_graph = self._energy_graph(state)
        graph = explore(
            (edge.node for edge, _ in roots),
            dict.fromkeys(parameters, WEIGHTS) | dict.fromkeys((*seeds, *leaves), PATH),
            energy_graph,
        )
        state.energy_graph = energy_graph if defer else None  # most likely BE does the same
        inputs = [*seeds, *leaves] if defer else [*seeds, *leaves, *parameters]
        found, state.entering, state.force_weights = walk(graph, roots, inputs, defer=defer, retain_graph=True)
        sent = _for_all(found[: len(seeds)], state.seeds)
        num = len(seeds) + len(leaves)
        state.boundary_part = found[len(seeds) : num]
        if not defer:
            self._gradients.add(parameters, found[num:])
        state.derivatives, state.boundary_gradients, state.seeds = [], [], []
        return sent

    @autocast_as(OFF)
    def backward_force_apart(
        self, microbatch: int, boundary_cotangents: Sequence[Tensor], derivative_cotangents: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """BF of a stage whose FE and BE are on another rank: back through the graphs of FF and of FE's recomputation.

        Args:
            microbatch: index of the micro-batch.
            boundary_cotangents: u_in = ∂L/∂g_in from the stage before (none in the first stage).
            derivative_cotangents: v = ∂L/∂(∂E/∂x).

        Returns:
            u_out = ∂L/∂g_out for the stage after, and μ_in, the part of ∂L/∂h_in through this stage's derivatives,
            which the rank that runs BE adds to its own.
        """
        state = self._inflight.pop(microbatch)
        assert state.apart, "FE was not recomputed: use backward_force"
        roots = _rooted([*state.derivatives, *state.boundary_gradients], [*derivative_cotangents, *boundary_cotangents])
        seeds, leaves = _differentiated(state.seeds), _differentiated(state.boundary_in)
        parameters = self.function.parameters
        found = gradients_of(roots, [*seeds, *leaves, *parameters])
        num = len(seeds) + len(leaves)
        self._gradients.add(parameters, found[num:])
        return _for_all(found[: len(seeds)], state.seeds), _for_all(found[len(seeds) : num], state.boundary_in)

    @autocast_as(OFF)
    def backward_energy(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor | None],
        observable_cotangents: Sequence[Tensor | None],
        *,
        defer: bool = False,
        more: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """BE: back through the graph of FE, once.

        Args:
            microbatch: index of the micro-batch.
            boundary_cotangents: λ_out = ∂L/∂h_out from the stage after (none in the last stage), None where the loss
                does not read a value.
            observable_cotangents: ∂L/∂y of this stage's observables, None where the loss does not read one.
            defer: leave to WE what only parameters wait for.
            more: μ_in from the rank that runs FF and BF, where that is another one.

        Returns:
            λ_in = ∂L/∂h_in for the stage before.
        """
        state = self._inflight[microbatch]
        assert not state.apart, "BE runs on the other rank"
        assert defer or state.force_weights is None, "BE without deferral needs what WF finds"
        roots = _rooted([*state.boundary_out, *state.observables], [*boundary_cotangents, *observable_cotangents])
        roots += state.entering
        leaves, parameters = _differentiated(state.boundary_in), self.function.parameters
        if defer:
            graph = self._energy_graph(state)
            found, _, state.energy_weights = walk(graph, roots, leaves, defer=True, retain_graph=True)
        else:
            found = gradients_of(roots, [*leaves, *parameters])
            self._gradients.add(parameters, found[len(leaves) :])
        if state.boundary_part is not None:
            found[: len(leaves)] = [_sum(a, b) for a, b in zip(found, state.boundary_part, strict=False)]
        sent = _for_all(found[: len(leaves)], state.boundary_in)
        if more:
            sent = [a + b if _is_differentiable(a) else a for a, b in zip(sent, more, strict=True)]
        if defer:
            # Of the graph of FE only what the deferred joins hold is left.
            self._inflight[microbatch] = _Inflight(
                [], [], [], [], [], force_weights=state.force_weights, energy_weights=state.energy_weights
            )
        else:
            del self._inflight[microbatch]
        return sent

    @autocast_as(OFF)
    def weight_force(self, microbatch: int) -> None:
        """WF: parameter gradients that BF deferred; also keeps for WE what arrives at the graph of FE."""
        state = self._inflight[microbatch]
        assert state.force_weights is not None, "BF did not defer, or WF ran before"
        deferred, state.force_weights = state.force_weights, None
        parameters = self.function.parameters
        found, entering = walk_to_parameters(deferred, parameters, retain_graph=True)
        self._gradients.add(parameters, found)
        state.entering = state.entering + entering

    @autocast_as(OFF)
    def weight_energy(self, microbatch: int) -> None:
        """WE: parameter gradients that BE deferred, and those of what WF kept."""
        state = self._inflight[microbatch]
        assert state.energy_weights is not None, "BE did not defer, or did not run yet"
        assert state.force_weights is None, "WE needs what WF finds"
        del self._inflight[microbatch]
        state.energy_weights.roots += state.entering
        parameters = self.function.parameters
        found, _ = walk_to_parameters(state.energy_weights, parameters, retain_graph=False)
        self._gradients.add(parameters, found)

    def _evaluate(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> _Inflight:
        leaves = [h.detach().requires_grad_(_is_differentiable(h)) for h in boundary]
        with torch.enable_grad(), autocast_as(OFF):
            out = self.function(tensors, leaves)
        return _Inflight(leaves, out.boundary, out.energies, out.observables, out.coordinates)

    def _energy_graph(self, state: _Inflight) -> Graph:
        if state.energy_graph is not None:
            return state.energy_graph
        outputs = _differentiated([*state.boundary_out, *state.energies, *state.observables])
        leaves = dict.fromkeys(self.function.parameters, WEIGHTS) | dict.fromkeys(
            _differentiated(state.boundary_in), PATH
        )
        return explore((get_gradient_edge(v).node for v in outputs), leaves)


def _rooted(values: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Rooted:
    """Where to start a walk: the values that have a gradient and a cotangent."""
    pairs = zip(values, cotangents, strict=True)
    return [(get_gradient_edge(v), g) for v, g in pairs if v.requires_grad and g is not None]


def _differentiated(values: Sequence[Tensor]) -> list[Tensor]:
    return [v for v in values if v.requires_grad]


def _for_all(gradients: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Tensor]:
    """One gradient for each value, zeros where there is none, from those of the values that require one."""
    given = iter(gradients)
    return [_or_zeros(next(given) if v.requires_grad else None, v) for v in values]


def _is_differentiable(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def _or_zeros(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
