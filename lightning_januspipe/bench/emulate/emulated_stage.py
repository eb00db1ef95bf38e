"""Holds the stage of an emulated device, which sleeps, labels the tensors that it sends, and checks its inputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec, StageOutput, TensorSpec
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.schedule import Action, Phase

_LABEL = 4  # entries of a label
_CHAIN, _OWN = -1.0, -2.0  # kinds of messages: to the next stage, and from BF to BE of the same stage
_EARLY = 1.5e-4  # seconds


class EmulationError(AssertionError):
    """Reports that a phase got the message of another, or that actions ran in another order than the schedule's."""


@dataclass
class EmulatedFunction:
    """Holds the shapes of an emulated stage, which evaluates nothing.

    Attributes: see :class:`~lightning_januspipe.engine.specs.StageFunction`.
    """

    index: int
    boundary_in: Sequence[TensorSpec]
    boundary_out: Sequence[TensorSpec]
    observables: Sequence[int]
    parameters: Sequence[nn.Parameter] = ()

    def __call__(self, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> StageOutput:
        """Raises an error: nothing is computed, as the phases of :class:`EmulatedStage` sleep."""
        raise NotImplementedError


def emulated_stages(num_stages: int, message_bytes: int) -> tuple[ChainSpec, list[EmulatedFunction]]:
    """Makes stages with an observable in the first and one in the last, and a derivative with an entry per stage.

    Args:
        num_stages: Number of stages.
        message_bytes: Bytes of the boundary between two stages.
    """
    boundary = [TensorSpec((max(message_bytes // torch.float64.itemsize, 2 * _LABEL),), torch.float64)]
    last = num_stages - 1
    spec = ChainSpec(
        coordinates=(TensorSpec((num_stages,), torch.float64),),
        observables=(TensorSpec((2,), torch.float64),) * 2,
        observable_stage=(0, last),
    )
    functions = [
        EmulatedFunction(
            s,
            boundary if s else [],
            boundary if s < last else [],
            [i for i, stage in enumerate(spec.observable_stage) if stage == s],
        )
        for s in range(num_stages)
    ]
    return spec, functions


class EmulatedStage(Stage):
    """Runs phases that check their inputs, sleep, and return labelled tensors of the right shapes.

    Labels hold the serial number of the micro-batch, which no other one has in this step or another, the phase, and the
    stage.

    Args:
        function: The shapes.
        num_stages: Number of stages.
        seconds: Time of each phase.
        ran: Gets every action that runs.

    Attributes:
        weights: Factor of ``seconds`` for each micro-batch; empty for 1.
        meet: Function that is called at the start of every phase with the action and the serial number of its
            micro-batch, or None; its time is added to the phase's.
    """

    def __init__(
        self, function: EmulatedFunction, num_stages: int, seconds: Mapping[Phase, float], ran: list[Action]
    ) -> None:
        super().__init__(function, GradientBuffers())
        self.seconds = seconds
        self.weights: Sequence[float] = ()
        self.meet: Callable[[Action, int], None] | None = None
        self._num_stages, self._ran = num_stages, ran
        self._serials: dict[int, int] = {}

    @property
    def num_inflight(self) -> int:
        """Returns the number of micro-batches between their first and their last phase here."""
        return len(self._serials)

    def clear(self) -> None:
        """Forgets all micro-batches."""
        self._serials.clear()

    def forward_energy(
        self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FE: returns a boundary, and the observables of this stage."""
        self._serials[microbatch] = serial = int(tensors[0])
        with self._phase(Phase.FE, microbatch):
            self._check(Phase.FE, microbatch, boundary, self.function.boundary_in, Phase.FE, -1)
            made = self._made(Phase.FE, microbatch, self.function.boundary_out)
            return made, [observable(serial, i) for i in self.function.observables]

    def forward_force(
        self, microbatch: int, boundary_gradients: Sequence[Tensor | None], *, create_graph: bool = True
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs FF: returns a gradient of the boundary, and a derivative with this stage's entry only."""
        assert create_graph, "evaluation is not emulated"
        with self._phase(Phase.FF, microbatch):
            self._check(Phase.FF, microbatch, boundary_gradients, self.function.boundary_out, Phase.FF, 1)
            part = torch.zeros(self._num_stages, dtype=torch.float64)
            part[self.function.index] = self._serials[microbatch]
            return self._made(Phase.FF, microbatch, self.function.boundary_in), [part]

    def backward_force(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor],
        derivative_cotangents: Sequence[Tensor],
        *,
        defer: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs BF: returns a cotangent of the boundary's gradient."""
        with self._phase(Phase.BF, microbatch):
            self._check(Phase.BF, microbatch, boundary_cotangents, self.function.boundary_in, Phase.BF, -1)
            self._check_loss(Phase.BF, microbatch, derivative_cotangents)
            return self._made(Phase.BF, microbatch, self.function.boundary_out), []

    def backward_energy(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor | None],
        observable_cotangents: Sequence[Tensor | None],
        *,
        defer: bool = False,
        force_part: Sequence[Tensor] = (),
    ) -> list[Tensor]:
        """Runs BE: returns a cotangent of the boundary."""
        with self._phase(Phase.BE, microbatch):
            self._check(Phase.BE, microbatch, boundary_cotangents, self.function.boundary_out, Phase.BE, 1)
            self._check_force_part(microbatch, force_part)
            self._check_loss(Phase.BE, microbatch, observable_cotangents)
            found = self._made(Phase.BE, microbatch, self.function.boundary_in)
        if not defer:
            del self._serials[microbatch]
        return found

    def _check_force_part(self, microbatch: int, force_part: Sequence[Tensor]) -> None:
        """Checks that nothing comes from another rank, which has no phase of this stage."""
        self._check(Phase.BE, microbatch, force_part, [], Phase.BF, 0, _OWN)

    def weight_force(self, microbatch: int) -> None:
        """Runs WF, which only takes its time."""
        with self._phase(Phase.WF, microbatch):
            pass

    def weight_energy(self, microbatch: int) -> None:
        """Runs WE, which ends the micro-batch."""
        with self._phase(Phase.WE, microbatch):
            pass
        del self._serials[microbatch]

    @contextmanager
    def _phase(self, phase: Phase, microbatch: int) -> Iterator[None]:
        """Makes the block take as long as the phase, or longer."""
        action = Action(phase, self.function.index, microbatch)
        self._ran.append(action)
        if self.meet is not None:
            self.meet(action, self._serials[microbatch])
        weight = self.weights[microbatch] if self.weights else 1.0
        deadline = time.perf_counter() + weight * self.seconds[phase]
        yield
        sleep_until(deadline)

    def _made(self, phase: Phase, microbatch: int, specs: Sequence[TensorSpec], kind: float = _CHAIN) -> list[Tensor]:
        """Returns a labelled tensor for each spec; the label is at both ends."""
        label = torch.tensor(self._label(phase, self.function.index, microbatch, kind), dtype=torch.float64)
        made = []
        for spec in specs:
            tensor = torch.zeros(spec.sizes({}), dtype=spec.dtype)
            tensor[:_LABEL] = tensor[-_LABEL:] = label
            made.append(tensor)
        return made

    def _label(self, phase: Phase, stage: int, microbatch: int, kind: float) -> list[float]:
        return [float(self._serials[microbatch]), float(list(Phase).index(phase)), float(stage), kind]

    def _check(
        self,
        phase: Phase,
        microbatch: int,
        came: Sequence[Tensor | None],
        specs: Sequence[TensorSpec],
        source: Phase,
        step: int,
        kind: float = _CHAIN,
    ) -> None:
        """Checks that tensors were made by ``source`` of the stage ``step`` further, for this micro-batch."""
        action = Action(phase, self.function.index, microbatch)
        if len(came) != len(specs):
            raise EmulationError(f"{action} got {len(came)} tensors, expected {len(specs)}")
        expected = self._label(source, self.function.index + step, microbatch, kind)
        for tensor in came:
            assert tensor is not None
            for found in (tensor[:_LABEL].tolist(), tensor[-_LABEL:].tolist()):
                if found != expected:
                    raise EmulationError(
                        f"{action} got a message labelled {found}, expected {expected} (serial number of the "
                        "micro-batch, phase, stage, kind): it was made by another action"
                    )

    def _check_loss(self, phase: Phase, microbatch: int, cotangents: Sequence[Tensor | None]) -> None:
        for cotangent in cotangents:
            assert cotangent is not None
            if int(cotangent[0]) != self._serials[microbatch]:
                action = Action(phase, self.function.index, microbatch)
                raise EmulationError(
                    f"{action} got the loss of micro-batch {int(cotangent[0])}, expected {self._serials[microbatch]}"
                )


class EmulatedSplitStage(EmulatedStage):
    """Emulates a split stage, whose FF and BF run on another rank than its FE and BE."""

    def begin_force(self, microbatch: int, tensors: Sequence[Tensor], boundary: Sequence[Tensor]) -> None:
        """Runs FE on the rank of FF; its time is a part of FF's."""
        self._serials[microbatch] = int(tensors[0])
        self._check(Phase.FF, microbatch, boundary, self.function.boundary_in, Phase.FE, -1)

    def backward_force(
        self,
        microbatch: int,
        boundary_cotangents: Sequence[Tensor],
        derivative_cotangents: Sequence[Tensor],
        *,
        defer: bool = False,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Runs BF: returns also the tensors for the rank that runs BE."""
        found, _ = super().backward_force(microbatch, boundary_cotangents, derivative_cotangents)
        force_part = self._made(Phase.BF, microbatch, self.function.boundary_in, _OWN)
        del self._serials[microbatch]
        return found, force_part

    def _check_force_part(self, microbatch: int, force_part: Sequence[Tensor]) -> None:
        self._check(Phase.BE, microbatch, force_part, self.function.boundary_in, Phase.BF, 0, _OWN)


def observable(serial: int, position: int) -> Tensor:
    """Returns the observable at an index that belongs to a micro-batch."""
    return torch.tensor([serial, position], dtype=torch.float64)


def sleep_until(deadline: float) -> None:
    """Sleeps until ``time.perf_counter()`` has reached a time, and little longer.

    A sleep takes 0.05 to 0.2 ms more than asked for, so this one wakes up a little early and sleeps the rest in short
    pieces. Nothing waits busily, because there are more ranks than cores.
    """
    while (left := deadline - time.perf_counter()) > 0:
        time.sleep(left - _EARLY if left > 2 * _EARLY else min(left, 1e-5))
