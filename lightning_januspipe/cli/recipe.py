"""Makes the model and the data of a recipe as ``januspipe fit`` does, in one process and without training."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from typing_extensions import override

from lightning_januspipe.cli.fit import PotentialCLI
from lightning_januspipe.cli.plan_options import PlanArguments, add_plan_options
from lightning_januspipe.loader.examples import example_batches
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.split import require_samples, split_batches
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.plan.graph_share import GraphShare, Sharing
from lightning_januspipe.plan.measure import Measured, measure_stages
from lightning_januspipe.runtime.chosen_activations import activation_factories, candidates
from lightning_januspipe.runtime.state_share import levels_of
from lightning_januspipe.runtime.user_step import with_batch
from lightning_januspipe.schedule.state_actions import ShardLevel
from lightning_januspipe.strategy.precision import SUPPORTED

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser

_FEWEST_RANKS = 2


class PlanCLI(PotentialCLI):
    """Makes the model and the data of ``januspipe fit``, with a Trainer of one device that runs nothing.

    Args:
        args: The command line after ``plan``: the arguments of ``fit``, and those of the plan.

    Attributes:
        plan_arguments: The arguments of the plan.
        asked: The recipe's own arguments of the Trainer.
    """

    def __init__(self, args: Sequence[str]) -> None:
        super().__init__(args, run=False, prog="januspipe plan")

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of the plan to those of ``fit``."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(self.trainer_class, "fit", skip=set(self.subcommands()["fit"]))
        add_plan_options(parser)

    @override
    def before_instantiate_classes(self) -> None:
        """Keeps what the recipe asks of the Trainer, and replaces it by a Trainer of one device without callbacks."""
        self.plan_arguments = PlanArguments.read(self.config)
        super().before_instantiate_classes()
        trainer = self.config.trainer
        self.asked = trainer.clone()
        precision = str(trainer.precision or "32-true")
        if precision not in ("32", "64", *SUPPORTED):
            raise ValueError(f"precision={precision!r} is not available; use one of {', '.join(SUPPORTED)}")
        trainer.strategy, trainer.devices, trainer.num_nodes = "auto", 1, 1
        trainer.callbacks, trainer.logger = None, False
        trainer.enable_checkpointing = trainer.enable_progress_bar = trainer.enable_model_summary = False
        if trainer.accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
            warnings.warn(f"there is no {trainer.accelerator} here: times are those of the CPU", stacklevel=2)
            trainer.accelerator = "cpu"


@dataclass(frozen=True)
class StrategyArguments:
    """Holds the strategy's arguments in a recipe.

    Attributes:
        num_ranks: Ranks of the pipeline.
        num_microbatches: Micro-batches of a batch, or None for twice the ranks.
        potential: Dotted name of the potential, or None.
        memory_limit: Bytes, or None.
        wave_size: Micro-batches per wave, or "auto".
        schedule: Name of the schedule, or None where the strategy is another one.
        graph_size: Ranks that share the atoms of a micro-batch.
        num_processes: Processes of the Trainer.
        compiles: Whether phases are compiled.
        activation: What stages keep between phases, or "auto".
        num_sharing: Ranks that hold the same stages.
        shard: What these ranks share, or "auto".
        accumulates: Whether an optimizer step has several batches.
    """

    num_ranks: int
    num_microbatches: int | None = None
    potential: str | None = None
    memory_limit: float | None = None
    wave_size: Any = "auto"
    schedule: str | None = None
    graph_size: int = 1
    num_processes: int = 1
    compiles: bool = False
    activation: str = "auto"
    num_sharing: int = 1
    shard: ShardLevel | Literal["auto"] = "auto"
    accumulates: bool = False

    def levels(self, has_limit: bool) -> tuple[ShardLevel, ...]:
        """Returns what the ranks that hold the same stages may share, the simplest first."""
        return levels_of(self.shard, self.num_sharing, has_limit)

    def activations(self, has_limit: bool, device: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Returns the activations to measure, and those among them that the run may take, the fastest first.

        Args:
            has_limit: Whether there is a memory limit.
            device: Type of the device.
        """
        allowed = candidates(self.compiles, self.activation, device)
        if not self.compiles and not has_limit and self.activation not in ("recompute", "offload"):
            return (), ()
        shown = ("keep", *(["pointwise"] if self.compiles else []), "offload", "recompute")
        return tuple(name for name in shown if name != "offload" or name in allowed), allowed


