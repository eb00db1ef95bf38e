"""Runs one stage and its phases (JanusPipe, section on SymFold): FE, FF, BF and BE of the same layers.

Each graph of autograd is walked once. BF goes back through the graph of FF and stops where it enters the graph of FE,
keeping the gradients that arrive there; BE starts from these and from the cotangents of the stage's outputs. The naive
form, which walks the graph of FF again in BE, does a sixth more work and makes BE the longest phase by far.

With ``defer``, BF and BE leave the products that only parameters wait for to WF and WE.
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
    BackwardGraph,
    DeferredWeights,
    Roots,
    explore,
    gradients_of,
    walk_graph,
    walk_to_parameters,
)
from lightning_januspipe.schedule import Phase


@dataclass
class _Inflight:
    """Keeps one micro-batch's values between its phases; each field is dropped after the last phase that reads it."""

    boundary_in: list[Tensor]
    boundary_out: list[Tensor]
    energies: list[Tensor]
    observables: list[Tensor]
    coordinates: list[Tensor]
    seeds: list[Tensor] = field(default_factory=list)
    derivatives: list[Tensor] = field(default_factory=list)
    boundary_gradients: list[Tensor] = field(default_factory=list)
    energy_graph: BackwardGraph | None = None
    entering: Roots = field(default_factory=list)
    boundary_part: list[Tensor | None] | None = None
    force_weights: DeferredWeights | None = None
    energy_weights: DeferredWeights | None = None


