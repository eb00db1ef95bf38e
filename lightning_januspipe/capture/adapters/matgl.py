"""Helps MatGL 4.1 through capture: builds line graphs outside the trace, and treats one structure as a batch.

M3GNet and CHGNet find pairs of bonds within a second cutoff in their forward, with indices that depend on distances
and, in M3GNet, with numpy. The adapter calls the same functions of MatGL before the traced call, on the bonds that
MatGL itself computes for the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.patches import patched, patched_package
from lightning_januspipe.errors import CaptureError

_RELEASE = "matgl 4.1"


class MatGLAdapter(Adapter):
    """Adapts ``matgl.apps.pes.Potential`` over M3GNet, CHGNet and models without a line graph, such as TensorNet."""

    def arguments(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with lattices ``(B, 3, 3)``, for one structure too, and with the line graph as ``l_g``.

        Raises:
            CaptureError: another module than MatGL's Potential differentiates the energy of M3GNet or CHGNet.
        """
        if not _is_potential(potential):
            _refuse_line_graphs(potential)
            return args, kwargs
        given = inspect.signature(type(potential).forward).bind(potential, *args, **kwargs).arguments
        given.pop("self")
        given["lat"] = given["lat"].reshape(-1, 3, 3)
        if _has_line_graph(potential.model):
            given["l_g"] = line_graph(potential, given)
        return (), given

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which the model takes the line graph that it is given."""
        if _is_potential(potential) and _has_line_graph(potential.model):
            return _tracing(potential.model)
        return super().tracing(potential)


def line_graph(potential: Any, call: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns the pairs of bonds within the model's second cutoff, as the model itself finds them.

    Args:
        potential: MatGL's Potential over M3GNet or CHGNet.
        call: arguments of its forward by name, for B structures with N atoms and E bonds.

    Returns:
        ``line_edge_index`` (2, A), the two bonds of each of A angles, and ``kept_edge_ids`` (V,), the bonds within the
        cutoff. The first holds indices of all bonds for M3GNet, of the bonds within the cutoff for CHGNet.
    """
    from matgl.graph._compute import (
        compute_pair_vector_and_distance,
        create_directed_line_graph,
        create_line_graph,
        ensure_line_graph_compatibility,
    )

    model, graph = potential.model, _graph_of_model(potential, call)
    with torch.no_grad():
        vectors, distances = compute_pair_vector_and_distance(graph.pos, graph.edge_index, graph.pbc_offshift)
        if _is_m3gnet(model):
            cutoff = model.threebody_cutoff
            if call.get("l_g") is not None:
                found = ensure_line_graph_compatibility(call["l_g"], distances, vectors, graph.pbc_offshift, cutoff)
            else:
                num_atoms = graph.pos.shape[0]
                found = create_line_graph(graph.edge_index, distances, vectors, graph.pbc_offshift, num_atoms, cutoff)
            return {name: found[name] for name in ("line_edge_index", "kept_edge_ids", "n_triple_ij")}
        cutoff = model.three_body_cutoff
        pairs, *_ = create_directed_line_graph(graph.edge_index, graph.pbc_offset, vectors, distances, cutoff)
        kept = (distances <= cutoff).nonzero().squeeze(1)
        return {"line_edge_index": pairs.long(), "kept_edge_ids": kept}


class _Reached(Exception):
    def __init__(self, graph: Any) -> None:
        super().__init__()
        self.graph = graph


def _graph_of_model(potential: Any, call: Mapping[str, Any]) -> Any:
    """Returns the graph as the Potential hands it to its model, with positions and offsets."""

    def stop(g: Any, **_: Any) -> None:
        raise _Reached(g)

    try:
        with torch.no_grad(), patched(potential.model, "forward", stop):
            potential.forward(**call)
    except _Reached as reached:
        return reached.graph
    raise AssertionError("MatGL's Potential did not call its model")


@contextmanager
def _tracing(model: Any) -> Iterator[None]:
    from matgl.models import _chgnet, _m3gnet

    original = model.forward
    given: dict[str, Tensor] = {}

    def compatible(graph: Mapping[str, Tensor], bond_dist: Tensor, bond_vec: Tensor, *_: Any) -> dict[str, Tensor]:
        return {**graph, "bond_dist": bond_dist, "bond_vec": bond_vec}

    def directed(
        edge_index: Tensor, pbc_offset: Tensor, bond_vec: Tensor, bond_dist: Tensor, threebody_cutoff: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        kept = given["kept_edge_ids"]
        vectors = bond_vec[kept]
        return given["line_edge_index"], vectors, bond_dist[kept], pbc_offset[kept], -torch.ones_like(vectors[:, :1])

    def chgnet_forward(g: Any, state_attr: Any = None, l_g: Any = None) -> Any:
        given.update(l_g)
        with _KeptBonds(given["kept_edge_ids"]):
            return original(g=g, state_attr=state_attr, l_g=l_g)

    if _is_m3gnet(model):
        with patched_package(_m3gnet, "ensure_line_graph_compatibility", compatible, _RELEASE):
            yield
    else:
        with (
            patched_package(_chgnet, "create_directed_line_graph", directed, _RELEASE),
            patched(model, "forward", chgnet_forward),
        ):
            yield


class _KeptBonds(TorchFunctionMode):
    """Answers ``nonzero`` with the bonds within the cutoff."""

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.nonzero:
            return self._kept[:, None]
        return func(*args, **(kwargs or {}))


def _refuse_line_graphs(potential: nn.Module) -> None:
    found = [n for n, m in potential.named_modules() if _is_potential(m) and _has_line_graph(m.model)]
    if found:
        raise CaptureError(
            f"{type(potential).__name__} calls MatGL's Potential in its {found[0]!r}. Where the model builds a "
            "line graph, only the Potential itself can be captured. Name it: JanusPipeStrategy(potential=...) with its "
            f"dotted name in the LightningModule, which ends in {found[0]!r}."
        )


def _is_potential(module: nn.Module) -> bool:
    from matgl.apps.pes import Potential

    return isinstance(module, Potential)


def _is_m3gnet(model: nn.Module) -> bool:
    from matgl.models import M3GNet

    return isinstance(model, M3GNet)


def _has_line_graph(model: Any) -> bool:
    from matgl.models import CHGNet

    return _is_m3gnet(model) or (isinstance(model, CHGNet) and model.use_bond_graph)
