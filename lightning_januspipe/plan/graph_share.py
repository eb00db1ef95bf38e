"""What graph ranks would share of a recipe's own micro-batches: atoms, time, memory, and the bytes that they send.

All ranks' parts of a micro-batch walk through the phases of all stages in this one process, one rank after another,
with a process group that counts what would be sent, and sends nothing. Rows of other ranks are zeros meanwhile, which
changes values, but neither shapes, nor times, nor what is sent.
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
from lightning_januspipe.capture.stages.staged_potential import StagedPotential
from lightning_januspipe.capture.validate.side_effects import silent_log
from lightning_januspipe.engine.single_process import SingleProcessResult, run_single_process
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.graph import GraphAxis, GraphGroup, Shard, ShardedPotential, shard_potential, verify_sharding
from lightning_januspipe.graph.shard_microbatch import MicrobatchSharder
from lightning_januspipe.plan.compare import CutCosts
from lightning_januspipe.plan.measure import Measured
from lightning_januspipe.random_state import kept_random_state
from lightning_januspipe.schedule import Action, MemoryCosts, PhaseCosts

MOST_MICROBATCHES = 4
"""That are divided: those of the first batch."""

_REPEATS = 5

Traffic = Mapping[tuple[str, int], tuple[float, float]]
"""(name of a phase, stage) -> bytes that a rank sends in it, and number of exchanges, for one micro-batch."""


@dataclass(frozen=True)
class GraphShare:
    """What one of G graph ranks has of a micro-batch, over the micro-batches that were looked at.

    Attributes:
        num_ranks: G.
        atoms: atoms of the largest rank over the mean.
        edges: the same of edges.
        halo: for each class of rows those that are copied to other ranks, over all of its rows.
        num_whole: micro-batches whose structures are dealt whole, so that nothing is exchanged between atoms.
        num_microbatches: that were looked at.
        time: of the slowest rank, over that of one rank with all atoms; without exchanges.
        memory: bytes that the largest rank holds between phases, over those of one rank with all atoms.
        together: exchanges with nothing deferred.
        deferred: exchanges with WF and WE apart.
        refused: why the potential cannot be divided; empty where it can.
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
        """Bytes that one rank sends for a micro-batch, in the phases of all stages."""
        return sum(size for size, _ in (self.together or {}).values())

    @property
    def num_exchanges(self) -> float:
        """Exchanges of a micro-batch, in the phases of all stages."""
        return sum(number for _, number in (self.together or {}).values())

    def to_dict(self) -> dict[str, Any]:
        """All numbers, for JSON."""
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
    """What an exchange between ranks costs.

    Attributes:
        latency: seconds that each takes.
        bandwidth: bytes per second that a rank sends.
    """

    latency: float = 20e-6
    bandwidth: float = 10e9

    def seconds(self, num_bytes: float, number: float) -> float:
        """Of a number of exchanges."""
        return number * self.latency + num_bytes / self.bandwidth


def costs_of_share(measured: Measured, num_ranks: int, share: GraphShare, link: GraphLink) -> CutCosts:
    """The costs of stages whose micro-batches are divided over graph ranks, each with the slowest rank's.

    Args:
        measured: the stages with all atoms on one rank.
        num_ranks: ranks of the pipeline.
        share: what a graph rank has.
        link: between graph ranks.
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
    """Divides micro-batches of a captured potential over graph ranks, and measures the parts.

    Args:
        module: the LightningModule.
        step: its training step, from a batch to its output.
        potential: in stages.
        batches: micro-batches.
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
        """What one of ``num_ranks`` graph ranks has.

        Args:
            num_ranks: G.
            measured: the same of other stages of this potential, for what does not depend on these: the proof that the
                potential can be divided, times and memory are not measured again.
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
        divisions = [sharder.plan_balanced(tensors).shards for tensors in self._tensors]
        groups = [CountingGroup(rank, num_ranks) for rank in range(num_ranks)]
        axes = [GraphAxis(captured, self._potential, GraphGroup(num_ranks, g.rank(), g)) for g in groups]
        walks = [
            [self.walk_of(captured, tensors, axis, group) for axis, group in zip(axes, groups, strict=True)]
            for tensors in self._tensors
        ]
        share = replace(
            _division(sharded, captured.size_words().word, divisions),
            together=_mean_traffic([_largest_traffic([walk()[1] for walk in of_ranks]) for of_ranks in walks]),
            deferred=_mean_traffic([_largest_traffic([walk(defer=True)[1] for walk in of]) for of in walks]),
        )
        if measured is not None:
            return replace(share, time=measured.time, memory=measured.memory)
        alone = [self.walk_of(captured, tensors) for tensors in self._tensors]
        times, held = [], []
        for whole, of_ranks in zip(alone, walks, strict=True):
            # In turn, so that what else the machine does meets all of them.
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
        """A function that takes one rank's part of a micro-batch through all phases.

        Args:
            captured: the potential.
            tensors: its inputs, of all atoms.
            axis: of the rank; None for one rank with all atoms.
            group: that of the axis.

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
            part = given if axis is None else axis.shard_inputs(0, tensors)
            if group is not None:
                group.begin()
            on_action = None if group is None else group.on_action
            result = run_single_process(functions, captured.chain, part.tensors, loss, on_action=on_action, **manner)
            return result, {} if group is None else group.sent

        return walk


