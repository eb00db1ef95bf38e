"""Defines a batch sampler that fills batches up to a number of atoms or edges."""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler, Sampler

from lightning_januspipe.loader.sample_sizes import SampleSizes, sample_sizes

_MAX_OPEN = 16
"""How many batches are filled side by side: more of them waste less of the budget, fewer mix structures more."""


class Budget(int):
    """Holds the limits that define a full batch, and the number of structures that typically fill it.

    It is an ``int`` because Lightning passes the ``batch_size`` of a batch sampler on when it builds the sampler again
    for several replicas; nothing else reaches the new sampler.

    Attributes:
        limits: Name, largest sum per batch, and (n,) sizes of all structures, for each limited quantity.
        shuffle: Whether structures come in random order.
        seed: Seed of that order.
        num_replicas: Number of replicas that share the batches.
        rank: Index of this replica.
    """

    limits: list[tuple[str, float, NDArray[np.float64]]]
    shuffle: bool
    seed: int
    num_replicas: int
    rank: int

    @classmethod
    def of(
        cls,
        sizes: SampleSizes,
        max_atoms: float | None,
        max_edges: float | None,
        shuffle: bool,
        seed: int,
        num_replicas: int,
        rank: int,
    ) -> Budget:
        """Returns the budget of checked limits; for the arguments see :class:`BudgetBatchSampler`.

        Raises:
            ValueError: There is no limit, it is not positive, or the sizes that it limits are not known.
        """
        if max_atoms is None and max_edges is None:
            raise ValueError("neither max_atoms nor max_edges is given; expected at least one")
        limits = []
        for name, limit, of in (("atoms", max_atoms, sizes.atoms), ("edges", max_edges, sizes.edges)):
            if limit is None:
                continue
            if not limit > 0:
                raise ValueError(f"max_{name}={limit!r}; expected a positive number")
            if of is None:
                raise ValueError(
                    f"max_{name}={limit!r}, but the dataset does not know the {name} of its samples. Give it a method "
                    "sample_sizes() -> (atoms, edges), or limit the other."
                )
            limits.append((name, float(limit), of))
        typical = min(limit / max(float(of.mean()), 1.0) for _, limit, of in limits)
        budget = cls(max(1, round(min(typical, len(limits[0][2])))))
        budget.limits, budget.shuffle, budget.seed = limits, shuffle, seed
        budget.num_replicas, budget.rank = num_replicas, rank
        return budget

    @property
    def num_samples(self) -> int:
        """Returns the number of structures n."""
        return len(self.limits[0][2])

    def shares(self) -> NDArray[np.float64]:
        """Returns the fraction of each limit that each structure takes, (n, number of limits)."""
        return np.stack([of / limit for _, limit, of in self.limits], axis=1)


