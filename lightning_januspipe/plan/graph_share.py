"""Predicts how graph ranks would share a recipe's own micro-batches: atoms, time, memory, and bytes that they send.

The shards of a micro-batch go through the phases of all stages in this one process, one rank after another, with a
process group that counts what would be sent, and sends nothing. Ghost rows are zeros meanwhile, which changes values,
but neither shapes, nor times, nor bytes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.capture import CaptureError
from lightning_januspipe.capture.find.grad_call import StepFunction, call_arguments
from lightning_januspipe.capture.side_effects import silent_log
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.engine.single_process import SingleProcessResult, run_single_process
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.graph import GraphAxis, GraphGroup, Shard, ShardedPotential, shard_potential, verify_sharding
from lightning_januspipe.graph.shard_microbatch import MicrobatchSharder
from lightning_januspipe.plan.compare import CutCosts
from lightning_januspipe.plan.measure import Measured
from lightning_januspipe.random_state import kept_random_state
from lightning_januspipe.schedule import Action, MemoryCosts, PhaseCosts

MOST_MICROBATCHES = 4
"""Micro-batches of the first batch that are sharded for a prediction, at most."""

_REPEATS = 5

Traffic = Mapping[tuple[str, int], tuple[float, float]]
"""By phase and stage, the bytes that a rank sends and the number of its exchanges, for one micro-batch."""


@dataclass(frozen=True)
class GraphShare:
    """Holds the share that each of G graph ranks has of a micro-batch, over several micro-batches.

    Attributes:
        num_ranks: Number G of graph ranks.
        atoms: Atoms of the largest rank over the mean.
        edges: Edges of the largest rank over the mean.
        halo: For each class of rows, its ghost rows over all its rows.
        num_whole: Number of micro-batches whose structures are dealt whole, so that nothing is exchanged.
        num_microbatches: Number of micro-batches.
        time: Time of the slowest rank, without exchanges, over the time of one rank with all atoms.
        memory: Bytes that the largest rank holds between phases, over the bytes of one rank with all atoms.
        together: Exchanges with nothing deferred.
        deferred: Exchanges with WF and WE deferred.
        refused: The reason why atoms cannot be sharded; empty where they can.
    """

    num_ranks: int
    atoms: float = 1.0
    edges: float = 1.0
    halo: Mapping[str, float] | None = None
    num_whole: int = 0
    num_microbatches: int = 0
    time: float = 1.0
    memory: float = 1.0
    together: Traffic | None = None
    deferred: Traffic | None = None
    refused: str = ""

    @property
    def bytes_sent(self) -> float:
        """Returns the bytes that one rank sends for a micro-batch, in the phases of all stages."""
        return sum(size for size, _ in (self.together or {}).values())

    @property
    def num_exchanges(self) -> float:
        """Returns the number of exchanges of a micro-batch, in the phases of all stages."""
        return sum(number for _, number in (self.together or {}).values())

    def to_dict(self) -> dict[str, Any]:
        """Returns all numbers, for JSON."""
        if self.refused:
            return {"graph_size": self.num_ranks, "refused": self.refused}
        return {
            "graph_size": self.num_ranks,
            "largest_atoms": self.atoms,
            "largest_edges": self.edges,
            "halo": dict(self.halo or {}),
            "dealt_whole": self.num_whole,
            "num_microbatches": self.num_microbatches,
            "time": self.time,
            "memory": self.memory,
            "bytes_sent": self.bytes_sent,
            "num_exchanges": self.num_exchanges,
        }


@dataclass(frozen=True)
class GraphLink:
    """Holds the cost of an exchange between graph ranks.

    Attributes:
        latency: Seconds of each exchange.
        bandwidth: Bytes per second that a rank sends.
    """

    latency: float = 20e-6
    bandwidth: float = 10e9

    def seconds(self, num_bytes: float, number: float) -> float:
        """Returns the seconds of a number of exchanges."""
        return number * self.latency + num_bytes / self.bandwidth


def costs_of_share(measured: Measured, num_ranks: int, share: GraphShare, link: GraphLink) -> CutCosts:
    """Returns the costs of stages whose micro-batches are sharded over graph ranks; the slowest rank counts.

    Args:
        measured: The stages with all atoms on one rank.
        num_ranks: Ranks of the pipeline.
        share: The share of a graph rank.
        link: Cost of exchanges.
    """
    shared = replace(
        measured,
        costs=_scaled(measured.costs, share, share.together or {}, link),
        deferred=_scaled(measured.deferred, share, share.deferred or {}, link),
        memory=_smaller(measured.memory, share.memory),
        deferred_memory=_smaller(measured.deferred_memory, share.memory),
    )
    stages, part = shared.stages(num_ranks), share.atoms / share.num_ranks
    size = stages.message_bytes
    return replace(
        stages,
        message_bytes=(lambda message: part * size(message)) if callable(size) else part * size,
        typical_message=part * stages.typical_message,
    )


def _scaled(
    costs: Sequence[PhaseCosts], share: GraphShare, traffic: Traffic, link: GraphLink
) -> tuple[PhaseCosts, ...]:
    return tuple(
        PhaseCosts(
            *(
                getattr(of_stage, name) * share.time + link.seconds(*traffic.get((name, stage), (0.0, 0.0)))
                for name in ("fe", "ff", "bf", "be", "wf", "we")
            )
        )
        for stage, of_stage in enumerate(costs)
    )


def _smaller(memory: Sequence[MemoryCosts], factor: float) -> tuple[MemoryCosts, ...]:
    return tuple(MemoryCosts(m.energy * factor, m.force * factor, m.kept * factor) for m in memory)


class Sharing:
    """Shards micro-batches of a captured potential over graph ranks, and measures the shards.

    Args:
        module: The LightningModule.
        step: Its training step, from a batch to the step's output.
        potential: The potential in stages.
        batches: The micro-batches.
    """

    def __init__(
        self, module: nn.Module, step: StepFunction, potential: StagedPotential, batches: Sequence[Any]
    ) -> None:
        self._module, self._step, self._batches, self._staged = module, step, batches, potential
        self._potential = module.get_submodule(potential.path)
        inputs = potential.inputs(self._potential)
        self._tensors: list[list[Tensor]] = []
        for batch in batches:
            with kept_random_state(), silent_log(module):
                arguments = call_arguments(module, potential.path, step, batch, potential.replaced is not None)
            self._tensors.append(list(inputs(*arguments)))

    def share(self, num_ranks: int, measured: GraphShare | None = None) -> GraphShare:
        """Returns the share of each of ``num_ranks`` graph ranks.

        Args:
            num_ranks: Number G of graph ranks.
            measured: The share with this potential in other stages. Its times and memory are taken over, and the
                sharding is not verified again.
        """
        if num_ranks == 1:
            num = len(self._batches)
            return GraphShare(1, halo={}, num_whole=num, num_microbatches=num)
        if measured is not None and measured.refused:
            return measured
        try:
            if measured is None:
                smallest = min(range(len(self._batches)), key=lambda i: sum(t.numel() for t in self._tensors[i]))
                if verify_sharding(self._staged, self._module, self._step, self._batches[smallest], num_ranks):
                    raise CaptureError(
                        "they are predicted only for what can be traced; explicit stages can be trained with them"
                    )
            return self._share(self._staged, num_ranks, measured)
        except CaptureError as error:
            return GraphShare(num_ranks, refused=str(error))

    def _share(self, captured: StagedPotential, num_ranks: int, measured: GraphShare | None) -> GraphShare:
        sharded = shard_potential(captured, self._potential)
        sharder = MicrobatchSharder(sharded, self._potential, num_ranks)
        shards = [sharder.plan_balanced(tensors).shards for tensors in self._tensors]
        groups = [CountingGroup(rank, num_ranks) for rank in range(num_ranks)]
        axes = [GraphAxis(captured, self._potential, GraphGroup(num_ranks, g.rank(), g)) for g in groups]
        walks = [
            [self.walk_of(captured, tensors, axis, group) for axis, group in zip(axes, groups, strict=True)]
            for tensors in self._tensors
        ]
        share = replace(
            _sizes(sharded, captured.size_words().word, shards),
            together=_combined([_combined([walk()[1] for walk in of], max) for of in walks], statistics.fmean),
            deferred=_combined(
                [_combined([walk(defer=True)[1] for walk in of], max) for of in walks], statistics.fmean
            ),
        )
        if measured is not None:
            return replace(share, time=measured.time, memory=measured.memory)
        alone = [self.walk_of(captured, tensors) for tensors in self._tensors]
        times, held = [], []
        for whole, of_ranks in zip(alone, walks, strict=True):
            # In turn, so that other programs on the machine slow all of them alike.
            seconds = [[_seconds(walk()[0]) for walk in (whole, *of_ranks)] for _ in range(_REPEATS)]
            least = [min(of_walk) for of_walk in zip(*seconds, strict=True)]
            times.append((least[0], max(least[1:])))
            num_bytes = [_held(walk(measure_memory=True)[0]) for walk in (whole, *of_ranks)]
            held.append((num_bytes[0], max(num_bytes[1:])))
        return replace(
            share,
            time=sum(slowest for _, slowest in times) / sum(one for one, _ in times),
            memory=sum(largest for _, largest in held) / max(sum(one for one, _ in held), 1),
        )

    def walk_of(
        self,
        captured: StagedPotential,
        tensors: list[Tensor],
        axis: GraphAxis | None = None,
        group: CountingGroup | None = None,
    ) -> Callable[..., tuple[SingleProcessResult, Traffic]]:
        """Returns a function that takes one rank's shard of a micro-batch through all phases.

        Args:
            captured: The potential.
            tensors: Its inputs, of all atoms.
            axis: The graph axis of the rank; None for one rank with all atoms.
            group: The process group of the axis.

        Returns:
            A function with the options of
            :func:`~lightning_januspipe.engine.single_process.run_single_process`, which returns its result and the
            exchanges.
        """
        given = MicrobatchInput(tensors, captured.bind_sizes(tensors))
        local = captured if axis is None else axis.potential
        functions = [local.stage(i, self._potential) for i in range(local.num_stages)]

        def loss(observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
            if axis is not None:
                observables, derivatives = axis.gather_results(0, observables, derivatives)
            seeds = LossGradients(
                [torch.ones_like(y) if y.is_floating_point() else None for y in observables],
                [torch.ones_like(x) for x in derivatives],
            )
            return seeds if axis is None else axis.own_gradients(0, seeds)

        def walk(**manner: Any) -> tuple[SingleProcessResult, Traffic]:
            part = given if axis is None else axis.shard_inputs(tensors)
            if group is not None:
                group.begin()
            on_action = None if group is None else group.on_action
            result = run_single_process(functions, captured.chain, part.tensors, loss, on_action=on_action, **manner)
            return result, {} if group is None else group.sent

        return walk


def _seconds(result: SingleProcessResult) -> float:
    return sum(of_stage.total for of_stage in result.costs)


def _held(result: SingleProcessResult) -> float:
    """Returns the most bytes that a micro-batch holds on all stages together."""
    return sum(b.energy + max(b.force, b.kept) for b in result.memory or [])


def _sizes(sharded: ShardedPotential, word: Any, microbatches: Sequence[Mapping[str, Sequence[Shard]]]) -> GraphShare:
    """Returns the sizes of owned and ghost rows."""
    classes = sharded.classes
    halo = {}
    for name in classes.names:
        ghosts = sum(shard.num_halo for shards in microbatches for shard in shards[name])
        halo[word(name) or name] = ghosts / max(sum(shards[name][0].num_rows for shards in microbatches), 1)
    return GraphShare(
        num_ranks=len(microbatches[0][classes.root]),
        atoms=statistics.fmean(_imbalance(shards[classes.root]) for shards in microbatches),
        edges=statistics.fmean(_imbalance(shards[classes.edges]) for shards in microbatches),
        halo=halo,
        num_whole=sum(all(shard.is_free for of in shards.values() for shard in of) for shards in microbatches),
        num_microbatches=len(microbatches),
    )


def _imbalance(shards: Sequence[Shard]) -> float:
    counts = shards[0].counts
    return max(counts) * len(counts) / max(sum(counts), 1)


def _combined(traffics: Sequence[Traffic], combine: Callable[[list[float]], float]) -> Traffic:
    """Combines bytes and numbers of exchanges by phase and stage, such as to their largest values or their means."""
    keys = dict.fromkeys(key for traffic in traffics for key in traffic)
    pairs = {key: zip(*(traffic.get(key, (0.0, 0.0)) for traffic in traffics), strict=True) for key in keys}
    return {key: (combine(list(sizes)), combine(list(numbers))) for key, (sizes, numbers) in pairs.items()}


class _Done(dist.Work):
    """Is the work of an exchange that nobody has to wait for."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class CountingGroup(dist.ProcessGroup):
    """Counts what one rank of a process group would send; no other rank exists, and zeros are received.

    Attributes:
        sent: Bytes and exchanges since :meth:`begin`, by phase and stage.

    Args:
        rank: The rank that this process stands for.
        size: Number G of graph ranks.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the form for groups written in Python
        self._work, self._num_ranks, self._phase = _Done(), size, ("", 0)
        self.sent: dict[tuple[str, int], tuple[float, float]] = {}

    def begin(self) -> None:
        """Starts to count anew."""
        self.sent = {}

    def on_action(self, action: Action) -> None:
        """Counts what follows for a phase of a stage."""
        self._phase = (action.phase.value.lower(), action.stage)

    def _count(self, num_bytes: float) -> dist.Work:
        size, number = self.sent.get(self._phase, (0.0, 0.0))
        self.sent[self._phase] = (size + num_bytes, number + 1)
        return self._work

    def alltoall_base(self, *args: Any, **_: Any) -> dist.Work:
        """Counts the exchange of ghost rows."""
        output, given = args[:2]
        output.zero_()
        return self._count(given.nbytes)

    def allreduce(self, *args: Any, **_: Any) -> dist.Work:
        """Counts a ring, in which each rank sends all but one G-th of the tensor twice."""
        return self._count(2 * sum(t.nbytes for t in args[0]) * (self._num_ranks - 1) / self._num_ranks)

    def allgather(self, *args: Any, **_: Any) -> dist.Work:
        """Counts the gathering of the forces of all atoms, for the loss."""
        outputs, given = args[:2]
        for output in outputs[0]:
            output.zero_()
        return self._count((self._num_ranks - 1) * sum(t.nbytes for t in given))

    def getBackendName(self) -> str:
        """Returns the name that torch prints."""
        return "counting"
