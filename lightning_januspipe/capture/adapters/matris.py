"""Helps MatRIS 0.1 through capture: batches graphs outside the trace, as its ``process_graphs`` does.

Numbers of atoms, edges and angles stay symbolic, which a trace would make constants of, and so do the lists with an
entry for each structure that MatRIS returns. Its fused GPU kernels are traced as the functions that they compute. Its
activation checkpointing is traced as the operations inside, since a stage decides itself what it keeps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.patches import patched, patched_package
from lightning_januspipe.capture.trees import children
from lightning_januspipe.errors import CaptureError

_UNITS_OF_ANGLE = 5  # columns of a line graph: atom, undirected and directed edge of one arm, and of the other

_RELEASE = "matris 0.1"


class MatRISAdapter(Adapter):
    """Adapts ``matris.model.model.MatRIS``."""

    def arguments(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the graphs as one dict of tensors; see :func:`batched`.

        Raises:
            CaptureError: another module than the MatRIS differentiates the energy.
        """
        if not _is_matris(potential):
            if any(_is_graph(x) for x in _objects((args, kwargs))):
                name = next(n for n, m in potential.named_modules() if _is_matris(m))
                raise CaptureError(
                    f"{type(potential).__name__} passes graphs on to the MatRIS in its {name!r}. Only the MatRIS "
                    "itself can be captured. Name it: JanusPipeStrategy(potential=...) with its dotted name in the "
                    f"LightningModule, which ends in {name!r}."
                )
            return args, kwargs
        given = _call(*args, **kwargs)
        reference = getattr(potential, "reference_energy", None)
        # The program is the same whether a second derivative follows or not.
        return (batched(given["graphs"], reference),), {"task": given["task"], "is_training": True}

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which MatRIS takes what :meth:`arguments` makes of its graphs."""
        return _tracing(potential) if _is_matris(potential) else super().tracing(potential)

    def joined(self, potential: nn.Module, returned: Any) -> Any:
        """Returns forces ``f`` and magnetic moments ``m`` of all atoms, and stresses ``s``, each as one tensor."""
        if not _is_matris(potential):
            return returned
        shapes = {"f": (-1, 3), "m": (-1,), "s": (-1, 3, 3)}
        return {
            k: torch.cat([part.reshape(shapes[k]) for part in v]) if k in shapes else v for k, v in returned.items()
        }

    def separated(self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        """Returns forces, magnetic moments and stresses of each structure, as MatRIS returns them."""
        if not _is_matris(potential):
            return returned
        sizes = [g.atomic_number.shape[0] for g in _call(*args, **kwargs)["graphs"]]
        separate: dict[str, Callable[[Tensor], Any]]
        separate = {"f": lambda x: x.split(sizes), "m": lambda x: [*x.split(sizes)], "s": lambda x: [*x.unbind()]}
        return {k: separate[k](v) if k in separate and isinstance(v, Tensor) else v for k, v in returned.items()}


def batched(
    graphs: Sequence[Any], reference: nn.Module | None = None, angles_of: str = "line_graph"
) -> dict[str, Tensor]:
    """Joins several ``RadiusGraph`` to one: computes all that MatRIS computes of them without a derivative.

    Args:
        graphs: graphs of B structures, in all with N atoms, E directed and U = E / 2 undirected edges, and A angles.
        reference: the ``AtomRef`` of the potential, if it has one.
        angles_of: the attribute of a graph that holds its angles.

    Returns:
        Positions (N, 3) in Å, atomic numbers, cells and images; indices into the joined graph; and how often each index
        occurs, at least 1.
    """
    device = graphs[0].lattice.device
    graph_index = torch.arange(len(graphs), device=device)
    num_atoms, atoms = _counts(graphs, "atomic_number")
    num_edges, edges = _counts(graphs, "atom_graph")
    num_undirected, undirected = _counts(graphs, "undirected2directed")
    num_angles, angles = _counts(graphs, angles_of)

    def spread(offset: Tensor, counts: Tensor, total: int) -> Tensor:
        """Repeats the entry of each structure for each of its rows."""
        return torch.repeat_interleave(offset, counts, dim=0, output_size=total)

    def column(name: str, offset: Tensor, counts: Tensor, total: int) -> Tensor:
        return torch.cat([getattr(g, name) for g in graphs]).long() + spread(offset, counts, total)

    first_atom, first_edge, first_undirected = (torch.cumsum(c, 0) - c for c in (atoms, edges, undirected))
    pairs = torch.cat([g.atom_graph.reshape(-1, 2) for g in graphs]).long()
    target, source = (pairs + spread(first_atom, edges, num_edges)[:, None]).unbind(1)
    rows = torch.cat([getattr(g, angles_of).reshape(-1, _UNITS_OF_ANGLE) for g in graphs]).long()
    offsets = torch.stack([first_atom, first_undirected, first_edge, first_undirected, first_edge], dim=1)
    angle = [c.contiguous() for c in (rows + spread(offsets, angles, num_angles)).unbind(1)]
    to_undirected = column("directed2undirected", first_undirected, edges, num_edges)
    found = {
        "positions": torch.cat([g.atom_frac_coord.detach() @ g.lattice.detach() for g in graphs]),
        "atomic_numbers": torch.cat([g.atomic_number for g in graphs]),
        "lattice": torch.stack([g.lattice.detach() for g in graphs]),
        "image": torch.cat([g.neighbor_image for g in graphs]),
        "atoms_per_graph": atoms,
        "graph_of_atom": spread(graph_index, atoms, num_atoms),
        "graph_of_edge": spread(graph_index, edges, num_edges),
        "target": target.contiguous(),
        "source": source.contiguous(),
        "to_undirected": to_undirected,
        "to_directed": column("undirected2directed", first_edge, undirected, num_undirected),
        "angle_atom": angle[0],
        "angle_target": angle[1],
        "angle_target_directed": angle[2],
        "angle_source": angle[3],
        "angle_source_directed": angle[4],
        "has_angles": torch.tensor(num_angles > 0, device=device),
        "edges_of_target": _occurrences(target, num_atoms),
        "edges_of_source": _occurrences(source, num_atoms),
        "edges_of_undirected": _occurrences(to_undirected, num_undirected),
        "angles_of_target": _occurrences(angle[1], num_undirected),
        "angles_of_source": _occurrences(angle[3], num_undirected),
    }
    if reference is not None:
        found["composition"] = _compositions(graphs, reference)
    return found


def _counts(graphs: Sequence[Any], name: str) -> tuple[int, Tensor]:
    """Returns how many rows a tensor of each graph has: the sum, and the number for each graph."""
    counts = [getattr(g, name).shape[0] for g in graphs]
    return sum(counts), torch.tensor(counts, device=graphs[0].lattice.device)


def _occurrences(index: Tensor, num: int) -> Tensor:
    return index.new_zeros(num).index_add_(0, index, torch.ones_like(index)).clamp_min_(1)


def _compositions(graphs: Sequence[Any], reference: Any) -> Tensor:
    """Returns the shares (or numbers) of the elements in each structure, as ``AtomRef`` computes them."""
    found = []
    for graph in graphs:
        numbers = torch.bincount(graph.atomic_number - 1, minlength=reference.max_num_elements)
        found.append(numbers / graph.atomic_number.shape[0] if reference.is_intensive else numbers)
    return torch.stack(found).float()


@contextmanager
def _tracing(potential: Any) -> Iterator[None]:
    from matris.model import functions, interaction_block, model

    original = potential.forward

    def forward(graphs: Mapping[str, Tensor], **settings: Any) -> Any:
        with _Sizes(graphs):
            return original(graphs, **settings)

    with ExitStack() as stack:
        stack.enter_context(patched_package(model, "process_graphs", process, _RELEASE))
        stack.enter_context(patched_package(functions, "fused_silu", torch.nn.functional.silu, _RELEASE))
        stack.enter_context(patched_package(functions, "fused_sigmoid", torch.sigmoid, _RELEASE))
        stack.enter_context(patched_package(interaction_block, "Dimwise_softmax", _softmax, _RELEASE))
        stack.enter_context(patched_package(interaction_block, "THRESHOLD_VALUE", sys.maxsize, _RELEASE))
        stack.enter_context(patched(potential, "forward", forward))
        reference = potential.reference_energy
        if reference is not None:
            energy: Callable[..., Tensor] = lambda graphs: reference.fc(graphs["composition"]).view(-1)  # noqa: E731
            stack.enter_context(patched(reference, "forward", energy))
        for block in potential.interaction_block:
            for layer, replacement in _for_no_angles(block):
                stack.enter_context(patched(layer, "forward", replacement))
        yield


def _for_no_angles(block: Any) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Yields the layers of the line graph with forwards that do nothing where there are no angles, as MatRIS does.

    The features of edges are then those that entered the block.
    """
    attention, refinement = block.attn_block_line_graph, block.refine_block_line_graph
    attend, refine = attention.forward, refinement.forward
    entered: list[Tensor] = []

    def attention_forward(node_feat: Tensor, edge_feat: Tensor, graph: Any, **rest: Any) -> tuple[Tensor, Tensor]:
        entered[:] = [node_feat]
        edges, angles = attend(node_feat, edge_feat, graph, **rest)
        return torch.where(graph["has_angles"], edges, node_feat), angles

    def refinement_forward(
        node_feat: Tensor, edge_feat: Tensor, smooth_weight: Tensor, graph: Any, **rest: Any
    ) -> tuple[Tensor, Tensor]:
        edges, angles = refine(node_feat, edge_feat, smooth_weight, graph, **rest)
        return torch.where(graph["has_angles"], edges, entered.pop()), angles

    yield attention, attention_forward
    yield refinement, refinement_forward


