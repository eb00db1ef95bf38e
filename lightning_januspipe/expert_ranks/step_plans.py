"""Plans the exchanges of rows for all micro-batches of a step, before the first phase runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.trace.function import ProgramFunction
from lightning_januspipe.capture.trace.row_types import looked_up_by
from lightning_januspipe.distributed import waiting
from lightning_januspipe.engine.specs import MicrobatchInput
from lightning_januspipe.errors import PipelineError
from lightning_januspipe.expert_ranks.expert_costs import ExpertCosts
from lightning_januspipe.expert_ranks.expert_placement import ExpertPlacement, Guests, best_guests
from lightning_januspipe.expert_ranks.held_experts import HeldExperts
from lightning_januspipe.expert_ranks.insert_row_exchanges import Mixture, num_rows_of, spread_experts
from lightning_januspipe.expert_ranks.row_exchange import RowExchange, plan_rows
from lightning_januspipe.expert_ranks.traced_rows import PotentialWithExperts

_PLANNING = "exchange of the numbers of rows of experts"


@dataclass(frozen=True)
class ExpertGroup:
    """Names the ranks that share the experts of the same stages.

    Attributes:
        size: X, the number of these ranks.
        rank: index of this rank among them.
        group: their process group.
        of_stage: all ranks that hold the stages, on the host, if they have to know the sizes of each other's
            micro-batches: compiled phases that are not right for one on one rank run eagerly on all of them.
        copies: the ranks that hold the same experts as this one in other groups; None if there are none.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None
    of_stage: dist.ProcessGroup | None = None
    copies: dist.ProcessGroup | None = None