def strategy_arguments(trainer: Any) -> StrategyArguments:
    """Returns the arguments of JanusPipeStrategy in a recipe; for another strategy, a pipeline over all devices.

    Args:
        trainer: The Trainer's arguments as a parsed configuration has them.

    Raises:
        ValueError: The product of the sizes is not the number of processes.
    """
    world = _num_devices(trainer.devices, trainer.accelerator) * int(trainer.num_nodes)
    strategy = trainer.strategy
    given: dict[str, Any] = {}
    if not isinstance(strategy, str) and str(strategy.class_path).endswith("JanusPipeStrategy"):
        given = vars(getattr(strategy, "init_args", None) or SimpleNamespace())
    shape = MeshShape.resolve(
        given.get("pipeline_size", "auto"), given.get("data_size", "auto"), given.get("graph_size", 1), world
    )
    num_microbatches, level = given.get("num_microbatches", "auto"), given.get("shard", "auto")
    spreads_experts = int(given.get("expert_size", 1)) > 1
    return StrategyArguments(
        max(shape.pipeline, _FEWEST_RANKS),
        None if num_microbatches == "auto" else int(num_microbatches),
        given.get("potential"),
        given.get("memory_limit"),
        given.get("wave_size", "auto"),
        given.get("schedule"),
        shape.graph,
        world,
        given.get("compile", False) is True,  # with "auto" training begins with eager phases
        given.get("activation", "auto"),
        shape.data * shape.graph,
        "none" if spreads_experts and level == "auto" else level,
        _accumulates(trainer),
    )


def _accumulates(trainer: Any) -> bool:
    """Returns whether an optimizer step has several batches, by the Trainer's argument or by a callback's."""
    callbacks = trainer.callbacks or []
    arguments = [getattr(c, "init_args", None) for c in (callbacks if isinstance(callbacks, list) else [callbacks])]
    schedules = [getattr(given, "scheduling", None) or {} for given in arguments]
    return max([trainer.accumulate_grad_batches or 1, *(n for found in schedules for n in found.values())]) > 1


def _num_devices(devices: Any, accelerator: str) -> int:
    if isinstance(devices, str) and devices.isdigit():
        return int(devices)
    if devices in ("auto", -1, "-1"):
        return max(torch.cuda.device_count(), 1) if accelerator != "cpu" else 1
    if isinstance(devices, str):
        return len([part for part in devices.split(",") if part.strip()])
    return len(devices) if isinstance(devices, (list, tuple)) else int(devices)


