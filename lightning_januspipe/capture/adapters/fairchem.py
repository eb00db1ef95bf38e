"""Helps fairchem-core's eSEN and UMA through capture: builds edges outside the trace, replaces loops over structures.

``MOLE`` multiplies the edges of each structure by a matrix of its own, in a loop over structures. Names of datasets are
embedded in a loop too. The adapter replaces each loop by one operation. With ``otf_graph`` the forward builds edges in
loops; the adapter builds them before the traced call. Other models, such as eSEN on given edges, need no adapter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.patches import patched
from lightning_januspipe.capture.trees import copied
from lightning_januspipe.experts.grouped import grouped_linear


class FairchemAdapter(Adapter):
    """Adapts backbones that build edges, have ``MOLE`` layers, or embed names of datasets."""

    def capturing(self, module: nn.Module) -> AbstractContextManager[None]:
        """Returns a context without logs of the experts' statistics, which read values that depend on parameters."""
        return _without_statistics(module)

    def arguments(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the arguments with indices in the place of names of datasets, and with edges."""
        names, makers = _dataset_names(potential), _edge_makers(potential)
        if not args or not (makers or (names and "dataset" in args[0])):
            return args, kwargs
        data = copied(args[0])
        if names and "dataset" in data:
            mapping, order = names
            places = [order.index(mapping[name]) for name in data["dataset"]]
            data["dataset"] = torch.tensor(places, device=data["pos"].device)
        for maker in makers:
            _make_edges(maker, data)
        return (data, *args[1:]), kwargs

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which experts and embeddings take all structures together."""
        return _together(potential)


def _edge_makers(potential: nn.Module) -> list[Any]:
    return [part for part in potential.modules() if getattr(part, "otf_graph", False)]


def _make_edges(backbone: Any, data: Any) -> None:
    """Gives data the edges that a backbone builds in its forward."""
    from fairchem.core.graph.compute import generate_graph

    given = copied(data)
    given["pos"], given["cell"] = data["pos"].detach(), data["cell"].detach()
    periodic = torch.ones(len(data["natoms"]), 3, dtype=torch.bool) if backbone.always_use_pbc else data["pbc"]
    with torch.no_grad():
        graph = generate_graph(
            given,
            cutoff=backbone.cutoff,
            max_neighbors=backbone.max_neighbors,
            enforce_max_neighbors_strictly=backbone.enforce_max_neighbors_strictly,
            radius_pbc_version=backbone.radius_pbc_version,
            pbc=periodic,
        )
    data["edge_index"], data["cell_offsets"] = graph["edge_index"], graph["cell_offsets"]
    data["nedges"] = graph["neighbors"].to(data["natoms"].device)


def _dataset_names(potential: nn.Module) -> tuple[dict[str, str], list[str]] | None:
    part: Any
    for part in potential.modules():
        if hasattr(part, "dataset_emb_dict"):
            return part.dataset_mapping, list(part.dataset_emb_dict)
    return None


@contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    owners = [part for part in module.modules() if hasattr(part, "log_MOLE_stats")]
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(patched(owner, "log_MOLE_stats", lambda: None))
        yield


@contextmanager
def _together(potential: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for maker in _edge_makers(potential):
            stack.enter_context(patched(maker, "otf_graph", False))
        for part in potential.modules():
            if hasattr(part, "global_mole_tensors") and hasattr(part, "merged_linear_layer"):
                stack.enter_context(patched(part, "forward", partial(_experts, part)))
            elif hasattr(part, "dataset_emb_dict"):
                stack.enter_context(patched(part, "forward", partial(_dataset_embedding, part)))
            elif getattr(part, "num_experts", 0) and hasattr(part, "set_MOLE_sizes"):
                stack.enter_context(patched(part, "set_MOLE_sizes", partial(_set_structures, part)))
        yield


def _set_structures(backbone: Any, nsystems: int, batch_full: Tensor, edge_index: Tensor) -> None:
    """Keeps the structure of each edge in the place of each structure's number of edges."""
    backbone.global_mole_tensors.mole_sizes = batch_full[edge_index[1]]


def _experts(layer: Any, x: Tensor) -> Tensor:
    """Returns (E, ..., O), the products of the edges' features and the mixed weights of their structures."""
    shared = layer.global_mole_tensors
    weights = torch.einsum("eoi, be->bio", layer.weights, shared.expert_mixing_coefficients)
    result = grouped_linear(x, weights.to(x.dtype), shared.mole_sizes)
    return result if layer.bias is None else result + layer.bias


def _dataset_embedding(embedding: Any, places: Tensor) -> Tensor:
    """Returns (B, width), the embeddings of the datasets that structures are from."""
    table = torch.cat([part.weight for part in embedding.dataset_emb_dict.values()])
    return table[places]