class BudgetBatchSampler(Sampler[list[int]]):
    """Fills each batch with as many structures as fit into a number of atoms or edges.

    All replicas get the same number of batches in every pass, and each structure is in one batch of one replica: where
    the number of batches is no multiple of the number of replicas, the fullest batches are split. A structure above the
    budget is a batch of its own.

    In a job of several processes Lightning builds this sampler again for its number of replicas, unless
    ``Trainer(use_distributed_sampler=False)``: then give ``num_replicas`` and ``rank``. The ranks of one pipeline are
    one replica.

    Args:
        dataset: A dataset that knows the sizes of its samples, or the sizes themselves (see
            :func:`~lightning_januspipe.loader.sample_sizes.sample_sizes`). Lightning passes a distributed sampler
            here, and the limits in ``batch_size``.
        batch_size: A budget, instead of the limits below.
        drop_last: Leave out the emptiest batches that exceed a multiple of ``num_replicas``, instead of splitting
            others.
        max_atoms: Largest number of atoms in a batch.
        max_edges: Largest number of edges in a batch.
        shuffle: Whether structures come in random order, which depends on ``seed`` and the epoch only.
        seed: Seed of the order.
        num_replicas: Number of replicas that share the batches.
        rank: Index of this replica.

    Raises:
        ValueError: A limit is missing or not positive, or the sizes that it limits are not known.

    Attributes:
        sampler: The sampler itself, because Lightning calls ``set_epoch`` on this attribute.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: Budget | None = None,
        drop_last: bool = False,
        *,
        max_atoms: float | None = None,
        max_edges: float | None = None,
        shuffle: bool = True,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        if isinstance(batch_size, Budget):
            shares = dataset if isinstance(dataset, DistributedSampler) else batch_size
            num_replicas, rank = shares.num_replicas, shares.rank
        else:
            sizes = dataset if isinstance(dataset, SampleSizes) else sample_sizes(dataset)
            if sizes is None:
                raise ValueError(
                    f"{type(dataset).__name__} does not know the sizes of its samples; expected a dataset with a "
                    "method sample_sizes() -> (atoms, edges), or a SampleSizes"
                )
            batch_size = Budget.of(sizes, max_atoms, max_edges, shuffle, seed, num_replicas, rank)
            _warn_of_large(batch_size)
        if not 0 <= rank < num_replicas:
            raise ValueError(f"rank={rank}, num_replicas={num_replicas}; expected 0 <= rank < num_replicas")
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.num_replicas, self.rank = num_replicas, rank
        self._epoch = 0
        self._passes: dict[int, list[list[int]]] = {}

    @property
    def sampler(self) -> BudgetBatchSampler:
        """Returns the batch sampler itself: Lightning calls ``set_epoch`` on this attribute."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the next pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Returns the number of batches of each replica, the same in all epochs."""
        return len(self._batches(0)) // self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        """Iterates over this replica's batches of the epoch."""
        return iter(self._batches(self._epoch if self.batch_size.shuffle else 0)[self.rank :: self.num_replicas])

    def _batches(self, epoch: int) -> list[list[int]]:
        """Returns the batches of all replicas; D consecutive ones belong to one step of D replicas."""
        if epoch not in self._passes:
            first = self._passes.get(0)
            if epoch and first is None:
                first = self._batches(0)
            found = self._split_evenly(self._filled(epoch), None if first is None else len(first))
            if first is not None and len(found) != len(first):  # this order needs many more batches than the first
                found = [first[i] for i in np.random.default_rng([self.batch_size.seed, epoch]).permutation(len(first))]
            # The first pass defines the length; copies of this sampler for other replicas share the present one.
            for old in set(self._passes) - {0}:
                del self._passes[old]
            self._passes[epoch] = found
        return self._passes[epoch]

    def _filled(self, epoch: int) -> list[list[int]]:
        """Puts the structures, in their order, each into the first open batch that has room for it."""
        budget = self.batch_size
        order = np.arange(budget.num_samples)
        if budget.shuffle:
            order = np.random.default_rng([budget.seed, epoch]).permutation(budget.num_samples)
        shares = budget.shares().tolist()
        opened: list[tuple[list[float], list[int]]] = []  # room that is left of each limit, and indices
        closed: list[list[int]] = []
        for index in order.tolist():
            for left, batch in opened:
                if all(share <= room + 1e-12 for share, room in zip(shares[index], left, strict=True)):
                    batch.append(index)
                    left[:] = [room - share for share, room in zip(shares[index], left, strict=True)]
                    break
            else:
                if len(opened) == _MAX_OPEN:
                    fullest = min(range(_MAX_OPEN), key=lambda b: min(opened[b][0]))
                    closed.append(opened.pop(fullest)[1])
                opened.append(([1.0 - share for share in shares[index]], [index]))
        return closed + [batch for _, batch in opened]

    def _split_evenly(self, batches: list[list[int]], number: int | None) -> list[list[int]]:
        """Splits or drop batches until there are ``number``, by default a multiple of the number of replicas."""
        num_replicas = self.num_replicas
        shares = self.batch_size.shares().max(axis=1)

        def load(batch: list[int]) -> float:
            return float(shares[batch].sum())

        if number is None:
            # Orders of other epochs may take a few batches more.
            spare = max(1, len(batches) // 50) if self.batch_size.shuffle else 0
            if self.drop_last:
                number = max(len(batches) // num_replicas, 1) * num_replicas
            else:
                number = -(-(len(batches) + spare) // num_replicas) * num_replicas
        if self.drop_last and len(batches) > number:
            dropped = sorted(range(len(batches)), key=lambda b: load(batches[b]))[: len(batches) - number]
            return [batch for b, batch in enumerate(batches) if b not in set(dropped)]
        batches = list(batches)
        fullest = [(-load(batch), b) for b, batch in enumerate(batches) if len(batch) > 1]
        heapq.heapify(fullest)
        while len(batches) < number:
            if not fullest:  # fewer structures than replicas
                batches.append(list(batches[0]))
                continue
            _, b = heapq.heappop(fullest)
            half = max(1, int(np.searchsorted(np.cumsum(shares[batches[b]]), load(batches[b]) / 2)))
            batches.append(batches[b][half:])
            batches[b] = batches[b][:half]
            for part in (b, len(batches) - 1):
                if len(batches[part]) > 1:
                    heapq.heappush(fullest, (-load(batches[part]), part))
        return batches


def _warn_of_large(budget: Budget) -> None:
    for name, limit, of in budget.limits:
        num = int((of > limit).sum())
        if num:
            warnings.warn(
                f"{num} of {len(of)} structures have more {name} than max_{name}={limit:g}, up to {of.max():g}; each "
                "is a batch of its own",
                stacklevel=3,
            )
