"""Traces the joint graph of a stage, once and with symbolic sizes: forward, force and double backward.

This is the only place where autograd runs. What it does here is what :class:`~lightning_januspipe.engine.stage.Stage`
does for every micro-batch, in one walk: with ``(h_out, y) = f(h_in, x; θ)``

* FF: ``(p, g_in) = ∂[E + g_out·h_out] / ∂(x, h_in)``,
* BF and BE: ``(u_out, λ_in, θ̄) = ∂[v·p + u_in·g_in + λ_out·h_out + Ē·y] / ∂(g_out, h_in, θ)``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from lightning_januspipe.compiled import graphs
from lightning_januspipe.compiled.blueprint import StageBlueprint, fake_device
from lightning_januspipe.compiled.ports import Kind, Port
from lightning_januspipe.compiled.size_one import guards_of_ones
from lightning_januspipe.compiled.sizes import StageSizes, compiled_expression
from lightning_januspipe.compiled.torch_internals import (
    FakeTensorMode,
    expression_of,
    new_size,
    size_guards,
    symbolic_mode,
    traced_graph,
)
from lightning_januspipe.engine.autocast import OFF, autocast_as
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.engine.weight_split import gradients_of


@dataclass
class Joint:
    """Holds the joint graph of a stage.

    Attributes:
        graph: the operations of all phases; its placeholders are ``inputs``, its results ``outputs``.
        root: holds the graph's constants.
        inputs: what each placeholder is.
        outputs: what each result is.
        mode: the mode that its tensors belong to.
        sizes: the sizes that it takes.
    """

    graph: fx.Graph
    root: torch.nn.Module
    inputs: list[Port]
    outputs: list[Port]
    mode: FakeTensorMode
    sizes: StageSizes

    @property
    def ports_of(self) -> dict[fx.Node, Port]:
        """Tells what each placeholder is."""
        return dict(zip(graphs.placeholders(self.graph), self.inputs, strict=True))

    @property
    def wanted(self) -> list[tuple[fx.Node, Port]]:
        """Returns the results and what each of them is."""
        return list(zip(graphs.results(self.graph), self.outputs, strict=True))


def trace_joint(stage: StageBlueprint, *, trains: bool = True) -> Joint:
    """Traces a stage and its double backward: ``blueprint -> joint graph``.

    Args:
        stage: the stage, without parameters.
        trains: also trace BF and BE.
    """
    mode = symbolic_mode()
    symbolic = [new_size(mode, group[0], hint) for group, hint in zip(stage.groups, stage.hints, strict=True)]
    known: dict[str, Any] = dict(stage.constants)
    for group, size in zip(stage.groups, symbolic, strict=True):
        known.update(dict.fromkeys(group, size))
    names = [expression_of(size) for size in symbolic]
    sizes = StageSizes(dict(zip(names, stage.groups, strict=True)), stage.constants)
    device = fake_device(stage.device)

    def fakes(specs: Sequence[TensorSpec]) -> list[Tensor]:
        # Messages are contiguous. Each input gets a tensor of its own: tracing tells them apart by identity.
        with mode:
            return [torch.empty(shape_of(s, known), dtype=s.dtype, device=device) for s in specs]

    given: dict[Kind, list[Any]] = {
        Kind.SIZE: list(symbolic),
        Kind.VALUE: fakes(stage.values),
        Kind.BOUNDARY_IN: fakes(stage.boundary_in),
        Kind.FORCE_SEED: fakes(stage.boundary_out),
    }
    if trains:
        given |= {
            Kind.FORCE_COTANGENT: fakes(stage.boundary_in),
            Kind.DERIVATIVE_COTANGENT: fakes(stage.coordinates),
            Kind.BOUNDARY_COTANGENT: fakes(stage.boundary_out),
            Kind.OBSERVABLE_COTANGENT: fakes(stage.observables),
        }
    inputs = [Port(kind, i) for kind, members in given.items() for i in range(len(members))]
    outputs: list[Port] = []

    def joint(*flat: Any) -> list[Tensor]:
        rest = iter(flat)
        inputs = {kind: [next(rest) for _ in members] for kind, members in given.items()}
        sizes = dict(stage.constants)  # as inputs of the graph, for exchanges
        for group, size in zip(stage.groups, inputs[Kind.SIZE], strict=True):
            sizes.update(dict.fromkeys(group, size))
        found = _all_phases(stage, inputs, sizes)
        outputs[:] = [port for port, _ in found]
        # Inductor asserts strides, so messages are contiguous.
        is_message = [port.kind is not Kind.PARAMETER_GRADIENT for port, _ in found]
        return [t.detach().contiguous() if m else t.detach() for (_, t), m in zip(found, is_message, strict=True)]

    root = traced_graph(joint, [t for members in given.values() for t in members])
    sizes = sizes.with_guards([*_conditions(stage, names), *size_guards(mode), *guards_of_ones(root, mode)])
    return Joint(root.graph, root, inputs, outputs, mode, sizes)


def _conditions(stage: StageBlueprint, names: Sequence[str]) -> list[str]:
    """Returns the relations between sizes of the graph for which the operations of its stage are right.

    Args:
        stage: the stage, in whose size symbols its body has them.
        names: the names, one for each group of symbols.
    """
    name_of = {symbol: str(value) for symbol, value in stage.constants.items()}
    for name, group in zip(names, stage.groups, strict=True):
        name_of.update(dict.fromkeys(group, name))
    conditions = getattr(stage.body, "conditions", ())
    return [re.sub(r"\b[a-z]\w*", lambda match: name_of.get(match[0], match[0]), text) for text in conditions]


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
    stage: StageBlueprint, given: Mapping[Kind, Sequence[Any]], sizes: Mapping[str, Any]
) -> list[tuple[Port, Tensor]]:
    """Returns all results of all phases, with what they are; parameter gradients that do not exist are left out."""
    values = [_leaf(t, i in stage.trained) for i, t in enumerate(given[Kind.VALUE])]
    parameters = [values[i] for i in stage.trained]
    boundary = [_leaf(t) for t in given[Kind.BOUNDARY_IN]]
    seeds = [_leaf(t) for t in given[Kind.FORCE_SEED]]
    with torch.enable_grad(), autocast_as(OFF):
        read = [values[s] if isinstance(s, int) else s.traced(sizes) for s in stage.sources]
        out = stage.body(read, boundary)
    roots = [(e, torch.ones_like(e)) for e in out.energies if e.requires_grad]
    sent = zip(out.boundary, seeds, stage.to_energy, strict=True)
    roots += [(h, seed) for h, seed, leads_to_energy in sent if h.requires_grad and leads_to_energy]
    differentiated = [h for h in boundary if h.requires_grad]
    inputs = [*out.coordinates, *differentiated]
    trains = Kind.DERIVATIVE_COTANGENT in given
    with torch.enable_grad(), autocast_as(stage.autocast):
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
    """Returns one gradient for each value, from the gradients of the values that require one."""
    given = iter(gradients)
    return [next(given) if v.requires_grad else None for v in values]


def _filled(gradients: Sequence[Tensor | None], values: Sequence[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(v) if g is None else g for g, v in zip(gradients, values, strict=True)]