def _seconds(result: SingleProcessResult) -> float:
    return sum(of_stage.total for of_stage in result.costs)


def _held(result: SingleProcessResult) -> float:
    """Bytes that a micro-batch holds at most on all stages together."""
    return sum(b.energy + max(b.force, b.kept) for b in result.memory or [])


def _division(sharded: ShardedPotential, word: Any, divisions: Sequence[Mapping[str, Sequence[Shard]]]) -> GraphShare:
    """Who owns and reads how much."""
    classes = sharded.classes
    halo = {}
    for name in classes.names:
        copied = sum(shard.num_halo for shards in divisions for shard in shards[name])
        halo[word(name) or name] = copied / max(sum(shards[name][0].num_rows for shards in divisions), 1)
    return GraphShare(
        num_ranks=len(divisions[0][classes.root]),
        atoms=statistics.fmean(_imbalance(shards[classes.root]) for shards in divisions),
        edges=statistics.fmean(_imbalance(shards[classes.edges]) for shards in divisions),
        halo=halo,
        num_whole=sum(all(shard.is_free for of in shards.values() for shard in of) for shards in divisions),
        num_microbatches=len(divisions),
    )


def _imbalance(shards: Sequence[Shard]) -> float:
    counts = shards[0].counts
    return max(counts) * len(counts) / max(sum(counts), 1)


def _largest_traffic(of_ranks: Sequence[Traffic]) -> Traffic:
    keys = dict.fromkeys(key for traffic in of_ranks for key in traffic)
    return {
        key: (max(t.get(key, (0.0, 0.0))[0] for t in of_ranks), max(t.get(key, (0.0, 0.0))[1] for t in of_ranks))
        for key in keys
    }


def _mean_traffic(of_microbatches: Sequence[Traffic]) -> Traffic:
    keys, num = dict.fromkeys(key for traffic in of_microbatches for key in traffic), len(of_microbatches)
    return {
        key: (
            sum(t.get(key, (0.0, 0.0))[0] for t in of_microbatches) / num,
            sum(t.get(key, (0.0, 0.0))[1] for t in of_microbatches) / num,
        )
        for key in keys
    }


class _Done(dist.Work):
    """Of what has nothing to wait for."""

    def wait(self, timeout: Any = None) -> bool:
        return True


class CountingGroup(dist.ProcessGroup):
    """A process group of which only one rank is there: it counts what that would send, and receives zeros.

    Attributes:
        sent: what was sent since :meth:`begin`.

    Args:
        rank: the rank.
        size: G.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]  # the form for groups written in Python
        self._work, self._num_ranks, self._phase = _Done(), size, ("", 0)
        self.sent: dict[tuple[str, int], tuple[float, float]] = {}

    def begin(self) -> None:
        """Count from here."""
        self.sent = {}

    def on_action(self, action: Action) -> None:
        """What follows belongs to a phase of a stage."""
        self._phase = (action.phase.value.lower(), action.stage)

    def _count(self, num_bytes: float) -> dist.Work:
        size, number = self.sent.get(self._phase, (0.0, 0.0))
        self.sent[self._phase] = (size + num_bytes, number + 1)
        return self._work

    def alltoall_base(self, *args: Any, **_: Any) -> dist.Work:
        """Rows of halos."""
        output, given = args[:2]
        output.zero_()
        return self._count(given.nbytes)

    def allreduce(self, *args: Any, **_: Any) -> dist.Work:
        """A ring: each rank sends all but one G-th of the tensor twice."""
        return self._count(2 * sum(t.nbytes for t in args[0]) * (self._num_ranks - 1) / self._num_ranks)

    def allgather(self, *args: Any, **_: Any) -> dist.Work:
        """Forces of all atoms, for the loss."""
        outputs, given = args[:2]
        for output in outputs[0]:
            output.zero_()
        return self._count((self._num_ranks - 1) * sum(t.nbytes for t in given))

    def getBackendName(self) -> str:
        """For torch's messages."""
        return "counting"
