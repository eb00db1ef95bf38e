"""Traces a potential with its derivatives into one graph for structures of any size, and compiles it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_januspipe import keys
from lightning_januspipe.compiled import torch_internals
from lightning_januspipe.compiled.size_one import guards_of_ones
from lightning_januspipe.compiled.sizes import StageSizes

INPUTS: dict[str, tuple[tuple[str | int, ...], str]] = {
    keys.POSITIONS: (("N", 3), "float"),
    keys.SPECIES: (("N",), "int64"),
    keys.EDGE_INDEX: ((2, "E"), "int64"),
    keys.CELL_SHIFTS: (("E", 3), "float"),
    keys.CELL: (("B", 3, 3), "float"),
    keys.BATCH: (("N",), "int64"),
}
"""The tensors that the graph takes, in their order, with shapes for N atoms, E edges and B structures."""


def conditions_of(potential: nn.Module) -> tuple[str, ...]:
    """Returns the keys of a batch that a potential reads beside the structures: of task, charge and spin."""
    found = getattr(potential, "conditions", None)
    if found is None:
        return (keys.TASK, keys.CHARGE, keys.SPIN) if getattr(potential, "tasks", ()) else ()
    return tuple(found)


def inputs_of(potential: nn.Module) -> dict[str, tuple[tuple[str | int, ...], str]]:
    """Returns the tensors that the graph of a potential takes: :data:`INPUTS`, and an integer (B,) per condition."""
    return INPUTS | dict.fromkeys(conditions_of(potential), (("B",), "int64"))


OUTPUTS = (keys.ENERGY, keys.FORCES, keys.STRESS)
"""The results of the graph, in their order."""

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-3}
"""What rounding explains of a difference between compiled and eager results, relative to the scale of the values."""

_EXAMPLE = {"N": 23, "E": 417, "B": 5}


def trace_evaluation(
    potential: nn.Module, floats: torch.dtype, device: torch.device, num_structures: int | None = None
) -> tuple[fx.GraphModule, torch_internals.FakeTensorMode, dict[str, Any]]:
    """Traces a potential's forward, in which it differentiates its energy.

    Args:
        potential: A potential without trained parameters that takes the batches of :mod:`lightning_januspipe.keys`.
        floats: Type of the floating-point inputs.
        device: Device of the inputs.
        num_structures: The number B of structures, if the graph is for one number only.

    Returns:
        The graph from the :func:`inputs_of` the potential to :data:`OUTPUTS`, which needs no autograd; the mode of its
        fake tensors; and the sizes N, E and B, symbolic but for a given number of structures.
    """
    mode, inputs = torch_internals.symbolic_mode(), inputs_of(potential)
    sizes: dict[str, Any] = {name: torch_internals.new_size(mode, name, hint) for name, hint in _EXAMPLE.items()}
    if num_structures is not None:
        sizes["B"] = num_structures
    with mode:
        arguments = [
            torch.empty(
                [sizes[n] if isinstance(n, str) else n for n in shape], dtype=input_dtype(kind, floats), device=device
            )
            for shape, kind in inputs.values()
        ]

    def forward(*given: Tensor) -> list[Tensor]:
        found = potential(dict(zip(inputs, given, strict=True)))
        return [found[name].contiguous() for name in OUTPUTS]

    return torch_internals.traced_graph(forward, arguments), mode, sizes


def input_dtype(kind: str, floats: torch.dtype) -> torch.dtype:
    """Returns the type of an input."""
    return floats if kind == "float" else torch.int64


class CompiledPotential:
    """Evaluates a potential for one structure at a time by compiled code, which no size has compiled again.

    Args:
        potential: See :func:`trace_evaluation`. Its weights must not change any more.
        floats: Type of the floating-point inputs.
        device: Device of the inputs.

    Raises:
        Exception: Whatever torch raises where it cannot trace or compile the potential.
    """

    def __init__(self, potential: nn.Module, floats: torch.dtype, device: torch.device) -> None:
        with torch.inference_mode(False):
            graph, mode, sizes = trace_evaluation(potential, floats, device, 1)
        self._run: Callable[..., Sequence[Tensor]] = torch_internals.compiled(graph, mode)
        self._inputs = tuple(inputs_of(potential))
        names = {torch_internals.expression_of(sizes[name]): (name,) for name in ("N", "E")}
        guards = [*torch_internals.size_guards(mode), *guards_of_ones(graph, mode)]
        self._sizes = StageSizes(names, {"B": 1}).with_guards(guards)

    def misfit(self, batch: Mapping[str, Tensor]) -> str | None:
        """Returns in words why the code is not right for the sizes of a batch, such as no edges; None where it is."""
        num_atoms, num_edges = batch[keys.SPECIES].shape[0], batch[keys.EDGE_INDEX].shape[1]
        return self._sizes.misfit({"N": num_atoms, "E": num_edges, "B": batch[keys.CELL].shape[0]})

    def __call__(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns energy, forces and stress of a batch that fits."""
        with torch.no_grad():
            found = self._run(*(batch[name].contiguous() for name in self._inputs))
        return dict(zip(OUTPUTS, found, strict=True))
