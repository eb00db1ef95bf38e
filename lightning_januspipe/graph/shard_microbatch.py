"""One micro-batch sharded over the graph ranks: each gets its own rows of every input, with numbers of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.trace.program import PlaceholderValues, build_module
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.graph.index_analysis import IndexSource, RowIndex
from lightning_januspipe.graph.partition import partition_atoms
from lightning_januspipe.graph.sharded_potential import RankPotential, ShardedPotential
from lightning_januspipe.graph.shards import Shard, make_shards, rows_read


@dataclass(frozen=True)
class ShardedInputs:
    """A micro-batch as one graph rank holds it.

    Attributes:
        tensors: inputs of the potential, own rows only.
        symbols: values of its size symbols on this rank.
        shards: of each class.
        extended: what the sharded potential takes at its end: inputs with own rows and then those of the halo, and
            numbers that it computed before.
    """

    tensors: list[Tensor]
    symbols: dict[str, int]
    shards: dict[str, Shard]
    extended: list[Tensor]


@dataclass(frozen=True)
class ShardPlan:
    """Who owns and who reads which rows of one micro-batch.

    Attributes:
        shards: for each class those of all ranks.
        computed: numbers of rows that the potential computes, of the whole micro-batch.
    """

    shards: dict[str, list[Shard]]
    computed: dict[str, Tensor]


@dataclass(frozen=True)
class MicrobatchIndices:
    """What one micro-batch says of its rows.

    Attributes:
        values: numbers of rows, on the CPU.
        sizes: of each class.
        computed: numbers that the potential computes, of the whole micro-batch.
    """

    values: Mapping[RowIndex, Tensor]
    sizes: Mapping[str, int]
    computed: dict[str, Tensor]


class MicrobatchSharder:
    """Divides micro-batches, on every rank alike.

    Args:
        captured: the potential.
        sharded: how it is sharded.
        potential: the live potential.
        num_ranks: graph ranks.
    """

    def __init__(
        self,
        captured: StagedPotential,
        sharded: ShardedPotential[RankPotential],
        potential: nn.Module,
        num_ranks: int,
    ) -> None:
        self._sharded, self._num_ranks = sharded, num_ranks
        self._classes = sharded.classes
        self._computed = _Computed(captured, sharded.computed, potential)

    def read_indices(self, tensors: Sequence[Tensor]) -> MicrobatchIndices:
        """What a micro-batch says of its rows.

        Args:
            tensors: the inputs of the whole micro-batch.

        Raises:
            CaptureError: inputs that were taken for one entry for each atom, or edge, differ in size.
        """
        computed, sizes = self._computed(tensors), self._sizes(tensors)
        values = {n: self._values(tensors, n, computed) for n in self._all_numbers()}
        for numbers, found in values.items():
            sizes.setdefault(numbers.rows, len(found))
        return MicrobatchIndices(values, sizes, computed)

    def num_atoms(self, indices: MicrobatchIndices) -> int:
        """Rows of the class whose owners are chosen."""
        return indices.sizes[self._classes.root]

    def choose_owners(self, tensors: Sequence[Tensor], indices: MicrobatchIndices) -> Tensor:
        """Choose the owner of each atom.

        Args:
            tensors: the inputs of the whole micro-batch.
            indices: what they say.

        Returns:
            (N,), on the CPU.
        """
        return self._atoms(tensors, indices.values, self.num_atoms(indices))

    def plan(self, indices: MicrobatchIndices, owners_of_atoms: Tensor) -> ShardPlan:
        """Divide a micro-batch.

        Args:
            indices: what it says of its rows.
            owners_of_atoms: (N,) ranks.
        """
        classes, values = self._classes, indices.values
        owners: dict[str, Tensor] = {classes.root: owners_of_atoms}
        for name, numbers in classes.owner.items():
            owners[name] = owners[numbers.of][values[numbers]]
        shards = {}
        for name in classes.names:
            needed = [torch.empty(0, dtype=torch.int64)] * self._num_ranks
            for numbers in classes.readers[name]:
                found = values[numbers]
                reader = owners[numbers.rows].reshape(-1, *[1] * (found.dim() - 1)).expand_as(found)
                read = rows_read(found.reshape(-1), reader.reshape(-1), indices.sizes[name], self._num_ranks)
                needed = [torch.cat(pair) for pair in zip(needed, read, strict=True)]
            shards[name] = make_shards(owners[name], needed, self._num_ranks)
        return ShardPlan(shards, indices.computed)

    def plan_scattered(self, tensors: Sequence[Tensor], over: int | None = None) -> ShardPlan:
        """Divide a micro-batch as badly as can be: neighbouring atoms, and each structure, on different ranks.

        Args:
            tensors: the inputs of the whole micro-batch.
            over: the first of the ranks only, so that the others have no atoms; None for all.
        """
        indices = self.read_indices(tensors)
        return self.plan(indices, torch.arange(self.num_atoms(indices)) % (over or self._num_ranks))

    def plan_balanced(self, tensors: Sequence[Tensor]) -> ShardPlan:
        """Divide a micro-batch by owners that are chosen here."""
        indices = self.read_indices(tensors)
        return self.plan(indices, self.choose_owners(tensors, indices))

    def shard(self, tensors: Sequence[Tensor], plan: ShardPlan, rank: int) -> ShardedInputs:
        """What one rank gets of a micro-batch.

        Args:
            tensors: the inputs of the whole micro-batch.
            plan: of this micro-batch.
            rank: the graph rank.
        """
        device = tensors[0].device
        mine = {name: of_class[rank].to(device) for name, of_class in plan.shards.items()}
        local = list(tensors)
        for (position, dim), name in self._sharded.rows.items():
            local[position] = local[position].index_select(dim, mine[name].own)
        for source, name in self._sharded.renumbered.items():
            local[source.position] = _renumbered(local[source.position], source, mine[name])
        extended = []
        for position, dim in self._sharded.extended:
            shard = mine[self._sharded.rows[position, dim]]
            extended.append(tensors[position].index_select(dim, torch.cat([shard.own, shard.halo])))
        for numbers in self._sharded.computed:
            value, shard = plan.computed[numbers.source.node], mine[numbers.rows]
            dim = next(d for d, size in enumerate(value.shape) if size == shard.num_rows)
            extended.append(mine[numbers.of].local(value.index_select(dim, shard.own)).to(value.dtype))
        return ShardedInputs(local, self._sharded.bind(local), mine, extended)

    def _atoms(self, tensors: Sequence[Tensor], values: Mapping[RowIndex, Tensor], num_atoms: int) -> Tensor:
        """The owner of each atom."""
        classes, none = self._classes, torch.empty(0, dtype=torch.int64)
        target = source = none
        for owning in classes.owner.values():
            if owning.of == classes.root:
                target = values[owning]
                others = [n for n in classes.readers[classes.root] if n.rows == owning.rows]
                source = values[others[0]].reshape(-1) if others and not others[0].is_table else target
                break
        else:  # a table of neighbors instead of a list of edges
            for table in (n for n in classes.readers[classes.root] if n.rows == classes.root):
                source = values[table].reshape(-1)
                target = torch.arange(num_atoms).repeat_interleave(len(source) // max(num_atoms, 1))
        place = self._sharded.positions
        positions = None if place is None else tensors[place].detach().cpu()
        return partition_atoms(target, source, num_atoms, self._num_ranks, positions)

    def _all_numbers(self) -> list[RowIndex]:
        classes = self._classes
        return list(dict.fromkeys([*classes.owner.values(), *(n for of in classes.readers.values() for n in of)]))

    def _values(self, tensors: Sequence[Tensor], numbers: RowIndex, computed: Mapping[str, Tensor]) -> Tensor:
        """(rows,), or of a table (rows, ...)."""
        source = numbers.source
        found = computed[source.node] if source.node else tensors[source.position].detach()
        for dim, place in source.selected:
            found = found.select(dim, place)
        found = found.movedim(numbers.dim, 0).to("cpu", torch.int64)
        return found if numbers.is_table else found.reshape(-1)

    def _sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """The number of rows of each class."""
        sizes: dict[str, int] = {}
        for (position, dim), name in self._sharded.rows.items():
            size = tensors[position].shape[dim]
            if sizes.setdefault(name, size) != size:
                raise CaptureError(
                    f"two inputs of the potential have {sizes[name]} and {size} entries, where graph_size > 1 takes "
                    "both for one for each atom or edge. Use graph_size=1."
                )
        return sizes


class _Computed:
    """Numbers of rows that a potential computes from its inputs, of a whole micro-batch."""

    def __init__(self, captured: StagedPotential, computed: Sequence[RowIndex], potential: nn.Module) -> None:
        self._names = [n.source.node for n in computed]
        self._placeholders: PlaceholderValues | None = None
        self._module: nn.Module | None = None
        if computed:
            assert isinstance(captured, CapturedPotential)
            program = captured.program
            nodes = [*captured.regions.geometry, *captured.regions.body]
            names = [n.name for n in program.nodes if n.op == "placeholder" and n.name not in program.parameters]
            self._placeholders = PlaceholderValues(program, potential, names)
            self._module = build_module(program, nodes, names, self._names)

    def __call__(self, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        if self._module is None or self._placeholders is None:
            return {}
        return dict(zip(self._names, self._module(*self._placeholders.values(tensors)), strict=True))


def _renumbered(tensor: Tensor, source: IndexSource, shard: Shard) -> Tensor:
    if not source.selected:
        return shard.local(tensor).to(tensor.dtype)
    changed = tensor.clone()
    part = changed
    for dim, place in source.selected:
        part = part.select(dim, place)
    part.copy_(shard.local(part))
    return changed
