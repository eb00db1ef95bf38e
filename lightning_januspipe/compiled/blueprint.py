"""Describes a stage as plain data, so that another process can trace it: all that its joint graph depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.trace.program import symbols_in
from lightning_januspipe.compiled.sizes import agree
from lightning_januspipe.engine.autocast import Autocast
from lightning_januspipe.engine.specs import ChainSpec, StageFunction, StageOutput, TensorSpec

Body = Callable[[Sequence[Any], Sequence[Tensor]], StageOutput]
"""A stage as a pure function of the values that it reads and of its boundary."""


class TracedExchangeSpec(Protocol):
    """Describes an exchange between graph ranks among the values of a stage: graphs take it as sizes."""

    def example(self, sizes: Mapping[str, int]) -> Mapping[str, int]:
        """Returns the sizes that it adds to those of an example call, by their symbols."""

    def traced(self, sizes: Mapping[str, Any]) -> Any:
        """Returns what a trace takes in its place, made of symbolic sizes."""


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
    def rows_of_symbols(self) -> Mapping[str, str]:
        """Maps each size symbol that counts rows of which a graph rank has its own to the class of these rows."""

    @property
    def value_specs(self) -> Sequence[TensorSpec | TracedExchangeSpec]:
        """Returns the specs of :meth:`values`, in the size symbols."""

    @property
    def exchange_specs(self) -> Sequence[TracedExchangeSpec]:
        """Returns the specs of all exchanges that sizes of its tensors follow from, also of those it does not run."""

    def sizes(self, tensors: Sequence[Any]) -> Sequence[Mapping[str, int]]:
        """Returns the values of all size symbols for one call's tensors: on this rank, then on the other graph ranks.

        Args:
            tensors: the potential call's tensors.
        """

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns all tensors that the stage reads: parameters, buffers, constants and those of the batch.

        Args:
            tensors: the potential call's tensors.
        """


def is_traceable(function: StageFunction) -> bool:
    """Tells whether a stage is a :class:`TraceableStage`; its parts may fail to be traced all the same."""
    return hasattr(type(function), "body")


@dataclass(frozen=True)
class StageBlueprint:
    """Describes a stage as the tracer sees it: without parameters, but with their shapes and dtypes.

    Attributes:
        body: the stage's operations.
        values: specs of the values that the joint graph takes, each once.
        sources: for each of the stage's values its position among those taken, or the exchange that it is.
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
    sources: tuple[int | TracedExchangeSpec, ...]
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

    @property
    def example(self) -> dict[str, int]:
        """Returns the values of all size symbols in the example call."""
        sizes = {symbol: hint for group, hint in zip(self.groups, self.hints, strict=True) for symbol in group}
        return {**sizes, **self.constants}

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
    specs = function.value_specs
    shapes = [
        spec.shape for spec in (*specs, *function.boundary_in, *function.boundary_out) if isinstance(spec, TensorSpec)
    ]
    in_shapes = {symbol for shape in shapes for size in shape for symbol in symbols_in(size)}
    added: dict[str, int] = {}
    for exchange in function.exchange_specs:
        sizes = exchange.example(first)
        added |= {s: size for s, size in sizes.items() if exchange in specs or s in in_shapes}
    leading = {**{s: d == 0 for s, (_, d) in function.symbols.items()}, **dict.fromkeys(added, True)}
    first = {**first, **added}
    groups, constants = agree(first, {**second, **added}, leading, function.rows_of_symbols)
    values = function.values([None] * function.num_tensors)  # parameters tell by themselves which are the same
    places = first_places(values, specs)
    of_parameter = {id(values[place]): i for i, place in enumerate(places) if isinstance(values[place], nn.Parameter)}
    of_place = {place: i for i, place in enumerate(places)}
    sources = [
        of_parameter.get(id(v), of_place.get(i, -1)) if isinstance(spec, TensorSpec) else spec
        for i, (v, spec) in enumerate(zip(values, specs, strict=True))
    ]
    num_out = len(function.boundary_out)
    dependence = chain.dependence[function.index] if chain.dependence and num_out else None
    return StageBlueprint(
        body=function.body,
        values=tuple(spec for spec in (specs[i] for i in places) if isinstance(spec, TensorSpec)),
        sources=tuple(sources),
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


def first_places(values: Sequence[Any], specs: Sequence[TensorSpec | TracedExchangeSpec]) -> tuple[int, ...]:
    """Returns the positions of the tensors that graphs take: a parameter that is read under several names is one."""
    first = {id(v): i for i, v in reversed(list(enumerate(values)))}
    return tuple(
        i
        for i, (v, spec) in enumerate(zip(values, specs, strict=True))
        if isinstance(spec, TensorSpec) and (not isinstance(v, nn.Parameter) or first[id(v)] == i)
    )


def fake_device(kind: str) -> torch.device:
    """Returns the device on which a stage is traced; ranks that run it have devices of the same type."""
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
