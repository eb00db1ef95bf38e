"""Counts the multiplications, bytes and operations of a training step of MatRIS-MoE, without computing it.

The step runs on tensors of torch's FakeTensorMode, which have sizes and no memory, so that every size of the potential
and of the batch can be counted. A step on real tensors is counted by the same function: tests compare both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import flop_registry
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.engine.memory import StorageCounter

if TYPE_CHECKING:
    from lightning_januspipe.models import MatRISMoE, PotentialModule
    from lightning_januspipe.models.line_graph import LineGraph

_UNREAD = ("new_", "zeros", "ones", "full", "fill", "zero_", "scalar_tensor")
"""How the names of operations begin that read no tensor."""

_NOTHING = ("empty", "new_empty", "lift_fresh")
"""How the names of operations begin that compute nothing."""

_BY_INDEX = ("index", "gather", "scatter")
"""How the names of operations begin that take rows, or add to rows, by an index."""


@dataclass(frozen=True)
class Load:
    """Holds the work of some operations.

    Attributes:
        products: Multiplications and additions of products of matrices.
        indexed: Numbers in the rows that operations take, or that they add to others, by an index.
        bytes: Bytes that all operations but products read and write; views have none.
        kept: Bytes that are kept for the backward pass when energies and forces are computed, each storage once.
    """

    products: float = 0
    indexed: float = 0
    bytes: float = 0
    kept: float = 0

    def __add__(self, other: Load) -> Load:
        return Load(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __sub__(self, other: Load) -> Load:
        return self + other * -1

    def __mul__(self, factor: float) -> Load:
        return Load(*(value * factor for value in astuple(self)))


@dataclass(frozen=True)
class StepCounts:
    """Holds what a rank does in one training step with a loss of energy, forces and stress.

    Attributes:
        rows: Products of rows with matrices of experts, and operations on rows of the experts' inner width.
        matrices: Operations on whole matrices of experts, which sum their gradients.
        others: All other operations before the optimizer step.
        optimizer: The step of Adam, for all parameters.
        num_operations: Operations that are launched, without views, before the optimizer step.
        num_updates: Operations that the optimizer launches.
    """

    rows: Load
    matrices: Load
    others: Load
    optimizer: Load
    num_operations: int
    num_updates: int


@dataclass(frozen=True)
class BatchSizes:
    """Holds the sizes of a batch.

    Attributes:
        atoms: Number of atoms.
        edges: Number of directed edges; each has an opposite one.
        angles: Number of angles, each in both orders of its arms.
        structures: Number of structures.
    """

    atoms: int
    edges: int
    angles: int
    structures: int = 1


class OperationCounter(StorageCounter):
    """Counts products, bytes and operations while it is active, and what of their results is still alive.

    Args:
        width: The experts' inner width; only rows of experts, (R, width), and matrices of experts, (K, I, width) or
            (K, width, O), should have it, and no number of rows should be it.

    Attributes:
        loads: What operations on ``rows`` and ``matrices`` of experts, and all ``others``, have done so far.
        num_operations: How many they were, without views.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.loads, self.num_operations = {"rows": Load(), "matrices": Load(), "others": Load()}, 0
        self._width, self._new, self._rows = width, list[Tensor](), StorageCounter()

    @override
    def note(self, tensors: Iterable[Tensor]) -> None:
        """Counts these tensors too."""
        self._new = list(tensors)
        super().note(self._new)
        self._rows.note(t for t in self._new if self._kind(t) == "rows")

    @override
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Runs an operation and counts it."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        name = func._overloadpacket.__name__
        if name.startswith(_NOTHING) or not (self._new or func._schema.is_mutable):
            return result
        given, found = ([t for t in pytree.tree_leaves(v) if isinstance(t, Tensor)] for v in ((args, kwargs), result))
        kinds = {self._kind(t) for t in [*given, *found]}
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            load = Load(products=formula(*args, **(kwargs or {}), out_val=result))
        else:
            read = [] if name.startswith(_UNREAD) else given
            indexed = _num_indexed(given, found) if name.startswith(_BY_INDEX) else 0
            load = Load(indexed=indexed, bytes=sum(map(_num_bytes, [*read, *found])))
        self.loads[next(kind for kind in self.loads if kind in kinds or kind == "others")] += load
        self.num_operations += 1
        return result

    def kept(self) -> dict[str, Load]:
        """Returns what is alive: rows of experts, and all other results."""
        rows = self._rows.alive()
        return {"rows": Load(kept=rows), "others": Load(kept=self.alive() - rows)}

    def _kind(self, tensor: Tensor) -> str:
        if tensor.dim() == 2 and tensor.shape[1] == self._width:
            return "rows"
        return "matrices" if tensor.dim() == 3 and self._width in tensor.shape[1:] else "others"