class Recipe:
    """Holds the model and the data of a recipe, ready to be captured.

    Args:
        args: The command line after ``plan``.

    Attributes:
        plan_arguments: The arguments of the plan.
        asked: What the recipe asks of the strategy.
        precision: The Trainer's precision, as in ``32-true``.

    Raises:
        ValueError: The recipe asks for what cannot be planned.
    """

    def __init__(self, args: Sequence[str]) -> None:
        with _quiet():
            cli = PlanCLI(args)
        self.plan_arguments, self.asked = cli.plan_arguments, strategy_arguments(cli.asked)
        self.precision = str(cli.trainer.precision)
        self._trainer, self._model, self._data = cli.trainer, cli.model, cli.datamodule
        plugin = self._trainer.strategy.precision_plugin
        self._trainer._data_connector.attach_data(self._model, datamodule=self._data)  # for its transfer hooks
        self._trainer.strategy.connect(self._model)
        self._trainer.training = True
        source = self._data if self._data is not None else self._model
        source.prepare_data()
        if self._data is not None:
            self._data.setup("fit")
        self._model.setup("fit")
        with plugin.module_init_context():
            self._model.configure_model()
        self._model = plugin.convert_module(self._model).to(self.device)
        self._model.train()
        loader = source.train_dataloader()
        if isinstance(loader, (list, tuple, dict)):
            raise ValueError("train_dataloader gives several loaders; one is supported")
        require_samples(loader)
        self._loader = loader

    @property
    def device(self) -> torch.device:
        """Returns the device on which times are measured."""
        return self._trainer.strategy.root_device

    @property
    def module_name(self) -> str:
        """Class of the LightningModule."""
        return type(self._model).__name__

    @property
    def batch_size(self) -> int | None:
        """Returns the number of samples in a batch; None where the loader does not know."""
        sampler = getattr(self._loader, "batch_sampler", None)
        return getattr(self._loader, "batch_size", None) or getattr(sampler, "batch_size", None)

    def examples(self, num_microbatches: int) -> tuple[Any, Any]:
        """Returns two batches as the strategy takes them for capture, the second about as large as a micro-batch."""
        traced, other = example_batches(self._loader, num_microbatches)
        return self._moved(traced), self._moved(other)

    def microbatches(self, num_microbatches: int, most: int) -> list[Any]:
        """Returns the first micro-batches of the first batch, as training would have them."""
        batch = next(iter(split_batches(self._loader, num_microbatches, required=False)))
        return [self._moved(one) for one in (list(batch)[:most] if isinstance(batch, MicroBatches) else [batch])]

    def sharing(self, measured: Measured, batches: Sequence[Any]) -> Sharing:
        """Returns what shards micro-batches of the potential over graph ranks."""
        with self._trainer.strategy.precision_plugin.train_step_context():
            return Sharing(self._model, with_batch(self._model.training_step), measured.potential, batches)

    def share(self, sharing: Sharing, num_ranks: int, known: GraphShare | None = None) -> GraphShare:
        """Returns the share of a graph rank; see :meth:`~lightning_januspipe.plan.graph_share.Sharing.share`."""
        with self._trainer.strategy.precision_plugin.train_step_context():
            return sharing.share(num_ranks, known)

    def potential(self, measured: Measured) -> nn.Module:
        """Returns the live potential."""
        return self._model.get_submodule(measured.potential.path)

    def measure(
        self,
        examples: tuple[Any, Any],
        placement: Sequence[int],
        *,
        or_fewer: bool = False,
        activations: Sequence[str] = (),
    ) -> Measured:
        """Captures and measures; see :func:`~lightning_januspipe.plan.measure.measure_stages`."""
        step = with_batch(self._model.training_step)
        # Times of phases are those of training: in the precision's dtype, with the random numbers as they are.
        with self._trainer.strategy.precision_plugin.train_step_context():
            return measure_stages(
                self._model,
                step,
                *examples,
                placement,
                self.asked.potential,
                repeats=self.plan_arguments.repeats,
                or_fewer=or_fewer,
                activations=partial(activation_factories, self.asked.compiles, activations, self.device.type),
                graph_size=self._most_graph_ranks(),
                compiles=self.asked.compiles,
            )

    def _most_graph_ranks(self) -> int:
        given = self.plan_arguments
        return max(self.asked.graph_size, *(given.graph_sizes or ((2,) if given.meshes else (1,))))

    def _moved(self, batch: Any) -> Any:
        strategy = self._trainer.strategy
        batch = strategy.precision_plugin.convert_input(batch)
        return strategy.batch_to_device(self._model._on_before_batch_transfer(batch, dataloader_idx=0))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Lightning from telling about devices and seeds, which are not used to train here."""
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if "lightning" in name]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
