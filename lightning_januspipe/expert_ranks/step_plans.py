"""Plans the exchanges of rows for all micro-batches of a step, before the first phase runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.trace.function import ProgramFunction
from lightning_januspipe.distributed import waiting
from lightning_januspipe.engine.specs import MicrobatchInput
from lightning_januspipe.errors import PipelineError
from lightning_januspipe.expert_ranks.insert_row_exchanges import num_rows_of, spread_experts
from lightning_januspipe.expert_ranks.row_exchange import RowExchange, bounds_of, plan_rows

_PLANNING = "exchange of the numbers of rows of experts"


@dataclass(frozen=True)
class ExpertGroup:
    """Names the ranks that share the experts of the same stages.

    Attributes:
        size: X, the number of these ranks.
        rank: index of this rank among them.
        group: their process group.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None


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

    Attributes:
        parameters: the weights that are spread, of this rank's stages.

    Raises:
        CaptureError: the experts cannot be spread.
    """

    def __init__(
        self, captured: CapturedPotential, potential: nn.Module, ranks: ExpertGroup, stages: Sequence[int]
    ) -> None:
        self._spread = spread_experts(captured, ranks.size)
        self._ranks, self._group = ranks, ranks.group
        program, regions = captured.program, captured.regions
        stages_of = captured.parameter_stages()
        self.parameters = [
            potential.get_parameter(name) for name in self._spread.parameters if stages_of[name] & set(stages)
        ]
        self._own = [site for site, (stage, _) in self._spread.sites.items() if stage in stages]
        forward = [*regions.geometry, *regions.body]
        self._experts = ProgramFunction(program, potential, forward, self._own)
        self._exchanges: list[RowExchange] = []

    @property
    def potential(self) -> CapturedPotential:
        """Returns the potential whose stages exchange rows."""
        return self._spread.potential

    def plan(self, inputs: Sequence[MicrobatchInput]) -> list[MicrobatchInput]:
        """Returns the micro-batches of a step with the exchanges of rows for this rank's stages.

        Args:
            inputs: the micro-batches; all ranks of the group have equally many.

        Raises:
            PipelineError: the ranks have different numbers of micro-batches.
            RankLostError: a rank did not answer.
        """
        with torch.no_grad():
            experts = [self._experts(given.tensors) for given in inputs]
        sizes = [self._spread.sites[site][1] for site in self._own]
        counts = self._gathered(experts, sizes)
        self._exchanges = []
        planned = []
        for microbatch, (given, of_sites) in enumerate(zip(inputs, experts, strict=True)):
            plans: dict[str, RowExchange] = {}
            for index, (site, expert) in enumerate(zip(self._own, of_sites, strict=True)):
                of_site = counts[:, microbatch, index, : sizes[index]]
                bounds = bounds_of(sizes[index], self._ranks.size)
                plans[site] = plan_rows(expert, of_site, bounds, self._ranks.rank, self._group)
            self._exchanges += plans.values()
            exchanges = [plans.get(site) for site in self._spread.sites]  # None for sites of other stages
            planned.append(replace(given, tensors=[*given.tensors, *exchanges]))
        return planned

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
        self._group = None
