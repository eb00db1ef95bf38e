"""Runs any schedule in one loop: messages in, phase, messages out.

What messages hold is in :mod:`~lightning_januspipe.engine.messages`. Where two neighbouring actions share a rank, the
same tensors are handed on without a message.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from lightning_januspipe.distributed import rank_lost
from lightning_januspipe.engine.messages import MessageForm, Parts, message_specs, tensors_to_send
from lightning_januspipe.engine.p2p import Links, Receive
from lightning_januspipe.engine.phases import Passed, StepPhases
from lightning_januspipe.engine.route import Route
from lightning_januspipe.engine.specs import ChainSpec, LossFunction, MicrobatchInput
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.engine.stage_state import Collective, StageState
from lightning_januspipe.engine.timeline import ActionRecorder
from lightning_januspipe.schedule import Action, Phase, Schedule
from lightning_januspipe.schedule.actions import Message

_RECEIVES_AHEAD = 2  # posted before they are waited for


class Executor:
    """Runs the actions of one rank.

    Args:
        rank: This rank's index in the pipeline.
        stages: The stages whose phases this rank runs, by their index in the chain.
        chain: What all stages share.
        links: The connections to other ranks; None if there is one rank.
        timeout: How long to wait for one message.
        sent_as: The dtype that boundaries and their gradients are rounded to in messages; None to send them as they
            are.

    Attributes:
        recorder: Notes when each action starts and ends, if set.
        state: The sharded state of this rank's stages, for schedules that change it.
        annotate: Returns the context that an action runs in, given the action's name, as profilers do, if set. Without
            it, actions are named to torch's own profiler if that is on.
    """

    def __init__(
        self,
        rank: int,
        stages: Mapping[int, Stage],
        chain: ChainSpec,
        links: Links | None = None,
        timeout: timedelta | None = None,
        sent_as: torch.dtype | None = None,
    ) -> None:
        self.rank, self.stages, self.chain = rank, dict(stages), chain
        self.recorder: ActionRecorder | None = None
        self.annotate: Callable[[str], AbstractContextManager[Any]] | None = None
        self.state: StageState | None = None
        self._links, self._timeout, self._sent_as = links, timeout, sent_as
        self._routes: dict[int, tuple[Schedule, Route]] = {}

    def close(self) -> None:
        """Lets go of all connections: ranks that wait for this one learn at once that it will not answer."""
        self._clear()
        if self._links is not None:
            self._links.close()

    def run(self, schedule: Schedule, inputs: Sequence[MicrobatchInput], loss: LossFunction) -> None:
        """Runs this rank's actions of one step; parameter gradients end in the stages' buffers.

        Args:
            schedule: The actions of all ranks.
            inputs: The micro-batches.
            loss: Called once for each micro-batch with (index, observables, derivatives).

        Raises:
            RankLostError: A message did not come, or could not be sent.
        """
        self._run(StepInProgress(self, self._route(schedule), inputs, loss))

    def evaluate(
        self, schedule: Schedule, inputs: Sequence[MicrobatchInput]
    ) -> list[tuple[list[Tensor], list[Tensor]] | None]:
        """Runs FE and FF only.

        Args:
            schedule: See :func:`~lightning_januspipe.engine.route.evaluation_schedule`.
            inputs: The micro-batches.

        Returns:
            For each micro-batch all observables and ∂E/∂x, on the rank of the first stage's FF; None on the others.
        """
        step = StepInProgress(self, self._route(schedule), inputs, None)
        self._run(step)
        return [step.phases.result(m) for m in range(len(inputs))]

    def _run(self, step: StepInProgress) -> None:
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
        """Returns what this rank has to know of a schedule; it is found once for each schedule."""
        known = self._routes.get(id(schedule))
        if known is None or known[0] is not schedule:
            if len(self._routes) >= 8:
                self._routes.clear()
            known = schedule, Route(schedule, self.rank)
            self._routes[id(schedule)] = known
        return known[1]


class StepInProgress:
    """Runs one step on one rank, and knows which messages were posted and have come."""

    def __init__(
        self, executor: Executor, route: Route, inputs: Sequence[MicrobatchInput], loss: LossFunction | None
    ) -> None:
        self.route = route
        self._executor, self._inputs, self._links = executor, inputs, executor._links
        self.phases = StepPhases(executor.stages, executor.chain, route.num_stages, inputs, route.order, loss)
        is_profiled = torch._C._autograd._profiler_enabled()
        self._annotate = executor.annotate or (torch.profiler.record_function if is_profiled else None)
        self._posted = dict.fromkeys(route.incoming, 0)
        self._receives: dict[Message, tuple[Receive, MessageForm]] = {}
        self._arrived: dict[Message, Parts[Tensor]] = {}
        self._waited = dict.fromkeys(route.incoming, 0)

    def run(self, action: Action) -> None:
        """Runs one action, with its messages."""
        state = self._executor.state
        if action.changes_state:
            assert state is not None, "a schedule that changes sharded state needs this state"
            self._change(state, action)
            return
        came = self._messages_in(action)
        if state is not None:
            state.wait_for_parameters(action.stage)
        with self._observed(action):
            made = self.phases.run(action, came)
        for message in self.route.outputs(action):
            self.hand_on(message, made.chain if message.target.phase is action.phase else made.own)

    def _change(self, state: StageState, action: Action) -> None:
        """Changes sharded state; what takes its time runs beside the phases that follow."""
        recorder = self._executor.recorder
        started: Sequence[Collective] = ()
        with self._annotated(action):
            began = None if recorder is None else recorder.mark()
            if action.phase is Phase.UNSHARD:
                started = state.unshard(action.stage)
            elif action.phase is Phase.RESHARD:
                state.reshard(action.stage)
            else:
                started = state.reduce(action.stage)
        if recorder is not None and began is not None:
            recorder.follow(action, began, started)

    def finish(self) -> None:
        """Waits until every message has left."""
        if self._links is None:
            return
        for peer, channel in self._links.outgoing():
            with self._waiting("delivery of the last messages", peer):
                channel.flush(self._executor._timeout)

    @contextmanager
    def _waiting(self, what: str, peer: int) -> Iterator[None]:
        """Names the wait, and the rank that did not come, if messages in the block fail; see :func:`.waiting`."""
        assert self._links is not None
        began, number = time.monotonic(), self._links.global_rank
        try:
            yield
        except RuntimeError as error:
            raise rank_lost(error, what, number(self._executor.rank), [number(peer)], began) from error

    def forget(self) -> None:
        """Drops receives that were posted and never used, after an error."""
        for receive, _ in self._receives.values():
            receive.work = None
        self._receives.clear()

    @contextmanager
    def _observed(self, action: Action) -> Iterator[None]:
        """Names the action to a profiler that is on, and marks its start and end if there is a recorder."""
        recorder = self._executor.recorder
        with self._annotated(action):
            if recorder is not None:
                recorder.start(action)
            try:
                yield
            finally:
                if recorder is not None:
                    recorder.end(action)

    def _annotated(self, action: Action) -> AbstractContextManager[Any]:
        annotate = self._annotate
        return annotate(f"[JanusPipe]{action.phase.value} stage {action.stage}") if annotate else nullcontext()

    def _messages_in(self, action: Action) -> Passed:
        chain: Parts[Tensor] = Parts()
        own: Parts[Tensor] = Parts()
        for message in self.route.inputs(action):
            parts = self._arrived.pop(message, None) or self._receive(message)
            if message.source.phase is action.phase:
                chain = parts
            else:
                own = parts
        return Passed(chain, own)

    def hand_on(self, message: Message, parts: Parts[Tensor]) -> None:
        """Sends a message, or keeps it for an action of this rank."""
        peer = self.route.rank_of(message.target)
        if peer == self._executor.rank:
            self._arrived[message] = parts
            return
        assert self._links is not None
        with self._waiting(f"sending of the {_named(message)}", peer):
            tensors = tensors_to_send(parts, self._executor._sent_as)
            self._links.to(peer).send(tensors, self.route.position(message.target))

    def _receive(self, message: Message) -> Parts[Tensor]:
        """Waits for a message; receives are posted ahead of use, in the order in which the peer sends."""
        assert self._links is not None
        source = message.source
        peer = self.route.rank_of(source)
        incoming, channel = self.route.incoming[peer], self._links.from_(peer)
        with self._waiting(_named(message), peer):
            index = self.route.index(message)
            while self._posted[peer] < min(len(incoming), index + _RECEIVES_AHEAD):
                following = incoming[self._posted[peer]]
                form = self.form(following)
                self._receives[following] = channel.receive(form.shapes()), form
                self._posted[peer] += 1
            while self._waited[peer] <= index:
                following = incoming[self._waited[peer]]
                receive, form = self._receives.pop(following)
                self._arrived[following] = form.parts(receive.wait(self._executor._timeout))
                self._waited[peer] += 1
            # The peer has run all its actions up to the one that sent this.
            self._links.to(peer).release(self.route.position(source))
            return self._arrived.pop(message)

    def form(self, message: Message) -> MessageForm:
        """Returns the shapes and types of a message's tensors."""
        executor, target = self._executor, message.target
        function = executor.stages[target.stage].function
        specs = message_specs(
            message, executor.chain, self.route.num_stages, function.boundary_in, function.boundary_out
        )
        return MessageForm(specs, self._inputs[target.microbatch].symbols, executor._sent_as)


def _named(message: Message) -> str:
    """Returns a message in words."""
    source, target = message
    return (
        f"{source.phase.value} message of micro-batch {source.microbatch} from stage {source.stage} to {target.stage}"
    )
