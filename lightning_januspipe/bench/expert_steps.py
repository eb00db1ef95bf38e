"""Times training steps with experts on several ranks, as they are placed, on a mixture of molecules and oxides."""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch

from lightning_januspipe.bench.experts import mixture_of_structures
from lightning_januspipe.bench.work import trainer_of
from lightning_januspipe.expert_ranks import ExpertAxis, RowExchange, step_plans
from lightning_januspipe.expert_ranks.expert_costs import ExpertCosts
from lightning_januspipe.expert_ranks.expert_placement import Guests, best_guests
from lightning_januspipe.runtime.expert_shards import ExpertShards
from lightning_januspipe.testing import RankPool

PLACEMENTS = {"order": "no planning", "load": "planning", "replicate": "planning with guests"}

_WARM_UP = 3
_CUTOFF = 4.5


@dataclass(frozen=True)
class MixtureWork:
    """Describes the training of a MatRIS-MoE with one block, and so two mixtures.

    Attributes:
        steps: Timed steps of each configuration, all on the same structures; three more warm up.
        batch_size: Structures of each replica in a step.
        num_features: Width of the features.
        num_experts: Experts of each mixture.
        top_k: Experts of each element.
        expert_features: Width of the experts.
        share_of_oxides: How many of the structures are oxides.
        seed: Seed of the structures and of the potential.
    """

    steps: int = 12
    batch_size: int = 8
    num_features: int = 32
    num_experts: int = 12
    top_k: int = 2
    expert_features: int = 256
    share_of_oxides: float = 0.5
    seed: int = 0


@dataclass
class PlacedStep:
    """Holds what one rank has done in one step.

    Attributes:
        wall: Seconds until all ranks have ended.
        busy: Seconds of work of this rank's process.
        planning: Seconds of these for the counts of rows, the places of experts, and the exchanges.
        moving: Seconds of these for moving and copying experts.
        rows: Rows that it has computed, of all mixtures.
        guests: Experts of other ranks that all ranks held, of all mixtures.
    """

    wall: float = 0.0
    busy: float = 0.0
    planning: float = 0.0
    moving: float = 0.0
    rows: int = 0
    guests: int = 0


@dataclass
class PlacedSteps:
    """Holds the steps of one rank after those that warm up.

    Attributes:
        steps: See above.
        costs: Costs of each mixture, as measured.
        moved: Experts that have moved from the first step on, of all mixtures.
    """

    steps: list[PlacedStep] = field(default_factory=list)
    costs: list[ExpertCosts] = field(default_factory=list)
    moved: int = 0


def expert_placements(work: MixtureWork) -> str:
    """Times steps of a MatRIS-MoE with one block on 2 and 4 replicas that share its experts, on molecules and oxides.

    Args:
        work: Model and data, the same for every configuration.
    """
    lines = [
        "| ranks | placement | busiest process (s) | speed | step (s) | rows of the busiest rank, over the mean | "
        "experts moved | guests in a step | planning | moving and copying |",
        "|---" * 10 + "|",
    ]
    notes = []
    with RankPool(4) as pool:
        for num_ranks in (2, 4):
            first: list[float] = []
            for placement, words in PLACEMENTS.items():
                found = pool.run(trained_steps, placement, work, world_size=num_ranks, timeout=1800)
                row = _Row.of(found)
                first = first or row.busiest
                speed = statistics.median(a / b for a, b in zip(first, row.busiest, strict=True))
                lines.append(
                    f"| {num_ranks} | {words} | {statistics.mean(row.busiest):.3f} | {speed:.2f} | {row.wall:.3f} | "
                    f"{row.imbalance:.2f} | {row.moved} | {row.guests:.1f} | {row.planning:.1%} | {row.moving:.1%} |"
                )
            for costs in found[0].costs:
                move, guest = costs.move, costs.guest
                notes.append(
                    f"{num_ranks} ranks, as measured for a mixture: a move costs as much as {move.once} rows, and "
                    f"{move.each} for each expert; guests of a step {guest.once}, and {guest.each} each."
                )
    return "\n".join([*lines, "", *notes])


@dataclass(frozen=True)
class _Row:
    """Holds the steps of one configuration: their busiest process, means, and shares of the work of all processes."""

    busiest: list[float]
    wall: float
    imbalance: float
    moved: int
    guests: float
    planning: float
    moving: float

    @classmethod
    def of(cls, ranks: list[PlacedSteps]) -> _Row:
        together = list(zip(*(rank.steps for rank in ranks), strict=True))
        every = [step for of_step in together for step in of_step]
        work = sum(step.busy for step in every)
        return cls(
            busiest=[max(step.busy for step in of_step) for of_step in together],
            wall=statistics.median(max(step.wall for step in of_step) for of_step in together),
            imbalance=statistics.mean(
                max(s.rows for s in of_step) * len(ranks) / sum(s.rows for s in of_step) for of_step in together
            ),
            moved=ranks[0].moved,
            guests=statistics.mean(of_step[0].guests for of_step in together),
            planning=sum(step.planning for step in every) / work,
            moving=sum(step.moving for step in every) / work,
        )


