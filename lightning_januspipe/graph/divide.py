"""One micro-batch divided over the graph ranks: each gets its own rows of every input, with numbers of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_januspipe.capture.errors import CaptureError
from lightning_januspipe.graph.insert import Localized
from lightning_januspipe.graph.numbers import Numbers, Source
from lightning_januspipe.graph.partition import partition_atoms
from lightning_januspipe.graph.shards import Shard, make_shards, rows_read


@dataclass(frozen=True)
class Part:
    """A micro-batch as one graph rank holds it.

    Attributes:
        tensors: inputs of the potential, own rows only.
        symbols: values of its size symbols on this rank.
        shards: of each class.
        extended: inputs with own rows and then those of the halo, as the localized potential takes them at its end.
    """

    tensors: list[Tensor]
    symbols: dict[str, int]
    shards: dict[str, Shard]
    extended: list[Tensor]


class Divider:
    """Divides micro-batches, on every rank alike.

    Args:
        localized: the potential with exchanges.
        num_ranks: graph ranks.
        order: see :func:`~lightning_januspipe.graph.partition.partition_atoms`.
    """

    def __init__(self, localized: Localized, num_ranks: int, order: str = "spatial") -> None:
        self._localized, self._num_ranks, self._order = localized, num_ranks, order
        self._classes = localized.classes

    def shards(self, tensors: Sequence[Tensor]) -> dict[str, list[Shard]]:
        """Who owns and who reads which rows: for each class the shards of all ranks.

        Args:
            tensors: the inputs of the whole micro-batch.
        """
        sizes = self._sizes(tensors)
        classes = self._classes
        values = {n: self._values(tensors, n.source) for n in self._all_numbers()}
        owners: dict[str, Tensor] = {classes.root: self._atoms(tensors, values, sizes[classes.root])}
        for name, numbers in classes.owner.items():
            owners[name] = owners[numbers.of][values[numbers]]
        shards = {}
        for name in classes.names:
            needed = [torch.empty(0, dtype=torch.int64)] * self._num_ranks
            for numbers in classes.readers[name]:
                read = rows_read(values[numbers], owners[numbers.rows], sizes[name], self._num_ranks)
                needed = [torch.cat(pair) for pair in zip(needed, read, strict=True)]
            shards[name] = make_shards(owners[name], needed, self._num_ranks)
        return shards

    def part(self, tensors: Sequence[Tensor], shards: Mapping[str, Sequence[Shard]], rank: int) -> Part:
        """What one rank gets of a micro-batch.

        Args:
            tensors: the inputs of the whole micro-batch.
            shards: see :meth:`shards`.
            rank: the graph rank.
        """
        device = tensors[0].device
        mine = {name: of_class[rank].to(device) for name, of_class in shards.items()}
        local = list(tensors)
        for (position, dim), name in self._localized.rows.items():
            local[position] = local[position].index_select(dim, mine[name].own)
        for source, name in self._localized.renumbered.items():
            local[source.position] = _renumbered(local[source.position], source, mine[name])
        extended = []
        for position, dim in self._localized.extended:
            shard = mine[self._localized.rows[position, dim]]
            extended.append(tensors[position].index_select(dim, torch.cat([shard.own, shard.halo])))
        return Part(local, self._localized.potential.program.bind(local), mine, extended)

    def _atoms(self, tensors: Sequence[Tensor], values: Mapping[Numbers, Tensor], num_atoms: int) -> Tensor:
        """The owner of each atom."""
        classes, none = self._classes, torch.empty(0, dtype=torch.int64)
        target = source = none
        for owning in classes.owner.values():
            if owning.of == classes.root:
                target = values[owning]
                others = [n for n in classes.readers[classes.root] if n.rows == owning.rows]
                source = values[others[0]] if others else target
                break
        place = self._localized.positions
        positions = None if place is None else tensors[place].detach().cpu()
        return partition_atoms(target, source, num_atoms, self._num_ranks, positions, order=self._order)

    def _all_numbers(self) -> list[Numbers]:
        classes = self._classes
        return list(dict.fromkeys([*classes.owner.values(), *(n for of in classes.readers.values() for n in of)]))

    def _values(self, tensors: Sequence[Tensor], source: Source) -> Tensor:
        found = tensors[source.position].detach()
        for dim, place in source.selected:
            found = found.select(dim, place)
        return found.reshape(-1).to("cpu", torch.int64)

    def _sizes(self, tensors: Sequence[Tensor]) -> dict[str, int]:
        """The number of rows of each class."""
        sizes: dict[str, int] = {}
        for (position, dim), name in self._localized.rows.items():
            size = tensors[position].shape[dim]
            if sizes.setdefault(name, size) != size:
                raise CaptureError(
                    f"two inputs of the potential have {sizes[name]} and {size} entries, where graph_size > 1 takes both "
                    "for one for each atom or edge. Use graph_size=1."
                )
        return sizes


def _renumbered(tensor: Tensor, source: Source, shard: Shard) -> Tensor:
    if not source.selected:
        return shard.local(tensor).to(tensor.dtype)
    changed = tensor.clone()
    part = changed
    for dim, place in source.selected:
        part = part.select(dim, place)
    part.copy_(shard.local(part))
    return changed