class Stage:
    """Runs the phases of one stage, for any number of micro-batches in flight.

    A micro-batch runs FE, FF, BF, BE, and if these are deferred WF any time after BF, and then WE after BE.

    Args:
        function: The stage as a pure function.
        gradients: Where parameter gradients are summed.
        autocast: What FF differentiates under; all other phases run outside autocast.
    """

    def __init__(self, function: StageFunction, gradients: GradientBuffers, autocast: Autocast = OFF) -> None:
        self.function = function
        self._gradients, self._autocast = gradients, autocast
        self._inflight: dict[int, _Inflight] = {}

    @property
    def num_inflight(self) -> int:
        """Returns the number of micro-batches between their first and their last phase here."""
        return len(self._inflight)

    def clear(self) -> None:
        """Forgets all micro-batches, after an error or an evaluation."""
        self._inflight.clear()

    def fetch(self, microbatch: int, phase: Phase) -> None:
        """Starts to bring back to the device what a phase will read, where stages keep that on the host.

        Args:
            microbatch: Index of the micro-batch.
            phase: The phase that this rank will run next; another action runs meanwhile.
        """

    def to_host(self, microbatch: int, following: Phase | None) -> None:
        """Moves what a micro-batch keeps to the host, where stages keep it there, after each phase.

        Args:
            microbatch: Index of the micro-batch.
            following: The phase of this micro-batch that follows at once, whose values stay; None for another one's.
        """

    def host_tensors(self) -> list[Tensor]:
        """Returns what all micro-batches keep on the host here."""
        return []

    def forward_energy(
        self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FE.

        Args:
            microbatch: Index of the micro-batch.
            tensors: The potential call's tensors.
            boundary: h_in from the stage before (none in the first stage).

        Returns:
            h_out for the stage after, and this stage's observables, both detached.
        """
        leaves = [h.detach().requires_grad_(_is_differentiable(h)) for h in boundary]
        with torch.enable_grad(), autocast_as(OFF):
            out = self.function(tensors, leaves)
        self._inflight[microbatch] = _Inflight(leaves, out.boundary, out.energies, out.observables, out.coordinates)
        return [h.detach() for h in out.boundary], [y.detach() for y in out.observables]

    def begin_force(self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> None:
        """Gets ready for FF. FE has run here, so there is nothing to do.

        Args:
            microbatch: Index of the micro-batch.
            tensors: The potential call's tensors.
            boundary: h_in, as FE has received it.
        """

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor | None], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FF.

        Args:
            microbatch: Index of the micro-batch.
            boundary_gradients: ∂E/∂h_out from the stage after (none in the last stage), None where a value leads to no
                energy.
            create_graph: Keep what BF needs; off in evaluation.

        Returns:
            ∂E/∂h_in for the stage before, and this stage's part of ∂E/∂x, both detached.
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
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs BF: back through the graph of FF, once.

        Args:
            microbatch: Index of the micro-batch.
            boundary_cotangents: u_in = ∂L/∂g_in from the stage before (none in the first stage).
            derivative_cotangents: v = ∂L/∂(∂E/∂x).
            defer: Leave to WF what only parameters wait for.

        Returns:
            u_out = ∂L/∂g_out for the stage after, and what another rank needs for BE: nothing, BE runs here.
        """
        state = self._inflight[microbatch]
        roots = _force_roots(state, boundary_cotangents, derivative_cotangents)
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
        found, state.entering, state.force_weights = walk_graph(graph, roots, inputs, defer=defer, retain_graph=True)
        sent = _for_all(found[: len(seeds)], state.seeds)
        num = len(seeds) + len(leaves)
        state.boundary_part = found[len(seeds) : num]
        if not defer:
            self._gradients.add(parameters, found[num:])
        state.derivatives, state.boundary_gradients, state.seeds = [], [], []
        return sent, []

    @autocast_as(OFF)
    def seed_cotangents(
        self, microbatch: int, boundary_cotangents: Sequence[Tensor], derivative_cotangents: Sequence[Tensor]
    ) -> list[Tensor]:
        """Returns u_out as BF does, and nothing else: no parameter gradients, and nothing for BE.

        Args:
            microbatch: Index of the micro-batch, after FF.
            boundary_cotangents: u_in.
            derivative_cotangents: v.
        """
        state = self._inflight[microbatch]
        roots = _force_roots(state, boundary_cotangents, derivative_cotangents)
        return _for_all(gradients_of(roots, _differentiated(state.seeds)), state.seeds)

    @autocast_as(OFF)
    def backward_energy(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor | None],
        observable_cotangents: Sequence[Tensor | None],
        *,
        defer: bool = False,
        force_part: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Runs BE: back through the graph of FE, once.

        Args:
            microbatch: Index of the micro-batch.
            boundary_cotangents: λ_out = ∂L/∂h_out from the stage after (none in the last stage), None where the loss
                does not read a value.
            observable_cotangents: ∂L/∂y of this stage's observables, None where the loss does not read one.
            defer: Leave to WE what only parameters wait for.
            force_part: μ_in of a split stage, from the rank that ran BF.

        Returns:
            λ_in = ∂L/∂h_in for the stage before.
        """
        state = self._inflight[microbatch]
        assert defer or state.force_weights is None, "BE without deferral needs what WF finds"
        roots = _rooted([*state.boundary_out, *state.observables], [*boundary_cotangents, *observable_cotangents])
        roots += state.entering
        leaves, parameters = _differentiated(state.boundary_in), self.function.parameters
        if defer:
            graph = self._energy_graph(state)
            found, _, state.energy_weights = walk_graph(graph, roots, leaves, defer=True, retain_graph=True)
        else:
            found = gradients_of(roots, [*leaves, *parameters])
            self._gradients.add(parameters, found[len(leaves) :])
        if state.boundary_part is not None:
            found[: len(leaves)] = [_sum(a, b) for a, b in zip(found, state.boundary_part, strict=False)]
        sent = _for_all(found[: len(leaves)], state.boundary_in)
        if force_part:
            sent = [a + b if _is_differentiable(a) else a for a, b in zip(sent, force_part, strict=True)]
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
        """Runs WF: parameter gradients that BF deferred; also keeps for WE what arrives at the graph of FE."""
        state = self._inflight[microbatch]
        assert state.force_weights is not None, "BF did not defer, or WF ran before"
        deferred, state.force_weights = state.force_weights, None
        parameters = self.function.parameters
        found, entering = walk_to_parameters(deferred, parameters, retain_graph=True)
        self._gradients.add(parameters, found)
        state.entering = state.entering + entering

    @autocast_as(OFF)
    def weight_energy(self, microbatch: int) -> None:
        """Runs WE: parameter gradients that BE deferred, and gradients of what WF kept."""
        state = self._inflight[microbatch]
        assert state.energy_weights is not None, "BE did not defer, or did not run yet"
        assert state.force_weights is None, "WE needs what WF finds"
        del self._inflight[microbatch]
        state.energy_weights.roots += state.entering
        parameters = self.function.parameters
        found, _ = walk_to_parameters(state.energy_weights, parameters, retain_graph=False)
        self._gradients.add(parameters, found)

    def _energy_graph(self, state: _Inflight) -> BackwardGraph:
        if state.energy_graph is not None:
            return state.energy_graph
        outputs = _differentiated([*state.boundary_out, *state.energies, *state.observables])
        leaves = dict.fromkeys(self.function.parameters, WEIGHTS) | dict.fromkeys(
            _differentiated(state.boundary_in), PATH
        )
        return explore((get_gradient_edge(v).node for v in outputs), leaves)


class SplitStage(Stage):
    """Runs the phases of a stage whose FE and BE (and WE) are on one rank, and FF and BF on another one.

    Unfolded schedules, baselines to compare with, place stages like that. The rank of FF and BF evaluates FE once more,
    so that both ranks have a graph of it, and the gradients of the parameters are on both. An object of this class runs
    the phases of either rank; in one process it runs all of them, without mixing the two ranks' graphs.

    Args: See :class:`Stage`.
    """

    def __init__(self, function: StageFunction, gradients: GradientBuffers, autocast: Autocast = OFF) -> None:
        super().__init__(function, gradients, autocast)
        self._force_rank = Stage(function, gradients, autocast)

    @property
    def num_inflight(self) -> int:
        """Returns the number of micro-batches between their first and their last phase here."""
        return super().num_inflight + self._force_rank.num_inflight

    def clear(self) -> None:
        """Forgets all micro-batches."""
        super().clear()
        self._force_rank.clear()

    def begin_force(self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> None:
        """Evaluates FE again, on the rank of FF; see :meth:`Stage.begin_force`."""
        self._force_rank.forward_energy(microbatch, tensors, boundary)
        self._force_rank._inflight[microbatch].observables = []  # BE reads them, which is on the other rank

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor | None], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FF; see :meth:`Stage.forward_force`."""
        return self._force_rank.forward_force(microbatch, boundary_gradients, create_graph=create_graph)

    @autocast_as(OFF)
    def backward_force(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor],
        derivative_cotangents: Sequence[Tensor],
        *,
        defer: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs BF: back through the graphs of FF and of FE's recomputation.

        Args:
            microbatch: Index of the micro-batch.
            boundary_cotangents: u_in = ∂L/∂g_in from the stage before (none in the first stage).
            derivative_cotangents: v = ∂L/∂(∂E/∂x).
            defer: Has no effect: the rank of FF and BF defers nothing.

        Returns:
            u_out = ∂L/∂g_out for the stage after, and μ_in, the part of ∂L/∂h_in through this stage's derivatives,
            which the rank that runs BE adds to its own.
        """
        state = self._force_rank._inflight.pop(microbatch)
        roots = _force_roots(state, boundary_cotangents, derivative_cotangents)
        seeds, leaves = _differentiated(state.seeds), _differentiated(state.boundary_in)
        parameters = self.function.parameters
        found = gradients_of(roots, [*seeds, *leaves, *parameters])
        num = len(seeds) + len(leaves)
        self._gradients.add(parameters, found[num:])
        return _for_all(found[: len(seeds)], state.seeds), _for_all(found[len(seeds) : num], state.boundary_in)


def _force_roots(
    state: _Inflight, boundary_cotangents: Sequence[Tensor], derivative_cotangents: Sequence[Tensor]
) -> Roots:
    """Returns where BF starts: at the results of FF, with u_in and v."""
    results = [*state.derivatives, *state.boundary_gradients]
    return _rooted(results, [*derivative_cotangents, *boundary_cotangents])


def _rooted(values: Sequence[Tensor], cotangents: Sequence[Tensor | None]) -> Roots:
    """Returns where to start a walk: the values that have a gradient and a cotangent."""
    pairs = zip(values, cotangents, strict=True)
    return [(get_gradient_edge(v), g) for v, g in pairs if v.requires_grad and g is not None]


def _differentiated(values: Sequence[Tensor]) -> list[Tensor]:
    return [v for v in values if v.requires_grad]


def _for_all(gradients: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Tensor]:
    """Returns a gradient for each value: zeros where it has none or requires none.

    Args:
        gradients: The gradients of the values that require one, in their order; None where there is none.
        values: All values.
    """
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
