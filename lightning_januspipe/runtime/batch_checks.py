"""Validates the stages in the middle of training, on batches of a kind that no validation has seen.

A forward may branch on whether there is just one structure, or no edge, or on an entry that only some batches hold.
The trace does not tell: many operations treat sizes of 0 and 1 specially without another result, and entries that a
forward does not read have no effect. So the first batch of each such kind is compared with the module itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from lightning_januspipe.capture.adapters import capturing
from lightning_januspipe.capture.find.grad_call import PotentialCall, StepFunction
from lightning_januspipe.capture.find.in_step import potential_of
from lightning_januspipe.capture.side_effects import unchanged
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.validate.against_eager import DEFAULT_MODE, validate_evaluation, validate_stages
from lightning_januspipe.errors import CaptureError


class BatchChecks:
    """Compares a potential in stages with the module itself on the first batch of each kind.

    The ranks of a pipeline have the same batch, and those with the whole module come to the same result. A rank on
    which parameters have no values leaves the comparison to the others.

    Args:
        staged: The potential in stages, validated on ordinary batches.
        module: The LightningModule.

    Attributes:
        phase_mode: How the phases are run in a comparison.
        before: Called before a comparison.
        whole: A context in which the module has all its parameters, on this rank or on the first of a pipeline, whose
            ranks all enter it.
    """

    def __init__(self, staged: StagedPotential, module: nn.Module) -> None:
        self._staged, self._module = staged, module
        self._validated: set[frozenset[str]] = set()
        self._noted: dict[frozenset[str], tuple[nn.Module, PotentialCall]] = {}
        self.phase_mode = DEFAULT_MODE
        self.before: Callable[[], None] = lambda: None
        self.whole: Callable[[], AbstractContextManager[Any]] = nullcontext

    def note(
        self, step: StepFunction, args: tuple[Any, ...], kwargs: dict[str, Any], symbols: Mapping[str, int]
    ) -> None:
        """Notes a call, if it is of a kind that was not validated yet.

        Args:
            step: The user's step that makes the call.
            args: Positional arguments of the call.
            kwargs: Its keyword arguments.
            symbols: Values of its size symbols.
        """
        staged = self._staged
        call = PotentialCall(staged.path, args, kwargs, tuple(staged.outputs), staged.replaced)
        potential = potential_of(self._module, step, call)
        kinds = staged.unvalidated_kinds(potential, args, kwargs, symbols)
        if kinds and not any(kinds <= validated for validated in (*self._validated, *self._noted)):
            self._noted[kinds] = potential, call

    @property
    def has_noted(self) -> bool:
        """Tells whether there are calls to validate."""
        return bool(self._noted)

    def run(self) -> None:
        """Validates the potential on the calls that were noted.

        Raises:
            CaptureError: The stages differ from the module itself.
        """
        if not self._noted:
            return
        noted, self._noted = self._noted, {}
        self.before()
        with self.whole(), unchanged(self._module), capturing(self._module):
            for kinds, (potential, call) in noted.items():
                if not any(p.is_meta for p in potential.parameters()):
                    self._validate(kinds, potential, call)
        self._validated.update(noted)

    def _validate(self, kinds: frozenset[str], potential: nn.Module, call: PotentialCall) -> None:
        try:
            with torch.inference_mode(False), torch.enable_grad():
                if potential.training:
                    validate_stages(self._staged, potential, call, self.phase_mode)
                else:
                    validate_evaluation(self._staged, potential, call)
        except CaptureError as error:
            raise CaptureError(
                f"this batch has {', '.join(sorted(kinds))}, unlike the batches that the potential was validated on "
                f"when training started, and with it {error}"
            ) from error
