"""The joint graph of a stage: forward, force and double backward, traced once with symbolic sizes.

This is the only place where autograd runs. What it does here is what :class:`~lightning_januspipe.engine.stage.Stage`
does for every micro-batch, in one walk: with ``(h_out, y) = f(h_in, x; θ)``

* FF: ``(p, g_in) = ∂[E + g_out·h_out] / ∂(x, h_in)``,
* BF and BE: ``(u_out, λ_in, θ̄) = ∂[v·p + u_in·g_in + λ_out·h_out + Ē·y] / ∂(g_out, h_in, θ)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from lightning_januspipe.compiled import graphs
from lightning_januspipe.compiled.ports import Kind, Port
from lightning_januspipe.compiled.sizes import StageSizes, agree, compiled_expression
from lightning_januspipe.compiled.torch_internals import (
    FakeTensorMode,
    hint_of,
    new_size,
    symbolic_mode,
    traced_graph,
)
from lightning_januspipe.engine.autocast import OFF, autocast_as
from lightning_januspipe.engine.specs import ChainSpec, StageFunction, StageOutput, TensorSpec
from lightning_januspipe.engine.weight_split import gradients_of


class TraceableStage(StageFunction, Protocol):
    """A stage whose phases can be traced: one that says which tensors it reads beside its boundary.

    Attributes:
        symbols: size symbol -> (position, dimension) of the call's tensor that defines it.
    """

    @property
    def symbols(self) -> Mapping[str, tuple[int, int]]:
        """See above."""

    @property
    def value_specs(self) -> Sequence[TensorSpec]:
        """Specs of :meth:`values`, in the size symbols."""

    def values(self, tensors: Sequence[Any]) -> list[Any]:
        """Returns all tensors that the stage reads: parameters, buffers, constants and those of the batch.

        Args:
            tensors: the potential call's tensors.
        """

    def evaluate(self, values: Sequence[Any], boundary: Sequence[Tensor]) -> StageOutput:
        """Evaluates the stage on such values and the boundary that it receives."""


@dataclass
class Joint:
    """The joint graph of a stage.

    Attributes:
        graph: the operations of all phases; its placeholders are ``inputs``, its results ``outputs``.
        root: holds the graph's constants.
        inputs: what each placeholder is.
        outputs: what each result is.
        mode: the mode that its tensors belong to.
        sizes: the sizes that it takes.
        places: which of the stage's values each value input is; equal parameters are one input.
        device: where its tensors live.
    """

    graph: fx.Graph
    root: torch.nn.Module
    inputs: list[Port]
    outputs: list[Port]
    mode: FakeTensorMode
    sizes: StageSizes
    places: tuple[int, ...]
    device: torch.device

    @property
    def ports_of(self) -> dict[fx.Node, Port]:
        """What each placeholder is."""
        return dict(zip(graphs.placeholders(self.graph), self.inputs, strict=True))

    @property
    def wanted(self) -> list[tuple[fx.Node, Port]]:
        """The results and what each of them is."""
        return list(zip(graphs.results(self.graph), self.outputs, strict=True))


def trace_joint(
    function: TraceableStage,
    chain: ChainSpec,
    tensors: Sequence[Any],
    other: Sequence[Any],
    *,
    trains: bool = True,
) -> Joint:
    """Traces a stage and its double backward: ``(stage, two calls) -> joint graph``.

    Args:
        function: the stage.
        chain: what all stages share.
        tensors: the potential call's tensors in an example; inductor sees their sizes as the usual ones.
        other: the same in a call with other sizes.
        trains: also trace BF and BE.
    """
    mode = symbolic_mode()
    bound, bound_other = (
        {s: t[i].shape[d] for s, (i, d) in function.symbols.items()} for t in (tensors, other)
    )
    leading = {s: d == 0 for s, (_, d) in function.symbols.items()}
    groups, constants = agree(bound, bound_other, leading)
    symbolic = [new_size(mode, group[0], bound[group[0]]) for group in groups]
    known: dict[str, Any] = dict(constants)
    for group, size in zip(groups, symbolic, strict=True):
        known.update(dict.fromkeys(group, size))
    sizes = StageSizes({str(s.node.expr): g for s, g in zip(symbolic, groups, strict=True)}, constants)

    values = function.values(tensors)
    places = _first_places(values)
    device = next((v.device for v in values if isinstance(v, Tensor)), torch.device("cpu"))

    def fakes(specs: Sequence[TensorSpec]) -> list[Tensor]:
        # Messages are contiguous. Each input gets a tensor of its own: tracing tells them apart by identity.
        with mode:
            return [torch.empty(shape_of(s, known), dtype=s.dtype, device=device) for s in specs]

    specs = function.value_specs
    given: dict[Kind, list[Any]] = {
        Kind.SIZE: list(symbolic),
        Kind.VALUE: fakes([specs[i] for i in places]),
        Kind.BOUNDARY_IN: fakes(function.boundary_in),
        Kind.FORCE_SEED: fakes(function.boundary_out),
    }
    if trains:
        given |= {
            Kind.FORCE_COTANGENT: fakes(function.boundary_in),
            Kind.DERIVATIVE_COTANGENT: fakes(chain.coordinates),
            Kind.BOUNDARY_COTANGENT: fakes(function.boundary_out),
            Kind.OBSERVABLE_COTANGENT: fakes([chain.observables[i] for i in function.observables]),
        }
    inputs = [Port(kind, i) for kind, members in given.items() for i in range(len(members))]
    outputs: list[Port] = []
    trained = {id(p) for p in function.parameters}
    is_trained = [id(values[i]) in trained for i in places]
    index_of = {id(values[i]): k for k, i in enumerate(places)}
    parameters = [index_of[id(p)] for p in function.parameters]
    where = [index_of[id(v)] if id(v) in index_of else None for v in values]
    assert all(w is not None for w in where)

    def joint(*flat: Any) -> list[Tensor]:
        rest = iter(flat)
        arguments = {kind: [next(rest) for _ in members] for kind, members in given.items()}
        inside = [_leaf(t, t_is) for t, t_is in zip(arguments[Kind.VALUE], is_trained, strict=True)]
        found = _all_phases(
            function, chain, [inside[w] for w in where if w is not None], [inside[k] for k in parameters], arguments
        )
        outputs[:] = [port for port, _ in found]
        # Inductor asserts strides, so messages are contiguous.
        is_message = [port.kind is not Kind.PARAMETER_GRADIENT for port, _ in found]
        return [t.detach().contiguous() if m else t.detach() for (_, t), m in zip(found, is_message, strict=True)]

    root = traced_graph(joint, [t for members in given.values() for t in members])
    return Joint(root.graph, root, inputs, outputs, mode, sizes, places, device)


def shape_of(spec: TensorSpec, sizes: Mapping[str, Any]) -> list[Any]:
    """Returns the shape of a spec for values of its symbols, which may be symbolic themselves."""
    found = []
    for size in spec.shape:
        if isinstance(size, str):
            if size in sizes:
                size = sizes[size]
            else:
                names, function = compiled_expression(size)
                size = function(*(sizes[n] for n in names))
        found.append(size)
    return found


def _all_phases(
    function: TraceableStage,
    chain: ChainSpec,
    values: Sequence[Tensor],
    parameters: Sequence[Tensor],
    given: Mapping[Kind, Sequence[Tensor]],
) -> list[tuple[Port, Tensor]]:
    """All results of all phases, with what they are; parameter gradients that do not exist are left out."""
    boundary = [_leaf(t) for t in given[Kind.BOUNDARY_IN]]
    seeds = [_leaf(t) for t in given[Kind.FORCE_SEED]]
    with torch.enable_grad(), autocast_as(OFF):
        out = function.evaluate(values, boundary)
    leads_to = chain.dependence[function.index] if out.boundary and chain.dependence else [None] * len(out.boundary)
    roots = [(e, torch.ones_like(e)) for e in out.energies if e.requires_grad]
    roots += [
        (h, s)
        for h, s, r in zip(out.boundary, seeds, leads_to, strict=True)
        if h.requires_grad and (r is None or r.energy)
    ]
    differentiated = [h for h in boundary if h.requires_grad]
    inputs = [*out.coordinates, *differentiated]
    trains = Kind.DERIVATIVE_COTANGENT in given
    with torch.enable_grad(), autocast_as(chain.autocast):
        first = gradients_of(roots, inputs, create_graph=trains, retain_graph=trains)
    num = len(out.coordinates)
    derivatives = _filled(first[:num], out.coordinates)
    gradients = _filled(_spread(first[num:], boundary), boundary)
    found: dict[Kind, Sequence[Tensor | None]] = {
        Kind.BOUNDARY_OUT: out.boundary,
        Kind.OBSERVABLE: out.observables,
        Kind.DERIVATIVE: derivatives,
        Kind.BOUNDARY_GRADIENT: gradients,
    }
    if trains:
        ends = [*derivatives, *gradients, *out.boundary, *out.observables]
        cotangents = [
            *given[Kind.DERIVATIVE_COTANGENT],
            *given[Kind.FORCE_COTANGENT],
            *given[Kind.BOUNDARY_COTANGENT],
            *given[Kind.OBSERVABLE_COTANGENT],
        ]
        pairs = [(t, c) for t, c in zip(ends, cotangents, strict=True) if t.requires_grad]
        seeded = [s for s in seeds if s.requires_grad]
        with autocast_as(OFF):
            second = gradients_of(pairs, [*seeded, *differentiated, *parameters])
        of_seeds, rest = second[: len(seeded)], second[len(seeded) :]
        found |= {
            Kind.SEED_COTANGENT: _filled(_spread(of_seeds, seeds), seeds),
            Kind.BOUNDARY_IN_COTANGENT: _filled(_spread(rest[: len(differentiated)], boundary), boundary),
            Kind.PARAMETER_GRADIENT: rest[len(differentiated) :],
        }
    return [(Port(kind, i), t) for kind, ts in found.items() for i, t in enumerate(ts) if t is not None]


def _leaf(value: Tensor, is_differentiated: bool = True) -> Tensor:
    is_differentiable = value.is_floating_point() or value.is_complex()
    return value.detach().requires_grad_(is_differentiated and is_differentiable)


def _spread(gradients: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Tensor | None]:
    """One gradient for each value, from those of the values that require one."""
    given = iter(gradients)
    return [next(given) if v.requires_grad else None for v in values]


def _filled(gradients: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, values, strict=True)]


def _first_places(values: Sequence[Any]) -> tuple[int, ...]:
    """Positions of the values that differ from all before them: parameters may be read under several names."""
    first: dict[int, int] = {}
    for i, value in enumerate(values):
        first.setdefault(id(value), i)
    return tuple(first.values())


def hints(joint: Joint) -> dict[str, int]:
    """Returns the sizes of the example call, by the joint graph's names for them."""
    nodes = graphs.placeholders(joint.graph)
    found = [hint_of(n.meta["val"]) for n, p in zip(nodes, joint.inputs, strict=True) if p.kind is Kind.SIZE]
    return dict(zip(joint.sizes.groups, found, strict=True))