class _AtomsPerGraph:
    """Stands for MatRIS's list with the number of atoms of each structure."""

    def __init__(self, counts: Tensor) -> None:
        self.counts = counts


class _Sizes(TorchFunctionMode):
    """Answers how many indices there are, and how often each occurs, with what :func:`batched` counted.

    Args:
        graphs: what :func:`batched` returns.
    """

    def __init__(self, graphs: Mapping[str, Tensor]) -> None:
        super().__init__()
        counts = {
            "graph_of_atom": "atoms_per_graph",
            "target": "edges_of_target",
            "source": "edges_of_source",
            "to_undirected": "edges_of_undirected",
            "angle_target": "angles_of_target",
            "angle_source": "angles_of_source",
        }
        self._counts = {id(graphs[index]): graphs[count] for index, count in counts.items()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.tensor and isinstance(args[0], _AtomsPerGraph):
            return args[0].counts.to(kwargs["dtype"])
        if func is torch.split and isinstance(args[1], _AtomsPerGraph):
            return (args[0],)
        if func is torch.unbind:  # of stresses
            return (args[0],)
        if func is torch.bincount and id(args[0]) in self._counts:
            return self._counts[id(args[0])]
        if func in _FUNCTIONAL and args[0].is_floating_point():  # integers are counters of buffers
            func = _FUNCTIONAL[func]
        return func(*args, **(kwargs or {}))


_FUNCTIONAL: dict[Any, Any] = {Tensor.index_add_: Tensor.index_add, Tensor.add_: Tensor.add}
"""Functions that MatRIS calls for what they return alone; a graph without mutations is traced in half the time."""


def _softmax(features: Tensor, segment: Tensor, num_segment: int | None = None) -> Tensor:
    """Computes ``Dimwise_softmax`` without mutations, and without reading the number of segments from data.

    Args:
        features: (rows, width).
        segment: (rows,) the segment of each row.
        num_segment: not given by MatRIS.
    """
    shape = (torch.bincount(segment).shape[0], features.shape[1])
    index = segment[:, None].expand(-1, features.shape[1])
    largest = features.new_full(shape, float("-inf")).scatter_reduce(0, index, features, "amax", include_self=False)
    weights = (features - largest[segment]).exp()
    sums = features.new_zeros(shape).scatter_reduce(0, index, weights, "sum", include_self=False)
    return weights / sums[segment]


def process(graphs: Mapping[str, Tensor], compute_stress: bool = True) -> dict[str, Any]:
    """Returns what ``process_graphs`` returns, as far as MatRIS reads it."""
    positions = graphs["positions"].detach().requires_grad_()
    strained, lattice, strain = positions, graphs["lattice"], None
    volumes = torch.einsum("ni,ni->n", lattice[:, 0], torch.linalg.cross(lattice[:, 1], lattice[:, 2]))
    if compute_stress:
        strain = torch.zeros_like(lattice).requires_grad_()
        symmetric = 0.5 * (strain + strain.mT)
        strained = positions + torch.einsum("be,bec->bc", positions, symmetric[graphs["graph_of_atom"]])
        lattice = lattice + torch.matmul(lattice, symmetric)
    neighbor = strained[graphs["source"]] + torch.einsum(
        "be,bec->bc", graphs["image"], lattice[graphs["graph_of_edge"]]
    )
    vectors = strained[graphs["target"]] - neighbor
    lengths = torch.norm(vectors, dim=1)
    return {
        "atomic_numbers": graphs["atomic_numbers"],
        "edge_lengths": lengths,
        "unit_edge_vectors": vectors / lengths[:, None],
        "atom_segment": graphs["graph_of_atom"],
        "atoms_per_graph": _AtomsPerGraph(graphs["atoms_per_graph"]),
        "directed2undirected": graphs["to_undirected"],
        "undirected2directed": graphs["to_directed"],
        "volumes": volumes[:, None, None],
        "lattice": lattice.reshape(-1, 3),
        "batch_cart_coords": strained,
        "batch_strains": strain,
        "atom_graph_dict": {
            "target_index": graphs["target"],
            "source_index": graphs["source"],
            "target_bincount": graphs["edges_of_target"],
            "source_bincount": graphs["edges_of_source"],
        },
        "line_graph_dict": {
            "line_graph": ("not empty",),
            "has_angles": graphs["has_angles"],
            "atom_list": graphs["angle_atom"],
            "target_index": graphs["angle_target"],
            "source_index": graphs["angle_source"],
            "target_DE_index": graphs["angle_target_directed"],
            "source_DE_index": graphs["angle_source_directed"],
            "target_bincount": graphs["angles_of_target"],
            "source_bincount": graphs["angles_of_source"],
        },
    }


def _call(graphs: Sequence[Any], task: str = "ef", is_training: bool = False) -> dict[str, Any]:
    """Returns the arguments of MatRIS by name."""
    return {"graphs": graphs, "task": task, "is_training": is_training}


def _is_matris(module: nn.Module) -> bool:
    from matris.model.model import MatRIS

    return isinstance(module, MatRIS)


def _is_graph(value: Any) -> bool:
    from matris.graph import RadiusGraph

    return isinstance(value, RadiusGraph)


def _objects(tree: Any) -> Iterator[Any]:
    yield tree
    for _, part in children(tree) or ():
        yield from _objects(part)
