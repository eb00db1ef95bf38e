"""Builds a pipeline from a LightningModule and a loader's samples: one rank captures the potential for all ranks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from lightning_januspipe.capture import (
    ActivationFactories,
    Capture,
    CaptureError,
    PhaseMode,
    ProgramCache,
    StageOrigin,
    capture_module,
)
from lightning_januspipe.capture.validate.against_eager import rounding_tolerance
from lightning_januspipe.distributed import on_first_rank, waiting
from lightning_januspipe.engine.eager_stages import eager_stages
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.p2p import Links, message_latency
from lightning_januspipe.engine.single_process import StageFactory
from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.engine.stage import Stage
from lightning_januspipe.errors import quoted
from lightning_januspipe.graph import call_tensors, verify_sharding
from lightning_januspipe.graph.half_rows import ExchangeDtype
from lightning_januspipe.mesh import Mesh, as_world
from lightning_januspipe.runtime.chosen_activations import activation_factories, candidates
from lightning_januspipe.runtime.chosen_state import ChosenState, StageSharing, choose_state
from lightning_januspipe.runtime.graph_rank_activations import measure_on_graph_ranks
from lightning_januspipe.runtime.parameters import PlacedParameters
from lightning_januspipe.runtime.pipeline import ExpertOrder, MessageDtype, Pipeline, SpreadOptions
from lightning_januspipe.runtime.planner import Planner, is_deferred, is_unfolded, placements
from lightning_januspipe.runtime.start_line import StartLine, describe_compiled, describe_run
from lightning_januspipe.runtime.training_length import OPERATIONS_PER_PART, TrainingLength, reason_not_to_compile
from lightning_januspipe.runtime.user_step import with_batch
from lightning_januspipe.schedule import PhaseCosts
from lightning_januspipe.schedule.state_actions import ShardLevel

if TYPE_CHECKING:
    from lightning_januspipe.compiled.compiler import StageCompiler
    from lightning_januspipe.compiled.minimum_cut import Activation
    from lightning_januspipe.runtime.change_over import ChangeOver


@dataclass(frozen=True)
class CaptureRequest:
    """Says what to capture, and for which run.

    Attributes:
        module: The LightningModule.
        step: Its training or evaluation step.
        examples: Returns two batches of different sizes; called on one rank.
        num_microbatches: Micro-batches of most steps; the cut is chosen for them.
        ready: Enters the contexts that the step is run in, with the module in training mode or as it is.
        trains: Whether the capture is for training.
        evaluation_step: The validation step, if training runs it.
        annotate: Returns the context that an action runs in, given the action's name, as profilers do.
        sharing: What the ranks that hold the same stages may share in training.
        length: How long training is going to be.
        place: Brings the parameters that a rank needs to its device, once its stages are known.
        whole: A context in which the module has all its parameters on the rank that captures.
        gradient_bytes: See :class:`.PhaseMode`.
        fetched: A context in which all ranks have all parameters, once these are placed; None where they cannot.
    """

    module: Any
    step: Callable[..., Any]
    examples: Callable[[], tuple[Any, Any]]
    num_microbatches: int
    ready: Callable[[bool], AbstractContextManager[None]]
    trains: bool
    evaluation_step: Callable[..., Any] | None = None
    annotate: Callable[[str], AbstractContextManager[Any]] | None = None
    sharing: StageSharing = field(default_factory=StageSharing)
    length: TrainingLength = field(default_factory=TrainingLength)
    place: Callable[[PlacedParameters], None] | None = None
    whole: Callable[[], AbstractContextManager[Any]] = nullcontext
    gradient_bytes: float | None = None
    fetched: Callable[[], AbstractContextManager[Any]] | None = None


@dataclass(frozen=True)
class _Example:
    """Holds a micro-batch that all ranks get before training.

    Attributes:
        inputs: The tensors of the potential's call; nothing where no rank needs them.
        is_to_verify: Whether all ranks have to verify with them that the potential is sharded right.
        is_to_measure: Whether graph ranks have to measure with them what stages keep.
    """

    inputs: Sequence[Tensor] = ()
    is_to_verify: bool = False
    is_to_measure: bool = False

    def on(self, device: torch.device) -> list[Tensor]:
        """Returns copies of the inputs; what was received in Lightning's inference mode cannot be differentiated."""
        return [t.clone().to(device) for t in self.inputs]


