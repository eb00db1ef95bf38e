"""The one loop that runs a schedule: messages in, phase, messages out.

What travels between the actions of a micro-batch (stage s of S, in the order of the chain):

============  ==============================================================================
from → to     message
============  ==============================================================================
FE → next FE  boundary h, observables computed so far
FF → next FF  ∂E/∂h, running ∂E/∂x, all observables
BF → next BF  u = ∂L/∂(∂E/∂h), complete ∂E/∂x
BE → next BE  λ = ∂L/∂h
============  ==============================================================================

So every rank has energies and forces before its first BF, and evaluates the user's loss on the same numbers. If FF and
BF of a stage are apart from its FE and BE, two more messages keep them together:

============  ==============================================================================
FE → own FF   the boundary that the stage received; from the last stage also all observables
BF → own BE   ∂L of that boundary by way of FF, complete ∂E/∂x, all observables
============  ==============================================================================

Where two neighbouring actions share a rank the same tensors are handed on without a message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.engine.p2p import Links, Receive
from lightning_januspipe.engine.route import Route
from lightning_januspipe.engine.specs import ChainSpec, LossFunction, LossGradients, MicrobatchInput, TensorSpec
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.engine.timeline import ActionRecorder
from lightning_januspipe.errors import PipelineError
from lightning_januspipe.schedule import Action, Phase, Schedule
from lightning_januspipe.schedule.actions import Message, predecessor, successor

_RECEIVES_AHEAD = 2


class Executor:
    """Runs the actions of one rank.

    Args:
        rank: this rank's position in the pipeline.
        stages: the stages of which this rank runs phases, by their position in the chain.
        chain: what all stages share.
        links: the connections to other ranks; None where there is one rank.
        device: where messages live.
        timeout: how long to wait for one message.
        sent_as: type to which boundaries and their gradients are rounded for messages; None to send them as they are.

    Attributes:
        recorder: notes when each action starts and ends, if set.
        annotate: gives the context that an action runs in by its name, as profilers do, if set. Without it, actions
            are named to torch's own profiler where that is on.
    """

    def __init__(
        self,
        rank: int,
        stages: Mapping[int, Stage],
        chain: ChainSpec,
        links: Links | None = None,
        device: torch.device | None = None,
        timeout: timedelta | None = None,
        sent_as: torch.dtype | None = None,
    ) -> None:
        self.rank, self.stages, self.chain = rank, dict(stages), chain
        self.recorder: ActionRecorder | None = None
        self.annotate: Callable[[str], AbstractContextManager[Any]] | None = None
        self._links, self._timeout, self._sent_as = links, timeout, sent_as
        self._device = device or torch.device("cpu")
        self._routes: dict[int, tuple[Schedule, Route]] = {}

    @property
    def bytes_sent(self) -> int:
        """Bytes of all messages to other ranks so far."""
        return 0 if self._links is None else self._links.bytes_sent

    def close(self) -> None:
        """Let go of all connections: ranks that wait for this one are told at once that it will not answer."""
        self._clear()
        if self._links is not None:
            self._links.close()

    def run(self, schedule: Schedule, inputs: Sequence[MicrobatchInput], loss: LossFunction) -> None:
        """Run one step's actions of this rank; parameter gradients end in the stages' buffers.

        Args:
            schedule: the actions of all ranks.
            inputs: the micro-batches.
            loss: called once for each micro-batch with (index, observables, derivatives).

        Raises:
            PipelineError: a message did not come, or could not be sent.
        """
        self._run(_Step(self, self._route(schedule), inputs, loss))

    def evaluate(
        self, schedule: Schedule, inputs: Sequence[MicrobatchInput]
    ) -> list[tuple[list[Tensor], list[Tensor]] | None]:
        """FE and FF only.

        Args:
            schedule: see :func:`~lightning_januspipe.engine.route.evaluation_schedule`.
            inputs: the micro-batches.

        Returns:
            For each micro-batch all observables and ∂E/∂x, on the rank of the first stage's FF; None on the others.
        """
        step = _Step(self, self._route(schedule), inputs, None)
        self._run(step)
        return [step.result(m) for m in range(len(inputs))]

    def _run(self, step: _Step) -> None:
        try:
            for action in step.route.order:
                step.run(action)
            step.finish()
        finally:
            step.forget()
            self._clear()

    def _clear(self) -> None:
        for stage in self.stages.values():
            stage.clear()

    def _route(self, schedule: Schedule) -> Route:
        """What this rank has to know of a schedule; found once for each schedule."""
        known = self._routes.get(id(schedule))
        if known is None or known[0] is not schedule:
            if len(self._routes) >= 8:
                self._routes.clear()
            known = schedule, Route(schedule, self.rank)
            self._routes[id(schedule)] = known
        return known[1]


class _Step:
    """State of one step on one rank."""

    def __init__(
        self, executor: Executor, route: Route, inputs: Sequence[MicrobatchInput], loss: LossFunction | None
    ) -> None:
        self.route = route
        self._executor, self._inputs, self._loss = executor, inputs, loss
        self._links = executor._links
        is_profiled = torch._C._autograd._profiler_enabled()
        self._annotate = executor.annotate or (torch.profiler.record_function if is_profiled else None)
        self._posted = dict.fromkeys(route.incoming, 0)
        self._receives: dict[Message, Receive] = {}
        self._arrived: dict[Message, list[Tensor]] = {}
        self._waited = dict.fromkeys(route.incoming, 0)
        self._observables: dict[int, list[Tensor]] = {}
        self._derivatives: dict[int, list[Tensor]] = {}
        self._seeds: dict[int, LossGradients] = {}
        self._readers = Counter(a.microbatch for a in route.order if a.phase in (Phase.BF, Phase.BE))

    def run(self, action: Action) -> None:
        """One action, with its messages."""
        stage = self._executor.stages[action.stage]
        came = self._take(action)
        for target, tensors in self._watched(action, stage, came):
            self._hand_on(Message(action, target), tensors)

    def result(self, microbatch: int) -> tuple[list[Tensor], list[Tensor]] | None:
        """Observables and derivative after FE and FF, where they are complete."""
        if microbatch not in self._derivatives:
            return None
        return self._observables[microbatch], self._derivatives[microbatch]

    def finish(self) -> None:
        """Wait until every message has left."""
        if self._links is None:
            return
        for peer, channel in self._links.outgoing():
            try:
                channel.flush(self._executor._timeout)
            except RuntimeError as error:
                raise PipelineError(
                    f"pipeline rank {self._executor.rank} could not deliver its last messages to global rank "
                    f"{self._links.global_rank(peer)}: {error}. That rank has ended or hangs; its own output has the "
                    "cause."
                ) from error

    def forget(self) -> None:
        """Drop receives that were posted and never used, after an error."""
        for receive in self._receives.values():
            receive.work = None
        self._receives.clear()

    # -- phases ------------------------------------------------------------------------------------------------------

    def _watched(self, action: Action, stage: Stage, came: _Input) -> list[tuple[Action, list[Tensor]]]:
        """Run a phase, under a name if a profiler is on, and between two marks if there is a recorder."""
        if self._annotate is not None:
            with self._annotate(f"[JanusPipe]{action.phase.value} stage {action.stage}"):
                return self._recorded(action, stage, came)
        return self._recorded(action, stage, came)

    def _recorded(self, action: Action, stage: Stage, came: _Input) -> list[tuple[Action, list[Tensor]]]:
        recorder = self._executor.recorder
        if recorder is None:
            return self._compute(action, stage, came)
        recorder.start(action)
        try:
            return self._compute(action, stage, came)
        finally:
            recorder.end(action)

    def _compute(self, action: Action, stage: Stage, came: _Input) -> list[tuple[Action, list[Tensor]]]:
        """Run a phase; returns the tensors for every action that takes some in."""
        phase, m = action.phase, action.microbatch
        if phase is Phase.FE:
            return self._forward_energy(action, stage, came)
        if phase is Phase.FF:
            return self._forward_force(action, stage, came)
        if phase is Phase.BF:
            return self._backward_force(action, stage, came)
        if phase is Phase.BE:
            return self._backward_energy(action, stage, came)
        if phase is Phase.WF:
            stage.weight_force(m)
        else:
            stage.weight_energy(m)
        return []

    def _forward_energy(self, action: Action, stage: Stage, came: _Input) -> list[tuple[Action, list[Tensor]]]:
        function, m = stage.function, action.microbatch
        num = len(function.boundary_in)
        received = came.chain[:num]
        boundary, values = stage.forward_energy(m, self._inputs[m].tensors, received)
        known = dict(zip(self._observables_before(action.stage), came.chain[num:], strict=True))
        known.update(zip(function.observables, values, strict=True))
        observables = [known[i] for i in sorted(known)]
        after = successor(action, self.route.num_stages)
        assert after is not None
        own = Action(Phase.FF, action.stage, m)
        if after.phase is Phase.FE:
            results = [(after, [*boundary, *observables])]
            if self.route.is_split(action.stage):
                results.append((own, received))
            return results
        return [(own, [*received, *observables] if self.route.is_split(action.stage) else observables)]

    def _forward_force(self, action: Action, stage: Stage, came: _Input) -> list[tuple[Action, list[Tensor]]]:
        function, m = stage.function, action.microbatch
        is_last = action.stage == self.route.num_stages - 1
        apart = self.route.is_split(action.stage)
        own = came.own
        if apart:
            num_in = len(function.boundary_in)
            stage.recompute_energy(m, self._inputs[m].tensors, own[:num_in])
            own = own[num_in:]
        num = 0 if is_last else len(function.boundary_out)
        gradients, derivatives = stage.forward_force(
            m, self._executor.chain.force_seeds(action.stage, came.chain[:num]), create_graph=self._loss is not None
        )
        if is_last:
            observables = own
        else:
            num_x = len(self._executor.chain.coordinates)
            derivatives = [a + b for a, b in zip(came.chain[num : num + num_x], derivatives, strict=True)]
            observables = came.chain[num + num_x :]
        self._observables[m] = observables
        if action.stage == 0:
            self._derivatives[m] = derivatives
            return []
        return [(Action(Phase.FF, action.stage - 1, m), [*gradients, *derivatives, *observables])]

    def _backward_force(self, action: Action, stage: Stage, came: _Input) -> list[tuple[Action, list[Tensor]]]:
        function, m = stage.function, action.microbatch
        num = len(function.boundary_in)
        if action.stage > 0:
            self._derivatives[m] = came.chain[num:]
        complete, observables = self._derivatives[m], self._observables[m]
        seeds = self._loss_gradients(m)
        to_energies: list[Tensor] = []
        if self.route.is_split(action.stage):
            cotangents, to_energies = stage.backward_force_apart(m, came.chain[:num], seeds.derivatives)
        else:
            cotangents = stage.backward_force(m, came.chain[:num], seeds.derivatives, defer=self.route.is_deferred)
        self._seeds_read(m)
        results = []
        if action.stage < self.route.num_stages - 1:
            results.append((Action(Phase.BF, action.stage + 1, m), [*cotangents, *complete]))
        if self.route.is_split(action.stage):
            results.append((Action(Phase.BE, action.stage, m), [*to_energies, *complete, *observables]))
        return results

    def _backward_energy(self, action: Action, stage: Stage, came: _Input) -> list[tuple[Action, list[Tensor]]]:
        function, m = stage.function, action.microbatch
        more: list[Tensor] = []
        if self.route.is_split(action.stage):
            num, num_x = len(function.boundary_in), len(self._executor.chain.coordinates)
            more = came.own[:num]
            self._derivatives[m], self._observables[m] = came.own[num : num + num_x], came.own[num + num_x :]
        seeds = self._loss_gradients(m)
        cotangents = stage.backward_energy(
            m,
            self._executor.chain.read_cotangents(action.stage, came.chain, seeds.observables),
            [seeds.observables[i] for i in function.observables],
            defer=self.route.is_deferred,
            more=more,
        )
        self._seeds_read(m)
        return [(Action(Phase.BE, action.stage - 1, m), cotangents)] if action.stage else []

    def _loss_gradients(self, m: int) -> LossGradients:
        """The loss is evaluated once on each rank, when energies and forces are there."""
        if m not in self._seeds:
            assert self._loss is not None
            self._seeds[m] = self._loss(m, self._observables[m], self._derivatives[m])
        return self._seeds[m]

    def _seeds_read(self, m: int) -> None:
        self._readers[m] -= 1
        if not self._readers[m]:
            del self._seeds[m], self._observables[m], self._derivatives[m]

    # -- messages ----------------------------------------------------------------------------------------------------

    def _take(self, action: Action) -> _Input:
        """What the action before on the chain left for this one, and what its own stage's other rank sent."""
        before = predecessor(action, self.route.num_stages)
        chain: list[Tensor] = []
        own: list[Tensor] = []
        for message in self.route.inputs(action):
            tensors = self._arrived.pop(message, None)
            if tensors is None:
                tensors = self._receive(message)
            if message.source == before and before.phase is action.phase:
                chain = tensors
            else:
                own = tensors
        return _Input(chain, own)

    def _hand_on(self, message: Message, tensors: list[Tensor]) -> None:
        peer = self.route.rank_of(message.target)
        if peer == self._executor.rank:
            self._arrived[message] = tensors
            return
        assert self._links is not None
        action = message.source
        try:
            self._links.to(peer).send(self._narrowed(message, tensors), self.route.position(message.target))
        except RuntimeError as error:
            raise PipelineError(
                f"stage {action.stage} could not send the {action.phase.value} message of micro-batch "
                f"{action.microbatch} to global rank {self._links.global_rank(peer)}: {error}. That rank has ended; "
                "its own output has the cause."
            ) from error

    def _receive(self, message: Message) -> list[Tensor]:
        """Wait for a message; receives are posted ahead of use, in the order in which the peer sends."""
        assert self._links is not None
        source, target = message
        peer = self.route.rank_of(source)
        incoming, channel = self.route.incoming[peer], self._links.from_(peer)
        try:
            number = self.route.number(message)
            while self._posted[peer] < min(len(incoming), number + _RECEIVES_AHEAD):
                following = incoming[self._posted[peer]]
                shapes = [(s, self._sent_dtype(d, is_boundary)) for s, d, is_boundary in self._shapes(following)]
                self._receives[following] = channel.receive(shapes)
                self._posted[peer] += 1
            while self._waited[peer] <= number:
                following = incoming[self._waited[peer]]
                came = self._receives.pop(following).wait(self._executor._timeout)
                self._arrived[following] = self._widened(following, came)
                self._waited[peer] += 1
            # The peer has run all its actions up to the one that sent this.
            self._links.to(peer).release(self.route.position(source))
            return self._arrived.pop(message)
        except RuntimeError as error:
            raise PipelineError(
                f"stage {target.stage} waited for the {source.phase.value} message of micro-batch "
                f"{source.microbatch} from global rank {self._links.global_rank(peer)}, which did not come: {error}. "
                "That rank has ended or hangs; its own output has the cause."
            ) from error

    def _observables_before(self, stage: int) -> list[int]:
        return [i for i, s in enumerate(self._executor.chain.observable_stage) if s < stage]

    def _sent_dtype(self, dtype: torch.dtype, is_boundary: bool) -> torch.dtype:
        sent_as = self._executor._sent_as
        is_wider = sent_as is not None and dtype.is_floating_point and dtype.itemsize > sent_as.itemsize
        return sent_as if sent_as is not None and is_boundary and is_wider else dtype

    def _narrowed(self, message: Message, tensors: list[Tensor]) -> list[Tensor]:
        """A message as it is sent: first what belongs to the boundary, rounded."""
        if self._executor._sent_as is None:
            return tensors
        source, target = message
        function = self._executor.stages[source.stage].function
        to_next = source.stage < target.stage
        num = len(function.boundary_out if to_next else function.boundary_in)
        return [t.to(self._sent_dtype(t.dtype, i < num)) for i, t in enumerate(tensors)]

    def _widened(self, message: Message, tensors: list[Tensor]) -> list[Tensor]:
        """A message that came, in the types that the stage computes with."""
        if self._executor._sent_as is None:
            return tensors
        return [t.to(dtype) for t, (_, dtype, _) in zip(tensors, self._shapes(message), strict=True)]

    def _shapes(self, message: Message) -> list[tuple[tuple[int, ...], torch.dtype, bool]]:
        """Shapes and dtypes of a message, and whether they are of a boundary (or gradients of one)."""
        source, target = message
        function, chain = self._executor.stages[target.stage].function, self._executor.chain
        boundary, others = function.boundary_in, list[TensorSpec]()
        if source.phase is target.phase is Phase.FE:
            others = [chain.observables[i] for i in self._observables_before(target.stage)]
        elif source.phase is target.phase is Phase.FF:
            boundary, others = function.boundary_out, [*chain.coordinates, *chain.observables]
        elif source.phase is target.phase is Phase.BF:
            others = [*chain.coordinates]
        elif source.phase is target.phase is Phase.BE:
            boundary = function.boundary_out
        elif source.phase is Phase.FE:
            is_last = target.stage == self.route.num_stages - 1
            others = [*chain.observables] if is_last else []
        else:
            others = [*chain.coordinates, *chain.observables]
        symbols = self._inputs[target.microbatch].symbols
        specs = [*((s, True) for s in boundary), *((s, False) for s in others)]
        return [(s.sizes(symbols), s.dtype, is_boundary) for s, is_boundary in specs]


@dataclass(frozen=True)
class _Input:
    """What an action takes in: from the same phase of the neighbouring stage, and from the phase before of its own."""

    chain: list[Tensor]
    own: list[Tensor]