class ExpertAxis:
    """Gives one rank's stages exchanges of rows, and plans these for each step.

    Which experts a row has is known before a step: it follows from inputs (elements) and from parameters. So each rank
    counts the rows of all its micro-batches, and one exchange of these counts tells every rank the sizes of all
    messages. No phase waits for the host.

    Args:
        captured: the potential in stages, possibly with exchanges between graph ranks.
        potential: the live potential.
        ranks: the ranks that share the experts.
        stages: the stages that this rank runs.
        dtype: what rows are rounded to on the way; None to send them as they are.
        has_guests: whether ranks may hold experts of other ranks too during a step.

    Attributes:
        parameters: the weights that are spread, of this rank's stages.
        stages: those of this rank's stages whose rows travel.
        move: moves the entries of weights to the ranks that hold them in a new order of their experts; None to leave
            experts where they are.
        copy_guests: copies the entries of weights that each rank holds beside its own ones during a step; None to let
            each expert be on one rank.
        measure: measures what moves and guests cost, from the own entries of the weights of each mixture and the number
            of its rows; None for costs that are declared.

    Raises:
        CaptureError: the experts cannot be spread.
    """

    def __init__(
        self,
        captured: CapturedPotential,
        potential: nn.Module,
        ranks: ExpertGroup,
        stages: Sequence[int],
        dtype: torch.dtype | None = None,
        has_guests: bool = False,
    ) -> None:
        self._spread = spread_experts(captured, ranks.size, ranks.rank, has_guests)
        self._ranks, self._group = ranks, ranks.group
        self._of_stage, self._copies = ranks.of_stage, ranks.copies
        program, regions = captured.program, captured.regions
        stages_of = captured.parameter_stages()
        self.parameters = [
            potential.get_parameter(name) for name in self._spread.parameters if stages_of[name] & set(stages)
        ]
        self.stages = sorted({stage for stage, _ in self._spread.sites.values() if stage in stages})
        self._own = [site for site, (stage, _) in self._spread.sites.items() if stage in stages]
        forward = [*regions.geometry, *regions.body]
        self._dtype = dtype
        types = [looked_up_by(program, site) or site for site in self._own] if dtype is not None else []
        self._experts = ProgramFunction(program, potential, forward, [*self._own, *types])
        self._stages = [self._spread.potential.stage(index, potential) for index in stages]
        self._exchanges: list[RowExchange] = []
        mixtures = [m for m in self._spread.mixtures if set(m.sites) <= set(self._own)]
        self._weights = {m: [potential.get_parameter(name) for name in m.parameters] for m in mixtures}
        self._placements = {m: ExpertPlacement(m.num_experts, ranks.size) for m in mixtures}
        self._mixture_of = {site: m for m in mixtures for site in m.sites}
        self.move: Callable[[Mapping[nn.Parameter, Sequence[int]]], None] | None = None
        self.copy_guests: Callable[[Mapping[nn.Parameter, Sequence[Sequence[int]]]], None] | None = None
        self.measure: Callable[[Sequence[Sequence[Tensor]], Sequence[int]], Sequence[ExpertCosts]] | None = None
        self._num_steps = 0  # those in which experts may have moved

    @property
    def potential(self) -> PotentialWithExperts:
        """Returns the potential whose stages exchange rows."""
        return self._spread.potential

    @property
    def placements(self) -> list[ExpertPlacement]:
        """Returns what decides where the experts of each mixture of this rank's stages are."""
        return list(self._placements.values())

    def plan(
        self, inputs: Sequence[MicrobatchInput], may_move: bool = False, may_have_guests: bool = False
    ) -> list[MicrobatchInput]:
        """Returns the micro-batches of a step with the exchanges of rows for this rank's stages.

        Args:
            inputs: the micro-batches; all ranks of the group have equally many.
            may_move: Whether experts may move to other ranks before the step.
            may_have_guests: Whether ranks may hold experts of other ranks too during the step.

        Raises:
            PipelineError: the ranks have different numbers of micro-batches.
            RankLostError: a rank did not answer.
        """
        sizes = [self._spread.sites[site][1] for site in self._own]
        with torch.no_grad():
            found = [self._experts(given.tensors) for given in inputs]
        experts, types = [f[: len(sizes)] for f in found], [f[len(sizes) :] for f in found]
        counts = self._gathered(experts, sizes)
        knows_costs = self._knows_costs(counts, may_move)
        if may_move and knows_costs and self.move is not None:
            self._place(counts.to(self._experts_device(experts)), self.move)
        held = self._held(counts, self.copy_guests if may_have_guests and knows_costs else None)
        self._exchanges = []
        planned = []
        for microbatch, (given, of_sites) in enumerate(zip(inputs, experts, strict=True)):
            plans: dict[str, RowExchange] = {}
            for index, (site, expert) in enumerate(zip(self._own, of_sites, strict=True)):
                of_site = counts[:, microbatch, index, : sizes[index]]
                slots = held[self._mixture_of[site]]
                rows = slots.rows(of_site)
                place = slots.places(expert, rows[self._ranks.rank])
                plans[site] = plan_rows(place, rows, slots.bounds, self._ranks.rank, self._group)
                if self._dtype is not None:
                    plans[site].travel_as(self._dtype, types[microbatch][index])
            self._exchanges += plans.values()
            exchanges = [plans.get(site) for site in self._spread.sites]  # None for sites of other stages
            received = [None if exchange is None else exchange.experts for exchange in exchanges]
            planned.append(replace(given, tensors=[*given.tensors, *exchanges, *received]))
        if self._of_stage is not None:
            self._tell_sizes(planned)
        return planned

    def _knows_costs(self, counts: Tensor, may_move: bool) -> bool:
        """Returns whether it is known what moves and guests cost.

        That is measured before the second step in which experts may move: the first one warms up, and makes the state
        of the optimizer.

        Args:
            counts: (X, micro-batches, sites, experts) rows of each rank of the group.
            may_move: whether experts may move before the step.
        """
        if self.measure is None:
            return True
        if may_move and self._num_steps == 1 and self._placements:
            loads, num = self._loads(counts.sum((0, 1))), self._ranks.size * max(counts.shape[1], 1)
            rows = [sum(loads[mixture]) // num for mixture in self._placements]
            costs = self.measure([self._weights[mixture] for mixture in self._placements], rows)
            for placement, of_mixture in zip(self._placements.values(), costs, strict=True):
                placement.costs = of_mixture
        self._num_steps += may_move
        return self._num_steps > 1

    def _place(self, counts: Tensor, move: Callable[[Mapping[nn.Parameter, Sequence[int]]], None]) -> None:
        """Moves experts to other ranks where it pays, by the rows of this step and of those before.

        Args:
            counts: (X, micro-batches, sites, experts) rows of each rank of the group, on the device of messages.
            move: see :attr:`move`.
        """
        of_sites = counts.sum((0, 1))
        if self._copies is not None:  # the ranks that hold the same experts in other groups move them alike
            with waiting(_PLANNING, self._copies):
                dist.all_reduce(of_sites, group=self._copies)
        loads, has_guests = self._loads(of_sites), self.copy_guests is not None
        orders: dict[nn.Parameter, list[int]] = {}
        for mixture, placement in self._placements.items():
            if placement.see(loads[mixture], has_guests):
                orders |= dict.fromkeys(self._weights[mixture], placement.order)
        if orders:
            move(orders)

    def _held(
        self, counts: Tensor, copy: Callable[[Mapping[nn.Parameter, Sequence[Sequence[int]]]], None] | None
    ) -> dict[Mixture, HeldExperts]:
        """Returns which experts each rank holds during the step, and copies guests where they pay.

        Args:
            counts: (X, micro-batches, sites, experts) rows of each rank of the group.
            copy: see :attr:`copy_guests`.
        """
        loads, num_ranks = self._loads(counts.sum((0, 1))), self._ranks.size
        held: dict[Mixture, HeldExperts] = {}
        guests: dict[nn.Parameter, list[list[int]]] = {}
        for mixture, placement in self._placements.items():
            load, order = loads[mixture], placement.order
            found = Guests((), 0) if copy is None else best_guests(load, order, num_ranks, placement.costs.guest)
            held[mixture] = HeldExperts(order, num_ranks, load, found.guests)
            if found.guests:
                guests |= dict.fromkeys(self._weights[mixture], held[mixture].guests)
        if guests and copy is not None:
            copy(guests)
        return held

    def _loads(self, of_sites: Tensor) -> dict[Mixture, list[int]]:
        """Returns (K,) the rows of each expert of each mixture, from (sites, experts) those of each site."""
        rows = dict(zip(self._own, of_sites.tolist(), strict=True))
        found = {}
        for mixture in self._placements:
            of_experts = zip(*(rows[site] for site in mixture.sites), strict=True)
            found[mixture] = [sum(of_expert) for of_expert in of_experts][: mixture.num_experts]
        return found

    def _tell_sizes(self, planned: Sequence[MicrobatchInput]) -> None:
        """Lets all ranks that hold the stages know the sizes of each other's micro-batches."""
        of_microbatches = []
        for given in planned:
            found = {s: n for stage in self._stages for s, n in stage.sizes(given.tensors)[0].items()}
            of_microbatches.append({s: found[s] for s in sorted(found) if not s.startswith("handle_")})
        mine = torch.tensor([list(sizes.values()) for sizes in of_microbatches], dtype=torch.int64)
        told = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._of_stage))]
        with waiting(_PLANNING, self._of_stage):
            dist.all_gather(told, mine, group=self._of_stage)
        for index, (given, sizes) in enumerate(zip(planned, of_microbatches, strict=True)):
            of_ranks = [dict(zip(sizes, of_rank[index].tolist(), strict=True)) for of_rank in told]
            for exchange in given.tensors:
                if isinstance(exchange, RowExchange):
                    exchange.sizes_of_ranks = of_ranks

    def _gathered(self, experts: Sequence[Sequence[Tensor]], sizes: Sequence[int]) -> Tensor:
        """Returns (X, micro-batches, sites, experts) numbers of rows of each rank, on the host."""
        num_microbatches, device = len(experts), self._experts_device(experts)
        mine = torch.zeros(num_microbatches, len(sizes), max(sizes, default=0), dtype=torch.int64, device=device)
        for row, of_sites in zip(mine, experts, strict=True):
            for part, expert, size in zip(row, of_sites, sizes, strict=True):
                part[:size] = num_rows_of(expert, size)
        if self._group is None:
            return mine[None].cpu()
        with waiting(_PLANNING, self._group):
            told = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(self._ranks.size)]
            dist.all_gather(told, torch.tensor([num_microbatches], device=device), group=self._group)
        of_ranks = torch.cat(told).tolist()
        if len(set(of_ranks)) > 1:
            raise PipelineError(
                f"ranks that share experts have {', '.join(map(str, of_ranks))} micro-batches; expected the same "
                "number everywhere. Give all replicas batches of the same number of samples (drop_last=True, say), or "
                "use expert_size=1."
            )
        found = [torch.empty_like(mine) for _ in range(self._ranks.size)]
        if mine.numel():
            with waiting(_PLANNING, self._group):
                dist.all_gather(found, mine, group=self._group)
        return torch.stack(found).cpu()

    @staticmethod
    def _experts_device(experts: Sequence[Sequence[Tensor]]) -> torch.device:
        return next((e.device for of_sites in experts for e in of_sites), torch.device("cpu"))

    def clear(self) -> None:
        """Forgets the plans of a step."""
        self._exchanges = []

    def close(self) -> None:
        """Drops all references to the process group, in exchanges too, so that its connections can be closed."""
        for exchange in self._exchanges:
            exchange.close()
        self._group = self._of_stage = self._copies = None