@dataclass(frozen=True)
class _LastCapture:
    """Keeps a capture that may serve again, as in a test after training."""

    module: weakref.ref[Any]
    step: str
    capture: Capture

    def serves(self, request: CaptureRequest) -> bool:
        """Returns whether the capture is right for a request.

        Training starts with a capture of its own: an earlier one may know nothing of what its step reads. If steps
        differentiate by themselves, each has a capture of its own too.
        """
        any_step = self.capture.potential.replaced is None
        is_right = self.module() is request.module and (any_step or self.step == _name(request.step))
        return is_right and not request.trains


class PipelineBuilder:
    """Captures modules and builds pipelines for one strategy; keeps the last capture.

    Args:
        schedule: Name of the schedule.
        wave_size: Micro-batches in a wave, or "auto".
        memory_limit: Most bytes that one rank may hold between phases of training, or None.
        potential: Dotted name of the potential, if the user gave one.
        stages: Where stages come from.
        message_dtype: What messages between stages are rounded to.
        compiles: Whether to compile the phases; "auto" does it in the background of a training that pays for it.
        activation: What stages keep between their phases; "auto" chooses within the memory limit.
        expert_placement: Which experts a rank has, where ranks share them.
        exchange_dtype: What rows of atoms and edges are rounded to between ranks.

    Attributes:
        schedule: Name of the schedule.
        level: What the ranks that hold the same stages share in the present training.
    """

    def __init__(
        self,
        schedule: str,
        wave_size: int | Literal["auto"],
        memory_limit: float | None,
        potential: str | None,
        stages: StageOrigin,
        message_dtype: MessageDtype | None = None,
        compiles: bool | Literal["auto"] = False,
        activation: Activation | Literal["auto"] = "auto",
        expert_placement: ExpertOrder = "order",
        exchange_dtype: ExchangeDtype | None = None,
    ) -> None:
        self.schedule, self._wave_size, self._memory_limit = schedule, wave_size, memory_limit
        self._potential, self._stages, self._message_dtype = potential, stages, message_dtype
        self._compiles, self._in_background = compiles is True, compiles == "auto"
        self._activation, self._expert_placement = activation, expert_placement
        self._exchange_dtype = exchange_dtype
        self._last: _LastCapture | None = None
        self._compiler: StageCompiler | None = None
        self._compiler_spreads = False  # whether it is for stages whose experts are spread
        self._activations: tuple[str, ...] = ()
        self.level: ShardLevel = "none"

    def pipeline(
        self, request: CaptureRequest, mesh: Mesh, rank: int, broadcast: Callable[[Any], Any]
    ) -> tuple[Pipeline, StartLine]:
        """Builds this rank's part of a pipeline.

        Args:
            request: What to capture.
            mesh: This rank's process groups.
            rank: This global rank; rank 0 captures.
            broadcast: Returns an object of rank 0 on all ranks.

        Returns:
            The pipeline, and what to tell about a new capture (nothing if the last one serves again).

        Raises:
            CaptureError: On every rank, if rank 0 cannot capture.
        """
        links = pipeline_links(mesh)
        with waiting("first messages of the pipeline", mesh.down_group, mixed=True):
            mine = message_latency(links)
        latency = broadcast(mine)  # one number for all replicas: it decides where stages are placed
        planner = Planner(self._schedule_on(mesh), mesh.shape.pipeline, wave_size=self._wave_size, latency=latency)
        news, example = list[str](), _Example()
        is_new = self._last is None or not self._last.serves(request)
        if is_new:
            capture, example = on_first_rank(lambda: self._capture(request, mesh, planner), rank, broadcast)
            self._last, self._compiler = _LastCapture(weakref.ref(request.module), _name(request.step), capture), None
            self._activations = (self._usual_activation,) * capture.potential.num_stages
            news.append(describe_run(planner.name, request.num_microbatches, mesh.shape, mesh.expert_size))
        assert self._last is not None
        found = self._last.capture
        spreads_experts = request.trains and mesh.expert_size > 1  # evaluation alone has every expert on every rank
        if example.is_to_measure and mesh.pipeline_rank == mesh.data_rank == 0:  # of rank 0, which chooses
            with request.ready(not request.trains):
                given = self._factories(request, mesh, planner), is_deferred(planner.name)
                measured = measure_on_graph_ranks(found, request.module, mesh, example.on(mesh.device), *given)
            found = replace(found, activations=measured)
        planner = replace(planner, costs=tuple(found.costs), memory=tuple(found.memory))
        if request.trains:  # evaluation keeps nothing between its phases
            planner, words = self._with_chosen_state(request, planner, found, rank, broadcast)
            news += words
        change, why_not = None, ""
        if self._in_background and request.trains:
            why_not = self._why_not_compile(request, mesh, planner, broadcast)
        has_processes = self._compiles and mesh.device.type == "cpu"  # on GPUs each would have a context of its own
        if request.trains and not why_not and (self._in_background or has_processes):
            change = self._change_over(request, mesh, planner)
        make_stage: StageFactory = change or self._eager_stage
        if self._compiles and change is None:
            make_stage = self._stage_compiler(request, mesh, found, spreads_experts)
        elif self._has_compiled(request, spreads_experts):
            assert self._compiler is not None
            make_stage = self._compiler
        pipeline = Pipeline(
            request.module,
            mesh,
            found,
            planner,
            links,
            request.num_microbatches,
            self._message_dtype,
            make_stage,
            SpreadOptions(self._expert_placement, self._compiles or change is not None) if spreads_experts else None,
            self._exchange_dtype,
            request.place,
        )
        pipeline.fetch_parameters_with(request.fetched or request.whole, request.gradient_bytes)
        pipeline.executor.annotate = request.annotate
        if change is not None:
            why_not = self._begin(change, pipeline)
        if why_not:
            news.append(why_not)
        if self._compiler is not None and change is None:
            pipeline.compile_report = self._compiler.report()
            if is_new:
                of_ranks = mesh.gathered_over_pipeline(pipeline.compile_report, "gathering of what was compiled")
                news.append(describe_compiled(of_ranks))
        if example.inputs:
            with request.ready(not request.trains):
                inputs = example.on(mesh.device)
                if example.is_to_verify:
                    pipeline.verify_sharding(inputs)
                if pipeline.compile_report is not None and self._measures_compiled(request, mesh):
                    assert self._compiler is not None
                    pipeline.measure_phases(self._compiler.uncompared, inputs)
        if found.not_evaluated:
            reason = found.not_evaluated.partition(". ")[0]
            news.append(f"validation runs the whole module on every rank, because {reason}")
        told = replace(found, costs=list(pipeline.schedules.costs))
        return pipeline, StartLine.of(told, mesh.shape.pipeline, news) if is_new else StartLine()

    def _with_chosen_state(
        self, request: CaptureRequest, planner: Planner, found: Capture, rank: int, broadcast: Callable[[Any], Any]
    ) -> tuple[Planner, list[str]]:
        """Chooses what ranks share and what stages keep in training.

        Returns:
            The planner of this choice, and words about it where there is a limit.
        """
        limit = self._memory_limit

        def choose() -> ChosenState:
            return choose_state(planner, found, request.module, request.sharing, limit, request.num_microbatches)

        chosen = on_first_rank(choose, rank, broadcast)  # its predictions may take other ways on other machines
        self.level = chosen.level
        if chosen.activations is not None:
            self._activations = chosen.activations.names
        return chosen.on(replace(planner, memory_limit=limit)), [] if limit is None else [chosen.describe(limit)]

    def _measures_compiled(self, request: CaptureRequest, mesh: Mesh) -> bool:
        """Tells whether a schedule is made for the times of the compiled phases, if all are compiled at the start.

        Experts on several ranks are left out: their rows come from the micro-batches of all these ranks.
        """
        compiles = request.trains and (self._compiles or self._in_background)
        return compiles and mesh.shape.pipeline > 1 and mesh.expert_size == 1

    def _schedule_on(self, mesh: Mesh) -> str:
        """Returns the name of the schedule; a single rank has no gaps, and holds one micro-batch at a time."""
        return self.schedule if mesh.shape.ranks_per_replica > 1 else "1f1b-fold"

    @property
    def _usual_activation(self) -> str:
        """Returns what stages keep without a memory limit."""
        usual = "pointwise" if self._compiles else "keep"
        return usual if self._activation == "auto" else self._activation

    def _eager_stage(self, function: StageFunction, gradients: GradientBuffers, chain: ChainSpec) -> Stage:
        """Returns a stage whose phases run eagerly."""
        return eager_stages(self._activations[function.index])(function, gradients, chain)

    def _factories(self, request: CaptureRequest, mesh: Mesh, planner: Planner) -> ActivationFactories:
        """Returns the activations that a memory limit may choose from, the fastest first."""
        if self._memory_limit is None or not request.trains or is_unfolded(planner.name):
            return {}
        names = candidates(self._compiles, self._activation, mesh.device.type)
        if self._compiles:
            names = () if mesh.expert_size > 1 else names
        elif self._activation != "auto":
            names = ()  # the capture itself has measured it
        return activation_factories(self._compiles, names, mesh.device.type, is_deferred(planner.name))

    def _why_not_compile(
        self, request: CaptureRequest, mesh: Mesh, planner: Planner, broadcast: Callable[[Any], Any]
    ) -> str:
        """Returns in words why phases stay eager; nothing where they are compiled in the background."""
        assert self._last is not None
        found, name = self._last.capture, self._schedule_on(mesh)
        if is_unfolded(name):
            return f"phases stay eager: {name} runs the phases of a stage on two ranks"

        def decide() -> str:
            potential, step_time = found.potential, planner.step_time(request.num_microbatches)
            per_unit = OPERATIONS_PER_PART if potential.operation_word == "parts" else 1
            num_operations = [per_unit * num for num in potential.num_operations]
            return reason_not_to_compile(request.length, step_time, num_operations)

        reason = on_first_rank(decide, mesh.rank, broadcast)
        return f"phases stay eager: {reason}" if reason else ""

    def _will_compile(self, request: CaptureRequest, mesh: Mesh, schedule: str) -> bool:
        """Tells whether phases of a training will be compiled, if it is long enough to pay for that."""
        if not request.trains or is_unfolded(schedule) or not self._in_background:
            return request.trains and self._compiles
        from lightning_januspipe.compiled.torch_internals import missing_compiler

        return missing_compiler(mesh.device.type) is None

    def _change_over(self, request: CaptureRequest, mesh: Mesh, planner: Planner) -> ChangeOver:
        """Returns what makes stages that other processes compile."""
        from lightning_januspipe.runtime.change_over import ChangeOver

        assert self._last is not None
        self._compiler = None
        compiler = self._stage_compiler(request, mesh, self._last.capture, mesh.expert_size > 1)
        if self._in_background:
            compiler.compiles = False
            kept = {"keep": "pointwise"} if self._activation == "auto" else {}
            compiler.activations = cast("tuple[Activation, ...]", tuple(kept.get(a, a) for a in self._activations))
            if planner.memory_limit is not None:
                compiler.most_bytes = planner.room(request.num_microbatches)
        modules = {type(m).__module__ for m in request.module.modules()}
        imports = sorted(name for name in modules if name != "__main__" and not name.startswith("torch."))
        return ChangeOver(compiler, mesh, self._activations, imports, self._in_background)

    def _begin(self, change: ChangeOver, pipeline: Pipeline) -> str:
        """Starts to compile, and waits for the end unless it is done in the background; returns what happens."""
        words = change.start()
        if change.is_over:
            self._compiler = None
            return words
        pipeline.change_over = change
        if not self._in_background:
            change.wait()
        return words if self._in_background and not change.is_compiled else pipeline.change_to_compiled()

    def _has_compiled(self, request: CaptureRequest, spreads_experts: bool) -> bool:
        """Tells whether training has compiled the stages in the background that an evaluation is for."""
        known = self._compiler is not None and self._compiler_spreads == spreads_experts
        return known and bool(self._compiler and self._compiler.compiled) and not request.trains

    def _stage_compiler(
        self, request: CaptureRequest, mesh: Mesh, found: Capture, spreads_experts: bool
    ) -> StageCompiler:
        """Returns what makes compiled stages; what was compiled for training serves evaluation of the same stages."""
        from lightning_januspipe.compiled.compiler import StageCompiler

        if self._compiler is None or self._compiler_spreads != spreads_experts:
            over_ranks = mesh.gathered_over_stage if spreads_experts else mesh.gathered_over_graph
            self._compiler_spreads = spreads_experts
            potential = request.module.get_submodule(found.potential.path)
            self._compiler = StageCompiler(
                found.sizes,
                mesh.device.type,
                activations=cast("tuple[Activation, ...]", self._activations),
                defer=is_deferred(self._schedule_on(mesh)),
                trains=request.trains,
                tolerance=rounding_tolerance(found.potential, potential),
                cache=ProgramCache.default().subfolder("inductor"),
                artifacts=ProgramCache.default().subfolder("compiled"),
                over_ranks=lambda mine: over_ranks(mine, "agreement on what is compiled"),
            )
        return self._compiler

    def _capture(self, request: CaptureRequest, mesh: Mesh, planner: Planner) -> tuple[Capture, _Example]:
        """Captures on one rank; see :meth:`_capture_in` for what it returns.

        For training, the module is captured as it is. For evaluation, it is put into training mode first, because many
        potentials detach their forces in evaluation mode. If that capture fails, the module is captured in evaluation
        mode, because some potentials compute forces only there.
        """
        try:
            return self._capture_in(not request.trains, request, mesh, planner)
        except CaptureError:
            if request.trains:
                raise
        return self._capture_in(False, request, mesh, planner)

    def _capture_in(
        self, training: bool, request: CaptureRequest, mesh: Mesh, planner: Planner
    ) -> tuple[Capture, _Example]:
        """Returns the capture, and inputs of the potential that all ranks need."""

        def step_time(costs: list[PhaseCosts]) -> float:
            return replace(planner, costs=tuple(costs)).step_time(request.num_microbatches)

        factories = self._factories(request, mesh, planner)
        measures_on_graph_ranks = bool(factories) and self._compiles and mesh.shape.graph > 1
        with request.ready(training), request.whole():
            examples = request.examples()
            evaluation, step = request.evaluation_step, with_batch(request.step)
            with as_world(mesh.alone_group):  # this rank alone runs the step now, with its collectives
                found = capture_module(
                    request.module,
                    step,
                    *examples,
                    placements(planner.name, planner.num_ranks),
                    self._potential,
                    phase_mode=PhaseMode(
                        defer=is_deferred(planner.name),
                        split_stages=is_unfolded(planner.name),
                        activation="keep" if self._compiles else self._usual_activation,
                        gradient_bytes=request.gradient_bytes,
                    ),
                    step_time=step_time,
                    evaluation_step=None if evaluation is None else with_batch(evaluation),
                    stages=self._stages,
                    cache=ProgramCache.default(),
                    activations={} if measures_on_graph_ranks else factories,
                    graph_size=mesh.shape.graph,
                    compiles=self._will_compile(request, mesh, planner.name),
                )
                call = found.potential, request.module, step, examples[1]
                inputs: Sequence[Tensor] = ()
                if mesh.shape.graph > 1:
                    try:
                        inputs = verify_sharding(*call, mesh.shape.graph, request.gradient_bytes)
                    except CaptureError as error:
                        raise CaptureError(f"{error}{found.alternative}") from error
                is_to_verify = bool(inputs)
                if is_to_verify and request.gradient_bytes is not None and mesh.shape.pipeline > 1:
                    raise CaptureError(
                        f"graph_size > 1 verifies the potential's own stages ({quoted(found.potential.path)}) on every "
                        "rank, whose memory its parameters and their gradients exceed. Use graph_size=1."
                    )
                is_to_measure = measures_on_graph_ranks and not is_to_verify
                if is_to_measure or (not inputs and self._measures_compiled(request, mesh)):
                    inputs = call_tensors(*call)
                return found, _Example([t.detach().cpu() for t in inputs], is_to_verify, is_to_measure)


def pipeline_links(mesh: Mesh) -> Links:
    """Returns the connections of this rank to the other ranks of its pipeline."""
    return Links(mesh.pipeline_rank, mesh.pipeline_ranks, mesh.down_group, mesh.up_group, mesh.device)


def _name(step: Callable[..., Any]) -> str:
    return getattr(step, "__name__", "")