def trained_steps(placement: str, work: MixtureWork) -> PlacedSteps:
    """Trains on this rank, one of the replicas that share experts; returns what its steps took.

    Args:
        placement: The strategy's ``expert_placement``.
        work: Model and data.
    """
    import lightning

    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    found, seen = PlacedSteps(), list[PlacedStep]()

    class Clock(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            trainer.strategy.barrier()
            seen.append(PlacedStep())
            self._began = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen[-1].busy = time.process_time() - self._began[1]
            trainer.strategy.barrier()
            seen[-1].wall = time.perf_counter() - self._began[0]

    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    strategy = {"pipeline_size": 1, "data_size": world, "num_microbatches": 1, "expert_size": world}
    trainer = trainer_of({**strategy, "expert_placement": placement}, work.steps + _WARM_UP, Clock())
    with _counted(seen, found):
        trainer.fit(*_module_and_loader(work, rank, world))
    found.steps = seen[_WARM_UP:]
    return found


def _module_and_loader(work: MixtureWork, rank: int, world: int) -> tuple[Any, Any]:
    """Returns the same module on every rank, and this rank's part of the structures."""
    import numpy as np
    from ase.calculators.singlepoint import SinglePointCalculator
    from torch.utils.data import DataLoader, Subset

    from lightning_januspipe.data import StructureDataset, collate_structures
    from lightning_januspipe.models import MatRISMoE, PotentialModule

    kinds = mixture_of_structures(repeat=1)
    every = [atoms for kind in kinds for atoms in kind]
    for atoms in every:
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
    draw = random.Random(work.seed)
    starts = [0, len(kinds[0])]
    drawn = []
    for _ in range((work.steps + _WARM_UP) * work.batch_size * world):
        kind = draw.random() < work.share_of_oxides
        drawn.append(starts[kind] + draw.randrange(len(kinds[kind])))
    dataset: Any = StructureDataset(every, cutoff=_CUTOFF)
    torch.manual_seed(work.seed)
    potential = MatRISMoE.from_size(
        "tiny",
        dataset.species,
        cutoff=_CUTOFF,
        angle_cutoff=2.5,
        num_blocks=1,
        num_features=work.num_features,
        num_experts=work.num_experts,
        top_k=work.top_k,
        expert_features=work.expert_features,
    )
    own: Any = Subset(dataset, drawn[rank::world])
    return PotentialModule(potential), DataLoader(own, work.batch_size, collate_fn=collate_structures)


@contextmanager
def _counted(seen: list[PlacedStep], found: PlacedSteps) -> Iterator[None]:
    """Notes inside what planning takes, and what it decides, in the last of the steps."""
    plan, exchange, choose = ExpertAxis.plan, RowExchange.__init__, best_guests
    place, copy, give_back = ExpertShards.place, ExpertShards.copy_guests, ExpertShards.return_guests

    def moving(change: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            began = time.process_time()
            change(*arguments)
            took = time.process_time() - began
            seen[-1].moving += took
            if change is not give_back:  # the others are called while a step is planned
                seen[-1].planning -= took

        return timed

    def planned(self: ExpertAxis, *arguments: Any, **more: Any) -> Any:
        began = time.process_time()
        inputs = plan(self, *arguments, **more)
        seen[-1].planning += time.process_time() - began
        found.moved = sum(placement.num_moves for placement in self.placements)
        found.costs = [placement.costs for placement in self.placements]
        return inputs

    def made(self: RowExchange, *arguments: Any, **more: Any) -> None:
        exchange(self, *arguments, **more)
        seen[-1].rows += self.num_received

    def chosen(*arguments: Any) -> Guests:
        guests = choose(*arguments)
        seen[-1].guests += len(guests.guests)
        return guests

    with ExitStack() as stack:
        for owner, name, function in (
            (ExpertAxis, "plan", planned),
            (RowExchange, "__init__", made),
            (ExpertShards, "place", moving(place)),
            (step_plans, "best_guests", chosen),
            (ExpertShards, "copy_guests", moving(copy)),
            (ExpertShards, "return_guests", moving(give_back)),
        ):
            stack.enter_context(mock.patch.object(owner, name, function))
        yield
