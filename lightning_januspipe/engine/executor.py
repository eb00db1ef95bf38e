"""The one loop that runs a schedule: messages in, phase, messages out.

What travels with each phase (stage s of S):

======  ==========  ==========================================================================
phase   direction   message
======  ==========  ==========================================================================
FE      s -> s + 1  boundary h, observables computed so far
FF      s -> s - 1  ∂E/∂h, running ∂E/∂x, all observables
BF      s -> s + 1  u = ∂L/∂(∂E/∂h), complete ∂E/∂x
BE      s -> s - 1  λ = ∂L/∂h
======  ==========  ==========================================================================

So every rank has energies and forces before its BF, and evaluates the user's loss on the same numbers.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from lightning_januspipe.engine.p2p import Channel, PipelineError, Receive
from lightning_januspipe.engine.specs import ChainSpec, TensorSpec
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.schedule import Action, Phase, Schedule

Shapes = list[tuple[tuple[int, ...], torch.dtype]]
_RECEIVES_AHEAD = 2


@dataclass(frozen=True)
class LossGradients:
    """What the four phases need of the loss of one micro-batch.

    Attributes:
        observables: ∂L/∂y for every observable, None where the loss does not read it.
        derivatives: v = ∂L/∂(∂E/∂x).
    """

    observables: list[Tensor | None]
    derivatives: list[Tensor]


LossFunction = Callable[[int, list[Tensor], list[Tensor]], LossGradients]


@dataclass(frozen=True)
class MicrobatchInput:
    """One micro-batch as the stages see it: the potential call's tensors, and the values of its size symbols."""

    tensors: list[Tensor]
    symbols: Mapping[str, int]


