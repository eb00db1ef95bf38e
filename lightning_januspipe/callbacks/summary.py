"""Prints Lightning's summary of a model with the stages of its parts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from typing_extensions import override

from lightning_januspipe.callbacks.lightning_classes import LightningModule, ModelSummary, Trainer, runner_of
from lightning_januspipe.runtime.runner import Runner


class StageSummary(ModelSummary):
    """Prints Lightning's ModelSummary with a column for the stages that read a part's parameters.

    The counts are those of the whole model, on every rank. The table is printed with the first training batch, when the
    stages are known, in place of the summary that the Trainer prints. Parameters outside the potential count for all
    stages. Parts without parameters are left out. With other strategies, and without stages, the column is left out.

    Args:
        max_depth: How deep nested parts are listed; -1 for all of them, 0 for no summary.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: lightning_januspipe.callbacks.StageSummary
              init_args: {max_depth: 4}
    """

    def __init__(self, max_depth: int = 4) -> None:
        super().__init__(max_depth)
        self._is_printed = False

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Waits: the stages are not known yet."""
        self._is_printed = False

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Prints the summary, once and on one process."""
        if self._is_printed:
            return
        self._is_printed = True
        if self._max_depth and trainer.is_global_zero:
            print_summary(self._summary(trainer, pl_module), runner_of(trainer), pl_module)


def print_summary(summary: Any, runner: Runner | None, module: nn.Module) -> None:
    """Prints a table of a Lightning summary's columns with the stages of a pipeline, and the totals.

    Args:
        summary: The result of ``lightning.pytorch.utilities.model_summary.summarize``.
        runner: The runner of this rank; None with other strategies.
        module: The LightningModule.
    """
    from rich.console import Console
    from rich.table import Table

    columns = {header.strip(): list(cells) for header, cells in summary._get_summary_data()}
    if not any(cell not in ("0", "?", "n/a") for cell in columns.get("FLOPs", [])):
        columns.pop("FLOPs", None)
    stages = module_stages(runner, module)
    if stages is not None:
        columns["Stage"] = [describe(stages.get(name, ())) for name in columns["Name"]]
    table = Table()
    for header in columns:
        table.add_column(header, overflow="fold", no_wrap=header in ("Params", "Stage"))
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in module.named_modules()}
    for row, name in zip(zip(*columns.values(), strict=True), columns["Name"], strict=True):
        if sizes.get(name, 1):
            table.add_row(*map(str, row))
    console = Console()
    console.print(table)
    total, trainable = summary.total_parameters, summary.trainable_parameters
    console.print(f"Parameters: {total:,}, trainable: {trainable:,}, {summary.model_size:,.3f} MB", highlight=False)
    if runner is not None and stages is not None:
        ranks = [[s for s, r in enumerate(runner.placement) if r == rank] for rank in sorted(set(runner.placement))]
        places = (f"rank {rank}: {describe(of_rank)}" for rank, of_rank in enumerate(ranks))
        console.print(f"Stages of the pipeline, {', '.join(places)}", highlight=False)


def module_stages(runner: Runner | None, module: nn.Module) -> dict[str, frozenset[int]] | None:
    """Returns by name of every submodule the stages that read its parameters; None without stages.

    Parameters that no stage reads, such as those outside the potential, count for all stages.
    """
    if runner is None or not runner.is_staged:
        return None
    stages_of = runner.parameters.stages_of
    return {
        name: frozenset().union(*(stages_of[p] for p in part.parameters())) for name, part in module.named_modules()
    }


def describe(stages: Iterable[int]) -> str:
    """Returns stages as ranges, such as "0-2, 5"; a dash for none."""
    runs: list[list[int]] = []
    for stage in sorted(stages):
        if runs and stage == runs[-1][1] + 1:
            runs[-1][1] = stage
        else:
            runs.append([stage, stage])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs) or "–"
