"""Batches with a budget of atoms or edges in place of a number of structures."""

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
"""Batches that are filled side by side: more waste less of the budget, and mix less."""


class Budget(int):
    """About how many structures fill a batch, with the sizes and the limits that say so.

    Samplers carry it as ``batch_size``, which is what Lightning passes on when it makes a batch sampler anew.

    Attributes:
        limits: for each quantity the largest sum, and the (n,) sizes of all structures.
        shuffle: whether structures come in random order.
        seed: of that order.
        num_replicas: replicas, where nobody else tells.
        rank: which of them this is.
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
        """Check limits.

        Args:
            sizes: of all structures.
            max_atoms: largest number of atoms in a batch.
            max_edges: largest number of edges in a batch.
            shuffle: see above.
            seed: see above.
            num_replicas: see above.
            rank: see above.

        Raises:
            ValueError: there is no limit, it is not positive, or the sizes that it limits are not known.
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
        """n."""
        return len(self.limits[0][2])

    def shares(self) -> NDArray[np.float64]:
        """(n,) part of the budget that each structure takes; (n, 2) with two limits."""
        return np.stack([of / limit for _, limit, of in self.limits], axis=1)


class BudgetBatchSampler(Sampler[list[int]]):
    """Batches of as many structures as fit into a number of atoms or edges.

    All replicas get the same number of batches in every pass, and each structure is in one batch of one replica: where
    batches do not go evenly into replicas, the fullest are divided. A structure above the budget is a batch of its own.

    In a job of several processes Lightning makes this sampler anew with the numbers of replicas, unless
    ``Trainer(use_distributed_sampler=False)``: then give ``num_replicas`` and ``rank``. Ranks of one pipeline are one
    replica.

    Args:
        dataset: one that knows the sizes of its samples, or these themselves (see
            :func:`~lightning_januspipe.loader.sample_sizes.sample_sizes`). Lightning gives a distributed sampler
            here, and the other arguments with ``batch_size``.
        batch_size: a budget, in place of the limits.
        drop_last: leave out the emptiest batches that do not go evenly into replicas, instead of dividing others.
        max_atoms: largest number of atoms in a batch.
        max_edges: largest number of edges in a batch.
        shuffle: whether structures come in random order, which depends on ``seed`` and the epoch only.
        seed: of the order.
        num_replicas: among how many replicas batches are divided.
        rank: which of them this is.

    Raises:
        ValueError: no or impossible limits, or sizes that are not known.

    Attributes:
        num_replicas: see above.
        rank: see above.
        sampler: this; where Lightning looks for ``set_epoch``.
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
        """Itself."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The next pass is of this epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches of each replica, the same in all epochs."""
        return len(self._batches(0)) // self.num_replicas

    def __iter__(self) -> Iterator[list[int]]:
        """This replica's batches of the epoch."""
        return iter(self._batches(self._epoch if self.batch_size.shuffle else 0)[self.rank :: self.num_replicas])

    def _batches(self, epoch: int) -> list[list[int]]:
        """Those of all replicas; D that follow each other are of one step."""
        if epoch not in self._passes:
            first = self._passes.get(0)
            if epoch and first is None:
                first = self._batches(0)
            found = self._divided(self._filled(epoch), None if first is None else len(first))
            if first is not None and len(found) != len(first):  # a worse order than the first one, and by much
                found = [first[i] for i in np.random.default_rng([self.batch_size.seed, epoch]).permutation(len(first))]
            # The first is kept for its length, and the present one for copies of other replicas, which share this.
            for old in set(self._passes) - {0}:
                del self._passes[old]
            self._passes[epoch] = found
        return self._passes[epoch]

    def _filled(self, epoch: int) -> list[list[int]]:
        """Structures in order, each into the first open batch where it fits."""
        budget = self.batch_size
        order = np.arange(budget.num_samples)
        if budget.shuffle:
            order = np.random.default_rng([budget.seed, epoch]).permutation(budget.num_samples)
        shares = budget.shares().tolist()
        opened: list[tuple[list[float], list[int]]] = []  # what is left of the budget, and who is in
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

    def _divided(self, batches: list[list[int]], number: int | None) -> list[list[int]]:
        """As many batches as ``number``, or, without one, as divide evenly among replicas."""
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