def _num_indexed(given: Sequence[Tensor], found: Sequence[Tensor]) -> int:
    """Returns how many numbers an operation takes, or adds to others, by an index: those in rows as many as indices."""
    lengths = [t.shape[:1] for t in given if t.dtype == torch.int64 and t.dim()]
    rows = (t.numel() for t in [*given, *found] if t.is_floating_point() and t.shape[:1] in lengths)
    return max(rows, default=0)


def _num_bytes(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's elements in memory, where expanded dimensions have one."""
    sizes = (n if stride else 1 for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return torch.Size(sizes).numel() * tensor.element_size()


def count_step(sizes: BatchSizes, size: Any = "tiny", **changes: Any) -> StepCounts:
    """Counts a training step of a potential in float32, in seconds to a minute, and without its memory.

    Args:
        sizes: Sizes of the batch.
        size: Name of the potential's size, see :meth:`.MatRISMoE.from_size`.
        changes: Further arguments of the potential.
    """
    from lightning_januspipe.models import MatRISMoE, PotentialModule
    from lightning_januspipe.models.line_graph import LineGraph

    def indices(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64)

    atoms, edges, angles, structures = sizes.atoms, sizes.edges, sizes.angles, sizes.structures
    mode = FakeTensorMode()
    with mode:
        potential = MatRISMoE.from_size(size, **changes)
    module = PotentialModule(potential, stress_weight=1.0)  # whose metrics are copied, as no fake tensor can be
    with mode:
        batch = {
            keys.POSITIONS: torch.empty(atoms, 3),
            keys.SPECIES: indices(atoms),
            keys.EDGE_INDEX: indices(2, edges),
            keys.CELL_SHIFTS: torch.empty(edges, 3),
            keys.CELL: torch.empty(structures, 3, 3),
            keys.BATCH: indices(atoms),
            keys.ENERGY: torch.empty(structures, dtype=torch.float64),
            keys.FORCES: torch.empty(atoms, 3),
            keys.STRESS: torch.empty(structures, 3, 3),
        }
        return counted_step(module, batch, LineGraph(indices(edges), indices(edges // 2), *indices(2, angles)))


def line_graph_of(potential: MatRISMoE, batch: Mapping[str, Tensor]) -> LineGraph:
    """Returns the line graph that a potential makes of a batch with values."""
    from lightning_januspipe.models import matris_moe
    from lightning_januspipe.models.line_graph import line_graph

    found: list[LineGraph] = []

    def kept(*arguments: Any) -> LineGraph:
        found.append(line_graph(*arguments))
        return found[-1]

    with mock.patch.object(matris_moe, "line_graph", kept):
        potential(batch)
    return found[-1]


def counted_step(module: PotentialModule, batch: Mapping[str, Tensor], graph: LineGraph) -> StepCounts:
    """Runs a training step and counts it.

    Args:
        module: A module with a MatRIS-MoE in training mode.
        batch: Its batch.
        graph: The line graph of the batch, which is not counted: sizes that depend on values are unknown
            without values, and captured potentials make it once for each micro-batch.
    """
    from lightning_januspipe.models import matris_moe

    potential: Any = module.potential
    counter = OperationCounter(potential.arguments["expert_features"])
    optimizer, parameters = module.configure_optimizers(), list(module.parameters())
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(matris_moe, "line_graph", return_value=graph))
        stack.enter_context(counter)
        loss = module.loss(module(dict(batch)), dict(batch))
        kept = counter.kept()
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)  # as the strategy does
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        del gradients
        loads, num_operations = dict(counter.loads), counter.num_operations
        optimizer.step()
    updated = sum((counter.loads[kind] - load for kind, load in loads.items()), Load())
    return StepCounts(
        **{kind: load + kept.get(kind, Load()) for kind, load in loads.items()},
        optimizer=updated,
        num_operations=num_operations,
        num_updates=counter.num_operations - num_operations,
    )
