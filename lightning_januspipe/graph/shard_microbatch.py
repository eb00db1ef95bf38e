"""Shards one micro-batch over the graph ranks: each gets its own rows of every input, and local indices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_januspipe.errors import CaptureError
from lightning_januspipe.graph.index_analysis import IndexSource, RowIndex
from lightning_januspipe.graph.partition import partition_atoms
from lightning_januspipe.graph.sharded_potential import ShardedPotential
from lightning_januspipe.graph.shards import Shard, make_shards, rows_read


@dataclass(frozen=True)
class ShardedInputs:
    """Holds a micro-batch as one graph rank has it.

    Attributes:
        tensors: inputs of the potential, own rows only.
        symbols: values of its size symbols on this rank.
        shards: the rank's shard of each class.
        extended: the last inputs of the sharded potential: inputs with own rows and then those of the halo, and
            indices and values of indices that were computed for the whole micro-batch.
    """

    tensors: list[Tensor]
    symbols: dict[str, int]
    shards: dict[str, Shard]
    extended: list[Tensor]


@dataclass(frozen=True)
class ShardPlan:
    """Records who owns and who reads which rows of one micro-batch.

    Attributes:
        shards: for each class the shards of all ranks.
        computed: indices that the potential computes, and values of indices, of the whole micro-batch.
    """

    shards: dict[str, list[Shard]]
    computed: dict[str, Tensor]


@dataclass(frozen=True)
class MicrobatchIndices:
    """Holds the row indices of one micro-batch, and its numbers of rows.

    Attributes:
        values: the indices, on the CPU.
        sizes: number of rows of each class.
        computed: indices that the potential computes, and values of indices, of the whole micro-batch.
        slots: number of slots of each row, where rows and slots were flattened.
    """

    values: Mapping[RowIndex, Tensor]
    sizes: Mapping[str, int]
    computed: dict[str, Tensor]
    slots: Mapping[RowIndex, int]


class MicrobatchSharder:
    """Shards micro-batches, on every rank alike.

    Args:
        sharded: the sharded potential.
        potential: the live potential.
        num_ranks: G.
    """

    def __init__(self, sharded: ShardedPotential, potential: nn.Module, num_ranks: int) -> None:
        self._sharded, self._num_ranks = sharded, num_ranks
        self._classes = sharded.classes
        self._compute_indices = sharded.index_function(potential)

    def read_indices(self, tensors: Sequence[Tensor]) -> MicrobatchIndices:
        """Reads the row indices of a micro-batch.

        Args:
            tensors: the inputs of the whole micro-batch.

        Raises:
            CaptureError: inputs that should all have one entry for each atom (or each edge) differ in size.
        """
        computed, sizes = self._compute_indices(tensors), self._sizes(tensors)
        classes = self._classes
        known = dict.fromkeys([*classes.owner.values(), *(n for of in classes.readers.values() for n in of)])
        values = {index: _values(tensors, index, computed) for index in known}
        for index, found in values.items():
            sizes.setdefault(index.holder, len(found))
        return MicrobatchIndices(values, sizes, computed, {index: self._slots(tensors, index) for index in known})

    def num_atoms(self, indices: MicrobatchIndices) -> int:
        """Returns the number of rows of the class whose owners are chosen."""
        return indices.sizes[self._classes.root]

    def choose_owners(self, tensors: Sequence[Tensor], indices: MicrobatchIndices) -> Tensor:
        """Chooses the owner of each atom.

        Args:
            tensors: the inputs of the whole micro-batch.
            indices: its row indices.

        Returns:
            (N,) ranks, on the CPU.
        """
        classes, values, num_atoms = self._classes, indices.values, self.num_atoms(indices)
        target = source = torch.empty(0, dtype=torch.int64)
        readers = classes.readers[classes.root]
        owning = classes.owner.get(classes.edges)
        if owning is not None:
            target = values[owning]
            others = [n for n in readers if n.holder == owning.holder]
            source = values[others[0]].reshape(-1) if others and not others[0].is_table else target
        else:  # a table of neighbours instead of a list of edges
            for table in (n for n in readers if n.holder == classes.root):
                source = values[table].reshape(-1)
                target = torch.arange(num_atoms).repeat_interleave(len(source) // max(num_atoms, 1))
        given = self._sharded.positions
        positions = None if given is None else tensors[given].detach().cpu()
        return partition_atoms(target, source, num_atoms, self._num_ranks, positions)

    def plan(self, indices: MicrobatchIndices, owners_of_atoms: Tensor) -> ShardPlan:
        """Finds who owns and who reads which rows of a micro-batch.

        Args:
            indices: its row indices.
            owners_of_atoms: (N,) ranks.
        """
        classes, values = self._classes, indices.values
        owners: dict[str, Tensor] = {classes.root: owners_of_atoms}
        for name, owning in classes.owner.items():
            owners[name] = owners[owning.target][values[owning]]
        shards = {}
        for name in classes.names:
            needed = [torch.empty(0, dtype=torch.int64)] * self._num_ranks
            for index in classes.readers[name]:
                found = values[index] // indices.slots[index]
                reader = owners[index.holder].reshape(-1, *[1] * (found.dim() - 1)).expand_as(found)
                read = rows_read(found.reshape(-1), reader.reshape(-1), indices.sizes[name], self._num_ranks)
                needed = [torch.cat(pair) for pair in zip(needed, read, strict=True)]
            shards[name] = make_shards(owners[name], needed, self._num_ranks)
        return ShardPlan(shards, indices.computed)

    def plan_scattered(self, tensors: Sequence[Tensor], over: int | None = None) -> ShardPlan:
        """Plans the worst sharding there is: neighbouring atoms, and each structure's atoms, are on different ranks.

        Args:
            tensors: the inputs of the whole micro-batch.
            over: how many of the ranks get atoms, so that the others have none; None for all.
        """
        indices = self.read_indices(tensors)
        return self.plan(indices, torch.arange(self.num_atoms(indices)) % (over or self._num_ranks))

    def plan_balanced(self, tensors: Sequence[Tensor]) -> ShardPlan:
        """Plans a sharding with the owners that :meth:`choose_owners` chooses."""
        indices = self.read_indices(tensors)
        return self.plan(indices, self.choose_owners(tensors, indices))

    def shard(self, tensors: Sequence[Tensor], plan: ShardPlan, rank: int) -> ShardedInputs:
        """Returns one rank's part of a micro-batch.

        Args:
            tensors: the inputs of the whole micro-batch.
            plan: who owns and who reads its rows.
            rank: the graph rank.
        """
        device = tensors[0].device
        mine = {name: of_class[rank].to(device) for name, of_class in plan.shards.items()}
        own = list(tensors)
        for (position, dim), name in self._sharded.rows.items():
            own[position] = own[position].index_select(dim, mine[name].own)
        for source, name in self._sharded.localized.items():
            own[source.position] = _localized(own[source.position], source, mine[name])
        extended = []
        for position, dim in self._sharded.extended:
            shard = mine[self._sharded.rows[position, dim]]
            extended.append(tensors[position].index_select(dim, torch.cat([shard.own, shard.halo])))
        for index in self._sharded.computed:
            value, shard = plan.computed[index.source.node], mine[index.holder]
            own_rows, slots = value.index_select(index.dim, shard.own), self._slots(tensors, index)
            local = mine[index.target].local(own_rows // slots) * slots + own_rows % slots
            extended.append(local.to(value.dtype))
        for name, placement in self._sharded.values.items():
            value = plan.computed[name]
            extended.append(
                value.index_select(placement.dim, mine[placement.rows].own) if placement.is_sharded else value
            )
        return ShardedInputs(own, self._sharded.bind(own), mine, extended)

    def _slots(self, tensors: Sequence[Tensor], index: RowIndex) -> int:
        """Returns the number of slots of each row that an index points to: 1 where rows were not flattened."""
        if isinstance(index.slots, int):
            return index.slots
        return max(self._sharded.bind(tensors)[index.slots], 1)  # a grid without slots has no indices

    def _sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """Returns the number of rows of each class."""
        sizes: dict[str, int] = {}
        for (position, dim), name in self._sharded.rows.items():
            size = tensors[position].shape[dim]
            if sizes.setdefault(name, size) != size:
                raise CaptureError(
                    f"two inputs of the potential have {sizes[name]} and {size} entries, but graph_size > 1 "
                    "expects both to have one entry for each atom (or each edge). Use graph_size=1."
                )
        return sizes


def _values(tensors: Sequence[Tensor], index: RowIndex, computed: Mapping[str, Tensor]) -> Tensor:
    """Returns the indices as (rows,), or of a table (rows, ...), on the CPU."""
    source = index.source
    found = computed[source.node] if source.node else tensors[source.position].detach()
    for dim, entry in source.selected:
        found = found.select(dim, entry)
    found = found.movedim(index.dim, 0).to("cpu", torch.int64)
    return found if index.is_table else found.reshape(-1)


def _localized(tensor: Tensor, source: IndexSource, shard: Shard) -> Tensor:
    """Returns an input in which the indices of one part are local ones."""
    if not source.selected:
        return shard.local(tensor).to(tensor.dtype)
    changed = tensor.clone()
    part = changed
    for dim, entry in source.selected:
        part = part.select(dim, entry)
    part.copy_(shard.local(part))
    return changed
