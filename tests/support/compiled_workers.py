"""What the ranks of the tests of compiled training run. Most run the phase graphs operation by operation."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import checkpoint_workers
import strategy_workers
import tiny
import torch
from expert_workers import having_guests, moving
from matris_models import matris
from torch import Tensor, fx
from torch._inductor import cpp_builder

from lightning_januspipe.bench.training_steps import RunTiming, run_once
from lightning_januspipe.capture import ActivationCosts
from lightning_januspipe.compiled import artifacts, background, compiler
from lightning_januspipe.compiled.compile_process import CompileResult
from lightning_januspipe.compiled.compiled_stage import CompiledStage
from lightning_januspipe.compiled.exchanges import exchanges_of
from lightning_januspipe.compiled.sizes import StageSizes
from lightning_januspipe.expert_ranks import ExpertAxis
from lightning_januspipe.models import EquivariantPotential, PotentialModule
from lightning_januspipe.runtime import build_pipeline, change_over, training_length
from lightning_januspipe.runtime.graph_rank_activations import measure_on_graph_ranks
from lightning_januspipe.runtime.pipeline import Pipeline
from lightning_januspipe.schedule import Phase
from lightning_januspipe.testing import RunRecord, interpreted_phases, quiet_trainer, train_in_pipeline


@contextmanager
def interpreted(change: Any = None) -> Iterator[list[fx.GraphModule]]:
    """Interprets phase graphs inside; a micro-batch that runs eagerly is an error there."""
    with interpreted_phases(change) as graphs, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs eagerly")
        yield graphs


def train_interpreted(*arguments: Any) -> RunRecord:
    """Trains with interpreted phase graphs; every micro-batch has to fit."""
    with interpreted() as graphs:
        record = train_in_pipeline(*arguments)
    assert graphs, "no phase graph was made"
    assert not record.eager, record.eager
    return record


def train_partly_interpreted(*arguments: Any) -> RunRecord:
    """Trains with interpreted phase graphs on some of the ranks."""
    with interpreted():
        return train_in_pipeline(*arguments)


def captures_to_compile(strategy: dict[str, Any]) -> list[bool]:
    """Returns for each capture of a short training on this rank whether it was for phases that will be compiled."""
    noted: list[bool] = []
    capture = build_pipeline.capture_module

    def noting(*arguments: Any, **options: Any) -> Any:
        noted.append(options["compiles"])
        return capture(*arguments, **options)

    with mock.patch.object(build_pipeline, "capture_module", noting):
        train_partly_interpreted(tiny.module, tiny.data, strategy, 1, {})
    return noted


def run_once_interpreted(*arguments: Any) -> RunTiming:
    """Times steps as ``januspipe bench`` does, with interpreted phase graphs."""
    with interpreted():
        return run_once(*arguments)


def train_recomputing_within_a_limit(*arguments: Any) -> RunRecord:
    """Trains on graph ranks whose memory limit, by what these have measured of themselves, has them compute again."""
    kept: list[str] = []
    runners = compiler.StageCompiler._runners

    def noted(self: Any, function: Any, chain: Any) -> Any:
        if not self.interprets:
            kept.append(self.activation_of(function.index))
        return runners(self, function, chain)

    found: list[dict[str, ActivationCosts]] = []

    def measure(*given: Any) -> dict[str, ActivationCosts]:
        found.append(measure_on_graph_ranks(*given))
        return found[-1]

    with (
        mock.patch.object(compiler.StageCompiler, "_runners", noted),
        mock.patch.object(build_pipeline, "measure_on_graph_ranks", measure),
    ):
        record = train_interpreted(*arguments)
    assert kept == ["recompute"]
    pointwise, recompute = (found[0][name].memory[0].total for name in ("pointwise", "recompute"))
    assert 1e4 < recompute < arguments[2]["memory_limit"] < pointwise < 12e6
    return record


def train_interpreted_moving(*arguments: Any) -> RunRecord:
    """Trains with interpreted phase graphs, and with experts that move before every step."""
    with moving():
        return train_interpreted(*arguments)


def train_interpreted_with_guests(*arguments: Any, fault: str = "") -> RunRecord:
    """Trains with interpreted phase graphs, and with experts that are on several ranks in every step."""
    with having_guests(moves=False, fault=fault):
        return train_interpreted(*arguments)


def train_compiled(*arguments: Any) -> RunRecord:
    """Trains with phases that inductor compiles; every micro-batch has to fit."""
    with mock.patch.object(artifacts, "unpacked", wraps=artifacts.unpacked) as unpacked, warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*runs eagerly")
        record = train_in_pipeline(*arguments)
    assert unpacked.call_count == 4
    return record


def train_compiled_with_guests(*arguments: Any) -> RunRecord:
    """Trains with phases that inductor compiles, and with experts that are on several ranks in every step."""
    with having_guests(moves=False):
        return train_compiled(*arguments)


def fit_then_evaluate(strategy: dict[str, Any]) -> dict[str, Any]:
    """Trains a MatRIS-MoE on two replicas, with validation, and tests it; phases are interpreted, if compiled."""
    with interpreted():
        return strategy_workers.fit_then_evaluate(strategy, {"max_epochs": 1, "devices": 2}, matris)


def train_without_an_exchange(*arguments: Any) -> RunRecord:
    """Trains with phases of which one takes its own rows for the sum with the rows in other ranks' halos."""

    def change(graph: fx.GraphModule) -> Any:
        for node in exchanges_of(graph.graph):
            if node.target is torch.ops.januspipe.sum_halo.default:
                with graph.graph.inserting_before(node):
                    own = graph.graph.call_function(_own_rows, node.args)
                for user in list(node.users):
                    user.replace_input_with(node, own)
                graph.graph.erase_node(node)
                graph.recompile()
                break
        return graph

    with interpreted(change):
        return train_in_pipeline(*arguments)


