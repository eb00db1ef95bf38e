"""Helps fairchem-core's eSEN and UMA through capture: builds edges outside the trace, replaces loops over structures.

``MOLE`` multiplies the edges of each structure by a matrix of its own, in a loop over structures. Names of datasets are
embedded in a loop too, and heads tell the structures of several datasets apart by them. The adapter replaces each loop
by one operation, and names by indices. With ``otf_graph`` the forward builds edges in loops; the adapter builds them
before the traced call. Other models, such as eSEN on given edges, need no adapter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    """Adapts backbones that build edges, have ``MOLE`` layers, or embed names of datasets, and heads of datasets."""

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
            _require_known(data["dataset"], names)
            places = [names.index(name) for name in data["dataset"]]
            data["dataset"] = torch.tensor(places, device=data["pos"].device)
        for maker in makers:
            _make_edges(maker, data)
        return (data, *args[1:]), kwargs

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which experts and embeddings take all structures together."""
        return _together(potential)


def _edge_makers(potential: nn.Module) -> list[Any]:
    return [
        part for part in potential.modules() if getattr(part, "otf_graph", False) and hasattr(part, "always_use_pbc")
    ]


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


def _dataset_names(potential: nn.Module) -> list[str]:
    """Returns the names of datasets that a potential tells apart, in the order of their indices."""
    names: dict[str, None] = {}
    part: Any
    for part in potential.modules():
        if hasattr(part, "dataset_emb_dict"):
            names |= dict.fromkeys(part.dataset_mapping)
        elif _is_head_of_datasets(part):
            names |= dict.fromkeys(part.dataset_names)
    return list(names)


def _require_known(given: Sequence[str], names: Sequence[str]) -> None:
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"a batch has the datasets {unknown}; the potential knows {sorted(names)}")


def _is_head_of_datasets(part: Any) -> bool:
    """Returns whether a module gives each dataset's structures outputs of their own: of one dataset, once merged."""
    return hasattr(part, "dataset_names") and getattr(part, "merged_on_dataset", "") is None


@contextmanager
def _without_statistics(module: nn.Module) -> Iterator[None]:
    owners = [part for part in module.modules() if hasattr(part, "log_MOLE_stats")]
    with ExitStack() as stack:
        for owner in owners:
            stack.enter_context(patched(owner, "log_MOLE_stats", lambda: None))
        yield


@contextmanager
def _together(potential: nn.Module) -> Iterator[None]:
    names = _dataset_names(potential)
    with ExitStack() as stack:
        for maker in _edge_makers(potential):
            stack.enter_context(patched(maker, "otf_graph", False))
        for part in potential.modules():
            if hasattr(part, "global_mole_tensors") and hasattr(part, "merged_linear_layer"):
                stack.enter_context(patched(part, "forward", partial(_experts, part)))
            elif hasattr(part, "dataset_emb_dict"):
                stack.enter_context(patched(part, "forward", partial(_dataset_embedding, part, names)))
            elif _is_head_of_datasets(part):
                stack.enter_context(patched(part, "forward", partial(_outputs_of_datasets, part, names)))
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


def _dataset_embedding(embedding: Any, names: Sequence[str], datasets: Tensor) -> Tensor:
    """Returns (B, width), the embeddings of the datasets that structures are from; several may have one in common."""
    rows = embedding.dataset_emb_dict
    return torch.cat([rows[embedding.dataset_mapping[name]].weight for name in names])[datasets]


def _outputs_of_datasets(wrapper: Any, names: Sequence[str], data: Any, emb: dict[str, Tensor]) -> dict[str, Any]:
    """Returns each dataset's outputs of a head, which are zero for structures, and their atoms, of other datasets."""
    found = {}
    with torch.enable_grad():
        outputs = wrapper.head(data, emb)
    for name in wrapper.dataset_names:
        is_own = data["dataset"] == names.index(name)
        for key, value in outputs.items():
            rows = is_own if value.shape[0] == is_own.shape[0] else is_own[data["batch_full"]]
            own = torch.where(rows.reshape(-1, *[1] * (value.dim() - 1)), value, 0.0)
            found[f"{name}_{key}"] = {key: own} if wrapper.wrap_property else own
    return found