class Executor:
    """Runs the actions of one rank.

    Args:
        stage: this rank's stage.
        chain: what all stages share.
        num_stages: length of the chain.
        down: channels to the next stage and from the previous one, for FE and BF messages (None at the ends).
        up: channels to the previous stage and from the next one, for FF and BE messages (None at the ends).
        device: where messages live.
        timeout: how long to wait for one message.
    """

    def __init__(
        self,
        stage: Stage,
        chain: ChainSpec,
        num_stages: int,
        down: tuple[Channel | None, Channel | None] = (None, None),
        up: tuple[Channel | None, Channel | None] = (None, None),
        device: torch.device | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        self.stage, self.chain, self.num_stages = stage, chain, num_stages
        self._to_next, self._from_previous = down
        self._to_previous, self._from_next = up
        self._device = device or torch.device("cpu")
        self._timeout = timeout

    def close(self) -> None:
        """Let go of all connections: neighbours that wait for this rank are told at once that it will not answer."""
        self.stage.clear()
        for channel in (self._to_next, self._from_previous, self._to_previous, self._from_next):
            if channel is not None:
                channel.close()

    @property
    def index(self) -> int:
        """Position of this rank's stage."""
        return self.stage.function.index

    def run(self, schedule: Schedule, inputs: Sequence[MicrobatchInput], loss: LossFunction) -> None:
        """Run one step's actions of this rank; parameter gradients end in the stage's buffers.

        Args:
            schedule: the actions of all ranks.
            inputs: the micro-batches.
            loss: called once for each micro-batch with (index, observables, derivatives).

        Raises:
            PipelineError: a message did not come, or could not be sent.
        """
        actions = schedule.actions[self.index]
        step = _Step(self, actions, inputs)
        step.follow({s: schedule.actions[s] for s in (self.index - 1, self.index + 1) if 0 <= s < self.num_stages})
        try:
            for action in actions:
                step.run(action, loss)
            step.finish()
        finally:
            step.forget()
            self.stage.clear()

    def evaluate(self, inputs: Sequence[MicrobatchInput]) -> list[tuple[list[Tensor], list[Tensor]]]:
        """FE and FF only, one micro-batch after the other.

        Returns:
            For each micro-batch all observables, and this stage's running sum of ∂E/∂x: complete in stage 0.
        """
        pairs = itertools.product(range(len(inputs)), (Phase.FE, Phase.FF))
        actions = [Action(phase, self.index, m) for m, phase in pairs]
        step = _Step(self, actions, inputs, create_graph=False)
        try:
            for action in actions:
                step.run(action, None)
            step.finish()
        finally:
            step.forget()
            self.stage.clear()
        return [(step.observables[m], step.derivatives[m]) for m in range(len(inputs))]


class _Step:
    """State of one step on one rank."""

    def __init__(
        self,
        executor: Executor,
        actions: Sequence[Action],
        inputs: Sequence[MicrobatchInput],
        create_graph: bool = True,
    ) -> None:
        self._executor, self._inputs, self._create_graph = executor, inputs, create_graph
        self.observables: dict[int, list[Tensor]] = {}
        self.derivatives: dict[int, list[Tensor]] = {}
        self._seeds: dict[int, LossGradients] = {}
        # Receives are posted ahead of use, in the order in which the neighbour sends.
        self._coming = {
            channel: deque(a for a in actions if self._source(a.phase) is channel)
            for channel in (executor._from_previous, executor._from_next)
            if channel is not None
        }
        self._posted: dict[Channel, deque[tuple[Action, Receive]]] = {c: deque() for c in self._coming}
        self._positions: dict[Action, int] = {}

    def follow(self, neighbours: Mapping[int, Sequence[Action]]) -> None:
        """Know the neighbours' orders: a message from one tells how far it is, and so which sends it has read."""
        self._positions = {a: i for actions in neighbours.values() for i, a in enumerate(actions)}

    def run(self, action: Action, loss: LossFunction | None) -> None:
        """One action, with its messages."""
        received = self._receive(action)
        stage, m = self._executor.stage, action.microbatch
        own = stage.function.observables
        if action.phase is Phase.FE:
            num = len(stage.function.boundary_in)
            boundary, values = stage.forward_energy(m, self._inputs[m].tensors, received[:num])
            known = dict(zip(self._observables_before(), received[num:], strict=True))
            known.update(zip(own, values, strict=True))
            self.observables[m] = [known[i] for i in sorted(known)]
            self._send(action, self._executor._to_next, [*boundary, *self.observables[m]])
        elif action.phase is Phase.FF:
            num, num_x = len(stage.function.boundary_out), len(self._executor.chain.coordinates)
            gradients, derivatives = stage.forward_force(m, received[:num], create_graph=self._create_graph)
            if received:
                derivatives = [a + b for a, b in zip(received[num : num + num_x], derivatives, strict=True)]
                self.observables[m] = received[num + num_x :]
            self.derivatives[m] = derivatives
            self._send(action, self._executor._to_previous, [*gradients, *derivatives, *self.observables[m]])
        elif action.phase is Phase.BF:
            assert loss is not None
            num = len(stage.function.boundary_in)
            if self._executor.index > 0:
                self.derivatives[m] = received[num:]
            complete = self.derivatives.pop(m)
            self._seeds[m] = seeds = loss(m, self.observables.pop(m), complete)
            cotangents = stage.backward_force(m, received[:num], seeds.derivatives)
            self._send(action, self._executor._to_next, [*cotangents, *complete])
        elif action.phase is Phase.BE:
            seeds = self._seeds.pop(m)
            cotangents = stage.backward_energy(m, received, [seeds.observables[i] for i in own])
            self._send(action, self._executor._to_previous, cotangents)
        else:
            raise AssertionError(f"the executor does not run phase {action.phase}")

    def finish(self) -> None:
        """Wait until every message has left."""
        for channel in (self._executor._to_next, self._executor._to_previous):
            if channel is not None:
                try:
                    channel.flush(self._executor._timeout)
                except RuntimeError as error:
                    raise PipelineError(
                        f"stage {self._executor.index} could not deliver its last messages to global rank "
                        f"{channel.peer}: {error}. That rank has ended or hangs; its own output has the cause."
                    ) from error

    def forget(self) -> None:
        """Drop receives that were posted and never used, after an error."""
        for posted in self._posted.values():
            for _, receive in posted:
                receive.work = None
            posted.clear()

    def _source(self, phase: Phase) -> Channel | None:
        return self._executor._from_previous if phase in (Phase.FE, Phase.BF) else self._executor._from_next

    def _receive(self, action: Action) -> list[Tensor]:
        channel = self._source(action.phase)
        if channel is None:
            return []
        posted, coming = self._posted[channel], self._coming[channel]
        try:
            while coming and len(posted) < _RECEIVES_AHEAD:
                following = coming.popleft()
                posted.append((following, channel.receive(self._shapes(following))))
            expected, receive = posted[0]
            assert expected == action, f"receives out of order: {expected} before {action}"
            tensors = receive.wait(self._executor._timeout)
            posted.popleft()
            self._release(action, channel)
            return tensors
        except RuntimeError as error:
            raise PipelineError(
                f"stage {self._executor.index} waited for the {action.phase.value} message of micro-batch "
                f"{action.microbatch} from global rank {channel.peer}, which did not come: {error}. That rank has "
                "ended or hangs; its own output has the cause."
            ) from error

    def _release(self, action: Action, came_from: Channel) -> None:
        before = came_from is self._executor._from_previous
        back = self._executor._to_previous if before else self._executor._to_next
        sender = Action(action.phase, self._executor.index + (-1 if before else 1), action.microbatch)
        if back is not None and sender in self._positions:
            back.release(self._positions[sender])

    def _send(self, action: Action, channel: Channel | None, tensors: Sequence[Tensor]) -> None:
        if channel is None:
            return
        try:
            peer = self._executor.index + (1 if channel is self._executor._to_next else -1)
            channel.send(tensors, self._positions.get(Action(action.phase, peer, action.microbatch)))
        except RuntimeError as error:
            raise PipelineError(
                f"stage {self._executor.index} could not send the {action.phase.value} message of micro-batch "
                f"{action.microbatch} to global rank {channel.peer}: {error}. That rank has ended; its own output has "
                "the cause."
            ) from error

    def _observables_before(self) -> list[int]:
        return [i for i, s in enumerate(self._executor.chain.observable_stage) if s < self._executor.index]

    def _shapes(self, action: Action) -> Shapes:
        """Shapes and dtypes of the message that ``action`` waits for."""
        function, chain = self._executor.stage.function, self._executor.chain
        specs: list[TensorSpec]
        if action.phase is Phase.FE:
            specs = [*function.boundary_in, *(chain.observables[i] for i in self._observables_before())]
        elif action.phase is Phase.FF:
            specs = [*function.boundary_out, *chain.coordinates, *chain.observables]
        elif action.phase is Phase.BF:
            specs = [*function.boundary_in, *chain.coordinates]
        else:
            specs = list(function.boundary_out)
        symbols = self._inputs[action.microbatch].symbols
        return [(s.sizes(symbols), s.dtype) for s in specs]