def _own_rows(x: Tensor, handle: int, num_halo: int) -> Tensor:
    return x[: x.shape[0] - num_halo].clone()


def train_with_a_misfit_on_one_rank(*arguments: Any) -> RunRecord:
    """Trains with graphs that are not right for an even number of halo rows, or for few rows of a rank's experts."""
    misfit = StageSizes.misfit
    seen: list[int] = []

    def is_wrong(rows: int) -> bool:
        return rows < 80 if "expert_size" in arguments[2] else rows % 2 == 0

    def of_rank(self: StageSizes, bound: dict[str, int]) -> str | None:
        rows = sum(n for name, n in bound.items() if name.startswith(("halo_", "received_")))
        seen.append(rows)
        is_example = len(seen) == 1  # the first call comes from the compiler
        return "it has such rows" if is_wrong(rows) and not is_example else misfit(self, bound)

    with mock.patch.object(StageSizes, "misfit", of_rank), interpreted() as graphs, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*runs eagerly")
        record = train_in_pipeline(*arguments)
    assert graphs and {is_wrong(n) for n in seen[1:]} == {True, False}, "all micro-batches fit, or none"
    return record


def first_plan(strategy: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Trains one step with phases that take seconds longer on rank 1; returns what the start has planned and told."""
    is_late, lines = os.environ["RANK"] == "1", list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def change(graph: fx.GraphModule) -> Any:
        def run(*inputs: Any) -> Any:
            time.sleep(seconds)
            return graph(*inputs)

        return run if is_late else graph

    trainer, module = quiet_trainer({"compile": True, **strategy}, max_steps=1, limit_val_batches=0), tiny.module()
    found: dict[str, Any] = {}

    def look(*_: Any) -> None:
        schedules = trainer.strategy.runner.schedules
        found.update(costs=schedules.costs, planned=schedules.planner.costs, placement=schedules.first.placement)

    module.on_train_batch_end = look
    with interpreted(change), mock.patch.object(logger, "handlers", [handler]), mock.patch.object(logger, "level", 20):
        trainer.fit(module, tiny.data())
    return {**found, "line": next((line for line in lines if "micro-batch" in line), "")}


class _Compiling:
    """Stands for a process that compiles: it has ended when it was looked at a number of times, other ones by rank."""

    ended: ClassVar[list[_Compiling]] = []

    def __init__(self, sources: Any, folder: Path, *_: Any) -> None:
        assert sources and folder.is_dir(), "there is nothing to compile"
        self._looks = 1 if os.environ["WORLD_SIZE"] == "1" else int(os.environ["RANK"]) % 2

    def has_ended(self) -> bool:
        """Counts the looks."""
        self._looks -= 1
        return self._looks < 0

    def result(self) -> CompileResult:
        """Returns that nothing has failed."""
        return CompileResult(cpu_seconds=1.0)

    def end(self) -> None:
        """Notes its end."""
        self.ended.append(self)


@dataclass
class Changes:
    """Notes how a rank changes over from eager to compiled stages.

    Attributes:
        after: The steps that ran before.
        kept: What each of its stages keeps between phases afterwards.
    """

    after: int = 0
    kept: list[str] = field(default_factory=list)


@dataclass
class ChangedRecord(RunRecord):
    """Holds what a training leaves that changed over, and how it did."""

    changes: Changes = field(default_factory=Changes)


@contextmanager
def changing_over() -> Iterator[Changes]:
    """Has trainings inside begin with eager stages, and change over to interpreted phases after a step or two."""
    _Compiling.ended.clear()
    found, num_steps = Changes(), 0
    change, train_step = Pipeline.change_to_compiled, Pipeline.train_step

    def counted(self: Pipeline, *arguments: Any, **options: Any) -> list[Any]:
        nonlocal num_steps
        num_steps += 1
        return train_step(self, *arguments, **options)

    def noted(self: Pipeline) -> str:
        assert not any(isinstance(stage, CompiledStage) for stage in self.executor.stages.values())
        assert not found.kept, "it has changed over before"
        words = change(self)
        found.after = num_steps
        stages = self.executor.stages.values()
        found.kept = [stage._phases.activation if isinstance(stage, CompiledStage) else "" for stage in stages]
        return words

    with (
        interpreted() as graphs,
        mock.patch.object(change_over, "BackgroundCompile", _Compiling),
        mock.patch.object(Pipeline, "change_to_compiled", noted),
        mock.patch.object(Pipeline, "train_step", counted),
        mock.patch.object(training_length, "LEAST_RATIO", 0.0),
    ):
        yield found
    assert graphs and found.kept and all(found.kept), f"the stages keep {found.kept} after {found.after} steps"
    assert 0 < found.after < num_steps, "no step was eager, or none compiled"
    assert _Compiling.ended or int(os.environ["RANK"]), "what compiles was not ended"


def train_changing_over(*arguments: Any) -> ChangedRecord:
    """Trains with stages that are eager first, and compiled after some steps."""
    with changing_over() as changes:
        record = train_in_pipeline(*arguments)
    assert not record.eager
    return ChangedRecord(**vars(record), changes=changes)


def train_and_save_changing_over(*arguments: Any) -> dict[str, Any]:
    """Trains as ``checkpoint_workers.train`` does, with stages that are compiled after some steps of each run."""
    with changing_over():
        return checkpoint_workers.train(*arguments)


def eager_microbatches(agrees: bool, *arguments: Any) -> int:
    """Returns how many micro-batches ran eagerly on this rank, where some do not fit on one.

    Args:
        agrees: whether ranks that share experts tell each other the sizes of their micro-batches.
        arguments: of ``train_in_pipeline``.
    """
    with mock.patch.object(CompiledStage, "_note_misfit") as noted, ExitStack() as stack:
        if not agrees:
            stack.enter_context(mock.patch.object(ExpertAxis, "_tell_sizes"))
        train_with_a_misfit_on_one_rank(*arguments)
    return int(noted.call_count)


@contextmanager
def nothing_compiled_here() -> Iterator[None]:
    """Fails at its end if this process has compiled anything inside."""
    commands, run = list[str](), cpp_builder.run_compile_cmd

    def noted(command: str, *more: Any, **options: Any) -> Any:
        commands.append(command)
        return run(command, *more, **options)

    with mock.patch.object(cpp_builder, "run_compile_cmd", noted):
        yield
    assert not [c for c in commands if " -shared " in c], "the training process has compiled"


def smallest_of_two_layers() -> PotentialModule:
    """Returns a module whose layers have few features, so that they are compiled in a short time."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    return PotentialModule(EquivariantPotential(["Cu", "Ni", "Al"], 5.0, num_layers=2, num_features=2, l_max=0))


def train_compiled_with_deferred_gradients(*arguments: Any) -> RunRecord:
    """Trains with phases that another process compiles, WF among them, which this process reads and runs."""
    read: list[set[Phase]] = []
    ran: list[int] = []
    runners, weight_force = artifacts.StageArtifacts.runners, CompiledStage.weight_force

    def noted(self: Any, tolerance: float | None) -> Any:
        read.append(set(self.functions))
        return runners(self, tolerance)

    def noted_force(self: Any, microbatch: int) -> None:
        ran.append(microbatch)
        weight_force(self, microbatch)

    with (
        nothing_compiled_here(),
        mock.patch.object(artifacts.StageArtifacts, "runners", noted),
        mock.patch.object(CompiledStage, "weight_force", noted_force),
    ):
        record = train_in_pipeline(*arguments)
    assert not record.eager and not record.num_misfits
    assert Phase.WF in set[Phase]().union(*read), "no stage has anything to defer"
    assert ran, "no WF was an action of its own"
    return record


def train_changing_over_when_compiled(*arguments: Any) -> RunRecord:
    """Trains with stages that inductor compiles in the background, which the second step waits for."""
    is_waiting, looks = change_over.ChangeOver.is_waiting, [0]

    def wait(self: Any) -> bool:
        looks[0] += 1
        while looks[0] > 1 and is_waiting(self):
            time.sleep(0.1)
        return is_waiting(self)

    with (
        nothing_compiled_here(),
        mock.patch.object(change_over.ChangeOver, "is_waiting", wait),
        mock.patch.object(training_length, "LEAST_RATIO", 0.0),
        mock.patch.object(background, "NICENESS", 0),
    ):
        record = train_in_pipeline(*arguments)
    assert not record.eager and not record.num_misfits
    return record
