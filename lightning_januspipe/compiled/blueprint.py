"""Describes a stage as plain data, so that another process can trace it: all that its joint graph depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_januspipe.compiled.sizes import agree
from lightning_januspipe.engine.autocast import Autocast
from lightning_januspipe.engine.specs import ChainSpec, StageFunction, StageOutput, TensorSpec

Body = Callable[[Sequence[Any], Sequence[Tensor]], StageOutput]
"""A stage as a pure function of the values that it reads and of its boundary."""


class TraceableStage(StageFunction, Protocol):
    """Has phases that can be traced, and says which tensors it reads beside its boundary."""

    @property
    def body(self) -> Body:
        """Returns its operations, without the live module. A ``text()`` of them, if any, tells them from all others."""

    @property
    def num_tensors(self) -> int:
        """Returns the number of tensors in the potential's call."""

    @property
    def symbols(self) -> Mapping[str, tuple[int, int]]:
        """Maps each size symbol to the (position, dimension) of the call's tensor that defines it."""

    @property
    def value_specs(self) -> Sequence[TensorSpec]:
        """Returns the specs of :meth:`values`, in the size symbols."""

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns all tensors that the stage reads: parameters, buffers, constants and those of the batch.

        Args:
            tensors: the potential call's tensors.
        """


@dataclass(frozen=True)
class StageBlueprint:
    """Describes a stage as the tracer sees it: without parameters, but with their shapes and dtypes.

    Attributes:
        body: the stage's operations.
        values: specs of the values that the joint graph takes, each once.
        sources: for each of the stage's values its position among those taken.
        trained: positions of the trainable parameters among those taken, in the stage's order.
        boundary_in: specs of the boundary received.
        boundary_out: specs of the boundary sent.
        coordinates: specs of the differentiation inputs.
        observables: specs of the observables that the stage computes.
        to_energy: for each value of the boundary sent whether an energy depends on it.
        autocast: what FF differentiates under.
        device: type of the device.
        groups: size symbols that have one size, see :func:`~.sizes.agree`.
        constants: size symbols that are numbers.
        hints: the size of each group in the example call.
    """

    body: Body
    values: tuple[TensorSpec, ...]
    sources: tuple[int, ...]
    trained: tuple[int, ...]
    boundary_in: tuple[TensorSpec, ...]
    boundary_out: tuple[TensorSpec, ...]
    coordinates: tuple[TensorSpec, ...]
    observables: tuple[TensorSpec, ...]
    to_energy: tuple[bool, ...]
    autocast: Autocast
    device: str
    groups: tuple[tuple[str, ...], ...]
    constants: Mapping[str, int]
    hints: tuple[int, ...]

    def digest(self) -> str | None:
        """Returns 64 hexadecimal digits that tell this stage from all others; None where its operations have no text.

        The example sizes are no part of it: graphs that are right for these are right for others, and which sizes two
        batches happen to have should not decide whether a cache is of use.
        """
        text = getattr(self.body, "text", None)
        if text is None:
            return None
        rest = [(f.name, getattr(self, f.name)) for f in fields(self) if f.name not in ("body", "hints")]
        return hashlib.sha256(f"{text()}\n{rest!r}".encode()).hexdigest()


def blueprint(
    function: TraceableStage, chain: ChainSpec, first: Mapping[str, int], second: Mapping[str, int], device: str
) -> StageBlueprint:
    """Returns what the joint graph of a stage depends on.

    Args:
        function: the stage.
        chain: what all stages share.
        first: the values of all size symbols in an example call; inductor takes them for the usual ones.
        second: the same in a call with other sizes.
        device: type of the device that the stage runs on.
    """
    groups, constants = agree(first, second, {s: d == 0 for s, (_, d) in function.symbols.items()})
    values = function.values([None] * function.num_tensors)  # parameters tell by themselves which are the same
    places = first_places(values)
    of_parameter = {id(values[place]): i for i, place in enumerate(places) if isinstance(values[place], nn.Parameter)}
    of_place = {place: i for i, place in enumerate(places)}
    num_out = len(function.boundary_out)
    dependence = chain.dependence[function.index] if chain.dependence and num_out else None
    specs = function.value_specs
    return StageBlueprint(
        body=function.body,
        values=tuple(specs[i] for i in places),
        sources=tuple(of_parameter.get(id(v), of_place.get(i, -1)) for i, v in enumerate(values)),
        trained=tuple(of_parameter[id(p)] for p in function.parameters),
        boundary_in=tuple(function.boundary_in),
        boundary_out=tuple(function.boundary_out),
        coordinates=tuple(chain.coordinates),
        observables=tuple(chain.observables[i] for i in function.observables),
        to_energy=(True,) * num_out if dependence is None else tuple(d.energy for d in dependence),
        autocast=chain.autocast,
        device=device,
        groups=tuple(groups),
        constants=constants,
        hints=tuple(first[g[0]] for g in groups),
    )


def first_places(values: Sequence[Any]) -> tuple[int, ...]:
    """Returns the positions of the values that graphs take: a parameter that is read under several names is one."""
    first = {id(v): i for i, v in reversed(list(enumerate(values)))}
    return tuple(i for i, v in enumerate(values) if not isinstance(v, nn.Parameter) or first[id(v)] == i)


def bind(function: TraceableStage, tensors: Sequence[Any]) -> dict[str, int]:
    """Returns the values of a stage's size symbols for one call's tensors."""
    return {s: tensors[i].shape[d] for s, (i, d) in function.symbols.items()}


def fake_device(kind: str) -> torch.device:
    """Returns the device on which a stage is traced; ranks that run it have devices of the same type."""
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
