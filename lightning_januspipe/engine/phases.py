"""Runs the phases of one step on the stages of one rank: takes messages apart, computes, and puts messages together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TypeVar

from torch import Tensor

from lightning_januspipe.engine.messages import Parts
from lightning_januspipe.engine.specs import ChainSpec, LossFunction, LossGradients, MicrobatchInput
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.schedule import Action, Phase

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Passed:
    """Holds what an action takes in, or hands on.

    Attributes:
        chain: From, or to, the same phase of the neighbouring stage.
        own: From, or to, another phase of the same stage: FE to FF, BF to BE. It matters for the last stage, where the
            energies are complete, and for split stages.
    """

    chain: Parts[Tensor] = field(default_factory=Parts)
    own: Parts[Tensor] = field(default_factory=Parts)


class StepPhases:
    """Runs the phases of one step on one rank.

    Args:
        stages: The stages whose phases this rank runs, by their index.
        chain: What all stages share.
        num_stages: Length of the chain.
        inputs: The micro-batches.
        actions: What will be run.
        loss: Called once for each micro-batch with (index, observables, derivatives); None in evaluation.
    """

    def __init__(
        self,
        stages: Mapping[int, Stage],
        chain: ChainSpec,
        num_stages: int,
        inputs: Sequence[MicrobatchInput],
        actions: Sequence[Action],
        loss: LossFunction | None,
    ) -> None:
        self._stages, self._chain, self._last = stages, chain, num_stages - 1
        self._inputs, self._loss = inputs, loss
        phases = [action for action in actions if not action.changes_state]
        self._following = dict(pairwise(phases)) if loss is not None else {}
        self._is_deferred = any(a.phase in (Phase.WF, Phase.WE) for a in phases)
        self._num_readers = Counter(a.microbatch for a in actions if a.phase in (Phase.BF, Phase.BE))
        self._observables: dict[int, Sequence[Tensor]] = {}
        self._derivatives: dict[int, Sequence[Tensor]] = {}
        self._seeds: dict[int, LossGradients] = {}

    def run(self, action: Action, came: Passed) -> Passed:
        """Runs a phase of a stage for a micro-batch.

        Args:
            action: What to run.
            came: What the actions before have handed on.

        Returns:
            What the actions after it take in.
        """
        run = {
            Phase.FE: self._forward_energy,
            Phase.FF: self._forward_force,
            Phase.BF: self._backward_force,
            Phase.BE: self._backward_energy,
        }.get(action.phase, self._weights)
        self._fetch_ahead(action)
        made = run(action, self._stages[action.stage], came)
        self._to_host(action)
        return made

    def _fetch_ahead(self, action: Action) -> None:
        """Starts to bring back what the action after this one reads, while this one runs."""
        following = self._following.get(action)
        if following is not None:
            self._stages[following.stage].fetch(following.microbatch, following.phase)

    def _to_host(self, action: Action) -> None:
        """Moves what an action has left to the host; in evaluation nothing is kept for long."""
        if self._loss is None:
            return
        following = self._following.get(action)
        is_own = following is not None and following[1:] == action[1:]
        self._stages[action.stage].to_host(action.microbatch, following.phase if following and is_own else None)

    def result(self, microbatch: int) -> tuple[list[Tensor], list[Tensor]] | None:
        """Returns observables and ∂E/∂x after FE and FF, where they are complete; None on other ranks."""
        if microbatch not in self._derivatives:
            return None
        return list(self._observables[microbatch]), list(self._derivatives[microbatch])

    def loss_gradients(self, microbatch: int) -> LossGradients:
        """Returns the seeds of the backward passes; the loss is evaluated once, when energies and forces are there."""
        if microbatch not in self._seeds:
            assert self._loss is not None
            result = self.result(microbatch)
            assert result is not None, "energies and forces come before the loss"
            self._seeds[microbatch] = self._loss(microbatch, *result)
        return self._seeds[microbatch]

    def _call(self, action: Action, function: Callable[..., _Result], *messages: Sequence[Tensor | None]) -> _Result:
        """Calls a method of a stage with the messages that it takes in; measurements override this."""
        return function(*messages)

    def _forward_energy(self, action: Action, stage: Stage, came: Passed) -> Passed:
        m, received = action.microbatch, came.chain.boundary
        run = partial(stage.forward_energy, m, self._inputs[m].tensors)
        boundary, values = self._call(action, run, received)
        known = dict(zip(self._chain.observables_before(action.stage), came.chain.observables, strict=True))
        known.update(zip(stage.function.observables, values, strict=True))
        observables = [known[i] for i in sorted(known)]
        own = Parts(received, (), observables if action.stage == self._last else ())
        return Passed(Parts(boundary, (), observables), own)

    def _forward_force(self, action: Action, stage: Stage, came: Passed) -> Passed:
        m = action.microbatch
        self._call(action, partial(stage.begin_force, m, self._inputs[m].tensors), came.own.boundary)
        seeds = self._chain.force_seeds(action.stage, came.chain.boundary)
        run = partial(stage.forward_force, m, create_graph=self._loss is not None)
        gradients, derivatives = self._call(action, run, seeds)
        if action.stage == self._last:
            observables = came.own.observables
        else:
            derivatives = [a + b for a, b in zip(came.chain.derivatives, derivatives, strict=True)]
            observables = came.chain.observables
        self._observables[m] = observables
        if action.stage == 0:
            self._derivatives[m] = derivatives
        return Passed(Parts(gradients, derivatives, observables))

    def _backward_force(self, action: Action, stage: Stage, came: Passed) -> Passed:
        m = action.microbatch
        if action.stage > 0:
            self._derivatives[m] = came.chain.derivatives
        derivatives, observables = self._derivatives[m], self._observables[m]
        seeds = self.loss_gradients(m)
        run = partial(stage.backward_force, m, defer=self._is_deferred)
        cotangents, force_part = self._call(action, run, came.chain.boundary, seeds.derivatives)
        self._seeds_read(m)
        return Passed(Parts(cotangents, derivatives), Parts(force_part, derivatives, observables))

    def _backward_energy(self, action: Action, stage: Stage, came: Passed) -> Passed:
        m = action.microbatch
        if came.own.derivatives:  # from the other rank of a split stage
            self._derivatives[m], self._observables[m] = came.own.derivatives, came.own.observables
        seeds = self.loss_gradients(m)
        run = partial(stage.backward_energy, m, defer=self._is_deferred, force_part=came.own.boundary)
        read = self._chain.read_cotangents(action.stage, came.chain.boundary, seeds.observables)
        cotangents = self._call(action, run, read, [seeds.observables[i] for i in stage.function.observables])
        self._seeds_read(m)
        return Passed(Parts(cotangents))

    def _weights(self, action: Action, stage: Stage, came: Passed) -> Passed:
        run = stage.weight_force if action.phase is Phase.WF else stage.weight_energy
        self._call(action, partial(run, action.microbatch))
        return Passed()

    def _seeds_read(self, m: int) -> None:
        self._num_readers[m] -= 1
        if not self._num_readers[m]:
            del self._seeds[m], self._observables[m], self._derivatives[m]
