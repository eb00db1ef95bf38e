"""Makes the inputs of a captured program from a call: tensors, sizes, random numbers and lists of indices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.adapters import adapted, adapters_of
from lightning_januspipe.capture.find.call_format import size_carrier
from lightning_januspipe.capture.trace.fixed_values_and_draws import FixedValue
from lightning_januspipe.capture.trace.function import ProgramFunction
from lightning_januspipe.capture.trace.graph_walks import ancestors
from lightning_januspipe.capture.trace.program import symbols_in
from lightning_januspipe.errors import WITHOUT_CAPTURE, CaptureError, quoted

if TYPE_CHECKING:
    from lightning_januspipe.capture.stages.captured import CapturedPotential


class CallInputs:
    """Makes the program's inputs from a call of the potential.

    Args:
        captured: the captured potential.
        potential: the live potential.
    """

    def __init__(self, captured: CapturedPotential, potential: nn.Module) -> None:
        self._captured, self._potential = captured, potential
        self._adapters = adapters_of(potential, captured.graph_size)
        self._steps = _evaluation_steps(captured, potential)

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """Returns the program's inputs: tensors of the call, carriers of integers, random numbers, lists of indices.

        Random numbers are drawn from the global generator; dropout is on if the potential is in training mode.

        Raises:
            CaptureError: the call lacks a tensor, or has other constants or sizes than the captured call, or the
                forward reads another value from it.
        """
        program = self._captured.program
        args, kwargs = adapted(self._adapters, self._potential, args, kwargs)
        tensors: list[Any] = self._captured.call.bind(self._captured.path, args, kwargs)
        self._captured.require_limits(tensors)
        device = tensors[0].device
        tensors += [None] * (len(program.inputs) - len(tensors))
        for step in self._steps:
            if isinstance(step, int):
                symbols = {s: tensors[i].shape[d] for s, (i, d) in program.symbols.items() if tensors[i] is not None}
                draw = program.draws[step - program.first_draw]
                tensors[step] = draw(symbols, device, self._potential.training)
                continue
            with torch.no_grad():
                values = step.function(tensors)
            for value, use in zip(values, step.uses, strict=True):
                if isinstance(use, FixedValue):
                    self._require(use, value.tolist())
                else:
                    tensors[use] = size_carrier(int(value), device) if use < program.first_draw else value
        return tensors

    def _require(self, fixed: FixedValue, found: Any) -> None:
        """Compares a value that the forward reads from this batch with the value when it was traced."""
        if found != fixed.value:
            raise CaptureError(
                f"the potential {quoted(self._captured.path)} was captured with the value {fixed.value!r} at "
                f"{fixed.place}, but this batch has the value {found!r} there. A trace holds one branch only: use "
                "torch.where instead, choose batches in the dataset that all take this branch, or train with "
                f"{WITHOUT_CAPTURE}."
            )


@dataclass(frozen=True)
class _Evaluation:
    """Lists values that are computed together for each batch.

    Attributes:
        function: computes the values.
        uses: for each value the position of the input that it becomes, or the fixed value that it has to agree with.
    """

    function: ProgramFunction
    uses: list[int | FixedValue]


def _evaluation_steps(captured: CapturedPotential, potential: nn.Module) -> list[_Evaluation | int]:
    """Returns the steps for each batch before the stages run: values to compute, and positions of random numbers."""
    program = captured.program
    every = {n.name for n in program.operations}
    num_call = len(captured.call.tensors) + len(captured.call.sizes)
    first_prepared = program.first_draw + len(program.draws)
    wanted: list[tuple[str, int | FixedValue]] = [
        *((name, num_call + i) for i, name in enumerate(program.sizes)),
        *((name, first_prepared + i) for i, name in enumerate(program.prepared)),
        *program.fixed_values,
    ]
    needs = [ancestors(program, [name]) & set(program.inputs) for name, _ in wanted]
    draws = list(range(program.first_draw, first_prepared))
    known = set(range(num_call))
    steps: list[_Evaluation | int] = []
    while wanted or draws:
        symbols = {s for s, (i, _) in program.symbols.items() if i in known}
        if draws and all(symbols_in(s) <= symbols for s in program.draws[draws[0] - program.first_draw].spec.shape):
            steps.append(draws[0])
            known.add(draws.pop(0))
            continue
        names = {program.inputs[i] for i in known}
        ready = [k for k, of_value in enumerate(needs) if of_value <= names]
        if not ready:
            raise CaptureError(
                f"the potential {quoted(captured.path)} draws random numbers whose shape depends on other random "
                "numbers. Draw one of the two in the dataset."
            )
        outputs = [wanted[k][0] for k in ready]
        uses = [wanted[k][1] for k in ready]
        steps.append(_Evaluation(ProgramFunction(program, potential, every, outputs), uses))
        known |= {use for use in uses if isinstance(use, int)}
        wanted = [x for k, x in enumerate(wanted) if k not in ready]
        needs = [x for k, x in enumerate(needs) if k not in ready]
    return steps
