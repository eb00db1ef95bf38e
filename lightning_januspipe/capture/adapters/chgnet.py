"""Helps CHGNet 0.4 through capture: batches graphs outside the trace, as its ``BatchedGraph.from_graphs`` does.

Its graphs are those of MatRIS. Numbers of atoms, edges and angles, and the lists with an entry for each structure that
it returns, are treated in the same way. Some structures of a batch may be without angles, but not all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.adapters.matris import batched
from lightning_januspipe.capture.patches import patched, patched_package

_RELEASE = "chgnet 0.4"


class CHGNetAdapter(Adapter):
    """Adapts ``chgnet.model.CHGNet``, which has to be the potential itself."""

    def arguments(
        self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the graphs as one dict of tensors; see :func:`~..matris.batched`."""
        if not _is_chgnet(potential):
            return args, kwargs
        graphs, settings = _call(*args, **kwargs)
        return (batched(graphs, getattr(potential, "composition_model", None), "bond_graph"),), settings

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which CHGNet takes what :meth:`arguments` makes of its graphs."""
        return _tracing(potential) if _is_chgnet(potential) else super().tracing(potential)

    def joined(self, potential: nn.Module, returned: Any) -> Any:
        """Returns forces ``f``, magnetic moments ``m`` and stresses ``s``, each as one tensor."""
        if not _is_chgnet(potential):
            return returned
        shapes = {"f": (-1, 3), "m": (-1,), "s": (-1, 3, 3)}
        return {
            k: torch.cat([part.reshape(shapes[k]) for part in v]) if k in shapes else v for k, v in returned.items()
        }

    def separated(self, potential: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        """Returns forces, magnetic moments and stresses of each structure, as CHGNet returns them."""
        if not _is_chgnet(potential):
            return returned
        sizes = [g.atomic_number.shape[0] for g in _call(*args, **kwargs)[0]]
        separate: dict[str, Callable[[Tensor], list[Tensor]]]
        separate = {"f": lambda x: [*x.split(sizes)], "m": lambda x: [*x.split(sizes)], "s": lambda x: [*x.unbind()]}
        return {k: separate[k](v) if k in separate and isinstance(v, Tensor) else v for k, v in returned.items()}


@contextmanager
def _tracing(potential: Any) -> Iterator[None]:
    from chgnet.model import layers, model

    original = potential.forward

    def forward(graphs: Mapping[str, Tensor], **settings: Any) -> Any:
        with _Counts(graphs):
            return original(graphs, **settings)

    def aggregate(data: Tensor, owners: Tensor, *, average: bool = True, num_owner: int | None = None) -> Tensor:
        """Computes CHGNet's function of this name without reading the number of rows from data."""
        num = counts["atoms_per_graph"].shape[0] if num_owner is None else num_owner
        sums = data.new_zeros([num, data.shape[1]]).index_add(0, owners, data)
        return sums / counts["atoms_per_graph"][:, None] if average else sums

    counts: dict[str, Tensor] = {}

    def from_graphs(graphs: Mapping[str, Tensor], **settings: Any) -> Any:
        counts.update(graphs)
        return _batched_graph(graphs, **settings)

    with ExitStack() as stack:
        stack.enter_context(patched_package(model, "BatchedGraph", SimpleNamespace(from_graphs=from_graphs), _RELEASE))
        stack.enter_context(patched_package(layers, "aggregate", aggregate, _RELEASE))
        stack.enter_context(patched(potential, "forward", forward))
        reference = potential.composition_model
        if reference is not None:
            energy: Callable[..., Tensor] = lambda graphs: reference.fc(graphs["composition"]).view(-1)  # noqa: E731
            stack.enter_context(patched(reference, "forward", energy))
        yield


class _Columns:
    """Answers ``index[:, i]`` with one of several columns, which are kept apart.

    Args:
        columns: the columns.
    """

    def __init__(self, *columns: Tensor) -> None:
        self._columns = columns

    def __getitem__(self, key: tuple[slice, int]) -> Tensor:
        return self._columns[key[1]]


class _AtomsPerGraph:
    """Stands for a list with the number of atoms of each structure."""


class _Counts(TorchFunctionMode):
    """Answers how many atoms each structure has with what was counted outside the trace.

    Args:
        graphs: what :func:`~..matris.batched` returns.
    """

    def __init__(self, graphs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._owners, self._counts = graphs["graph_of_atom"], graphs["atoms_per_graph"]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.bincount and args[0] is self._owners:
            return self._counts
        if func is Tensor.tolist and args[0] is self._counts:
            return _AtomsPerGraph()
        if func is torch.split and isinstance(args[1], _AtomsPerGraph):
            return (args[0],)
        if func in _FUNCTIONAL and args[0].is_floating_point():
            func = _FUNCTIONAL[func]
        return func(*args, **(kwargs or {}))


_FUNCTIONAL: dict[Any, Any] = {
    Tensor.__iadd__: Tensor.add,
    Tensor.__imul__: Tensor.mul,
    Tensor.__itruediv__: Tensor.div,
}
"""Functions that CHGNet calls for what they return alone."""


def _batched_graph(
    graphs: Mapping[str, Tensor],
    bond_basis_expansion: nn.Module,
    angle_basis_expansion: nn.Module,
    compute_stress: bool = False,
) -> Any:
    """Returns what ``BatchedGraph.from_graphs`` returns, with one tensor of positions and one of strains."""
    positions = graphs["positions"].detach().requires_grad_()
    strained, lattice, strain = positions, graphs["lattice"], None
    volumes = torch.einsum("ni,ni->n", lattice[:, 0], torch.linalg.cross(lattice[:, 1], lattice[:, 2]))
    if compute_stress:
        strain = torch.zeros_like(lattice).requires_grad_()
        strained = positions + torch.einsum("be,bec->bc", positions, strain[graphs["graph_of_atom"]])
        lattice = lattice + torch.matmul(lattice, strain)
    shifts = torch.einsum("be,bec->bc", graphs["image"], lattice[graphs["graph_of_edge"]])
    bases, bond_bases, vectors = bond_basis_expansion(
        center=strained[graphs["target"]],
        neighbor=strained[graphs["source"]],
        undirected2directed=graphs["to_directed"],
        image=shifts,
        lattice=torch.eye(3, dtype=shifts.dtype, device=shifts.device),
    )
    return SimpleNamespace(
        atomic_numbers=graphs["atomic_numbers"],
        bond_bases_ag=bases,
        bond_bases_bg=bond_bases,
        angle_bases=angle_basis_expansion(
            torch.index_select(vectors, 0, graphs["angle_target_directed"]),
            torch.index_select(vectors, 0, graphs["angle_source_directed"]),
        ),
        batched_atom_graph=_Columns(graphs["target"], graphs["source"]),
        batched_bond_graph=_Columns(graphs["angle_atom"], graphs["angle_target"], graphs["angle_source"]),
        atom_owners=graphs["graph_of_atom"],
        directed2undirected=graphs["to_undirected"],
        atom_positions=[strained],
        strains=[strain],
        volumes=volumes.reshape(1, -1, 1, 1),  # CHGNet takes an entry for each tensor of strains
    )


def _call(graphs: Sequence[Any], **settings: Any) -> tuple[Sequence[Any], dict[str, Any]]:
    """Returns the arguments of CHGNet: its graphs, and the others by name."""
    return graphs, settings


def _is_chgnet(module: nn.Module) -> bool:
    from chgnet.model import CHGNet

    return isinstance(module, CHGNet)
