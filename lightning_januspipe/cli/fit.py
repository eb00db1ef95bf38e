"""Runs ``januspipe fit``, ``validate``, ``test`` and ``predict``: LightningCLI for potentials."""

from __future__ import annotations

import inspect
import pkgutil
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_only
from typing_extensions import override

import lightning_januspipe  # noqa: F401  (registers the strategy's names)
from lightning_januspipe.callbacks import (
    ErrorReport,
    EvaluationReport,
    NarrowProgressBar,
    PredictionWriter,
    StageSummary,
)
from lightning_januspipe.checkpoint.integrity import require_checkpoint
from lightning_januspipe.cli.parsers import RecipeParser
from lightning_januspipe.cli.run_config import RunConfig, remove_unused, run_folder
from lightning_januspipe.models import PotentialModule
from lightning_januspipe.strategy.ending import newest_checkpoint
from lightning_januspipe.strategy.quiet import NO_LAST, NOT_EMPTY, ignore_warnings

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import BasePredictionWriter, ModelSummary, RichModelSummary, RichProgressBar
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    try:
        from lightning.pytorch import Trainer
        from lightning.pytorch.callbacks import BasePredictionWriter, ModelSummary, RichModelSummary, RichProgressBar
        from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    except ModuleNotFoundError:
        from pytorch_lightning import Trainer
        from pytorch_lightning.callbacks import BasePredictionWriter, ModelSummary, RichModelSummary, RichProgressBar
        from pytorch_lightning.cli import LightningArgumentParser, LightningCLI


POTENTIAL = "model.init_args.potential.init_args"
"""Where the arguments of a potential stand in a configuration."""

FROM_DATA: dict[str, Any] = {
    "species": [],
    "cutoff": 1.0,
    "tasks": ["default"],
    "avg_num_neighbors": 1.0,
    "per_species_scale": 1.0,
    "per_species_shift": 0.0,
}
"""The arguments of a potential that come from the data where they are left out, and their values until then."""


class PotentialCLI(LightningCLI):
    """Adapts LightningCLI to any LightningModule and LightningDataModule, named by their class paths.

    Two things are added:

    - Arguments in :data:`FROM_DATA` that a recipe leaves out of ``model.init_args.potential`` are taken from the data
      module, if it has ``species`` and ``statistics()``. The configuration that is saved with a run holds the values.
    - ``fit`` ends with a test, if the data has a test split, and a table of the errors.

    Args:
        args: The command line without the name of the program.
        run: Whether the command line begins with a subcommand, which is run. Otherwise model, data and Trainer are
            made, and nothing is run.
        prog: The name of the program in messages.
    """

    LOGGER = Trainer.__module__.partition(".trainer")[0]
    """The name of Lightning's logger."""

    def __init__(self, args: Sequence[str], *, run: bool = True, prog: str = "januspipe") -> None:
        self._given = list(args)
        self._missing: list[str] = []
        self._data: Any = None
        self.report = ErrorReport(prints=False)
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=RunConfig,
            # All of the validation data before training, for the table.
            trainer_defaults={"callbacks": [self.report], "num_sanity_val_steps": -1},
            parser_kwargs={
                "prog": prog,
                "allow_abbrev": False,
                **{name: {"usage": f"{prog} {name} --config RECIPE [arguments]"} for name in self.subcommands()},
            },
            args=list(args),
            run=run,
        )

    @override
    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser, of the program or of a subcommand."""
        return RecipeParser(**kwargs)

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of the test."""
        parser.add_argument(
            "--test_after_fit",
            type=Literal["best", "last", "no"],
            default="best",
            help="Weights to test when fit ends: those of the best checkpoint, those of the last step, or no test.",
        )
        parser.add_argument(
            "--report",
            type=str,
            default="auto",
            help="Folder for tables and pictures of the test; auto: in the folder of the logger, no: none.",
        )

    @override
    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        """Makes the parser of a subcommand; that of ``predict`` has the option of its file."""
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.add_argument(
                "--output",
                type=str | None,
                default=None,
                help="File to write the predictions to, in a format that ASE knows by its ending, such as .extxyz.",
            )
        return parser

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the command line; placeholders stand for arguments of the potential that the data will give."""
        assert isinstance(parser, RecipeParser)
        given = parser.parse_given(args)
        self._missing = missing_arguments(given[given.subcommand] if "subcommand" in given else given)
        keys = {f"{POTENTIAL}.{name}": name for name in self._missing}
        parsers: Mapping[str, Any] = getattr(self, "_subcommand_parsers", {})
        for each in (parser, *parsers.values()):
            each.left_to_data = list(keys)
        self.config = parser.parse_args([*args, *(f"--{key}={FROM_DATA[name]}" for key, name in keys.items())])
        for each in (parser, *parsers.values()):
            each.left_to_data = ()
        path = self.arguments.get("ckpt_path")
        if path and Path(path).is_file():
            require_checkpoint(Path(path))

    @property
    def arguments(self) -> Any:
        """Returns the parsed arguments: of the subcommand, where there is one."""
        return self.config[self.config.subcommand] if "subcommand" in self.config else self.config

    @override
    def before_instantiate_classes(self) -> None:
        """Replaces the placeholders by values from the data."""
        if not self._missing:
            return
        config = self.arguments.data
        parser = RecipeParser()
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # older jsonargparse
        self._data = instantiate(parser.parse_object({"data": config})).data
        values = arguments_from_data(self._data, config.init_args.get("cutoff"), self._missing)
        for name, value in values.items():
            self.arguments[f"{POTENTIAL}.{name}"] = value

    @override
    def instantiate_classes(self) -> None:
        """Makes model, data module and Trainer; a data module that gave arguments has its data already, and is kept."""
        super().instantiate_classes()
        if self._data is not None:
            self.datamodule = self._data

    def after_fit(self) -> None:
        """Tests the trained weights and prints the table of the errors."""
        weights = self.arguments.test_after_fit
        if weights != "no" and self._has_test_data():
            best = getattr(self.trainer.checkpoint_callback, "best_model_path", "") or None
            self.trainer.test(
                self.model,
                datamodule=self.datamodule,
                ckpt_path=best if weights == "best" else None,
                verbose=not self.report.errors.known(),  # the table shows what Lightning would print, in better units
            )
        self.report.print(self.trainer)

    @override
    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the Trainer, with a narrow progress bar in place of Lightning's own, and what writes predictions."""
        trainer = super().instantiate_trainer(**kwargs)
        if self.config.get("subcommand") == "predict" and (output := self.arguments.get("output")):
            vars(trainer)["callbacks"].append(PredictionWriter(output))
        self._add_report(trainer)
        bar = trainer.progress_bar_callback
        callbacks: list[Any] = vars(trainer)["callbacks"]
        if type(bar) is RichProgressBar:
            callbacks[callbacks.index(bar)] = NarrowProgressBar()
        for index, callback in enumerate(callbacks):
            if type(callback) in (ModelSummary, RichModelSummary):  # these count the operations that they know: none
                callbacks[index] = StageSummary(callback._max_depth)
        return trainer

    def _add_report(self, trainer: Trainer) -> None:
        """Adds the report of the test, unless it is not wanted or the recipe has one."""
        report, command = self.arguments.report, self.config.get("subcommand")
        callbacks: list[Any] = vars(trainer)["callbacks"]
        if command not in ("fit", "test") or report == "no" or (report == "auto" and not trainer.loggers):
            return
        if isinstance(self.model, PotentialModule) and not any(isinstance(c, EvaluationReport) for c in callbacks):
            callbacks.append(EvaluationReport(None if report == "auto" else report, prints=command == "test"))

    @override
    def _run_subcommand(self, subcommand: str) -> None:
        """Runs the subcommand.

        If it is stopped, it says how to go on, and prints the errors that are known; a run that fails before its first
        step leaves no folder behind.
        """
        began = time.time()
        self._look_at_checkpoint(subcommand)
        try:
            super()._run_subcommand(subcommand)
        except Exception:
            if self.trainer.is_global_zero and not self.trainer.global_step:
                remove_unused(Path(run_folder(self.trainer)), Path(self.trainer.default_root_dir), began)
            raise
        except SystemExit:  # Ctrl-C and SIGTERM
            if subcommand == "fit" and self.trainer.is_global_zero:
                path, _ = newest_checkpoint(self.trainer, began)
                if path:
                    command = [*self._given, "--ckpt_path", path]
                    print(f"To go on: {shlex.join(['januspipe', *command])}", flush=True)
                if self.report.errors.known():
                    self.report.print(self.trainer)
            raise

    def _look_at_checkpoint(self, subcommand: str) -> None:
        """Says where untrained weights will be evaluated, and silences Lightning where a run is to resume."""
        path = self.arguments.get("ckpt_path")
        if subcommand == "fit":
            saves_last = any(getattr(callback, "save_last", None) for callback in self.trainer.checkpoint_callbacks)
            if path != "last" or saves_last:
                ignore_warnings(NO_LAST)
            if path:
                ignore_warnings(NOT_EMPTY)
        elif not path and isinstance(self.model, PotentialModule) and self.model.initial_weights is None:
            text = "no --ckpt_path is given, so the weights of the potential are untrained"
            rank_zero_only(print)(f"januspipe {subcommand}: warning: {text}", file=sys.stderr, flush=True)

    @override
    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Gives the arguments of a subcommand; the table of the errors replaces what Lightning would print."""
        found: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if "verbose" in found and isinstance(self.model, PotentialModule):
            found["verbose"] = False
        return found

    def after_validate(self) -> None:
        """Prints the errors."""
        self.report.print(self.trainer)

    def after_test(self) -> None:
        """Prints the errors."""
        self.report.print(self.trainer)

    def after_predict(self) -> None:
        """Says so if no callback has written the predictions."""
        callbacks = vars(self.trainer)["callbacks"]
        if not any(isinstance(callback, (PredictionWriter, BasePredictionWriter)) for callback in callbacks):
            text = "the predictions were not written; --output FILE, such as predictions.extxyz, writes them"
            rank_zero_only(print)(f"januspipe predict: {text}", flush=True)

    def _has_test_data(self) -> bool:
        if self.datamodule is None:
            return False
        self.datamodule.setup("test")
        loaders = self.datamodule.test_dataloader()
        return bool(loaders) if isinstance(loaders, (list, tuple)) else True


def missing_arguments(given: Any) -> list[str]:
    """Returns the names in :data:`FROM_DATA` that a potential accepts and that are not given to it.

    Args:
        given: A configuration without defaults, see :meth:`~lightning_januspipe.cli.parsers.RecipeParser.parse_given`.
    """
    path = given.get("model.init_args.potential.class_path")
    if path is None or given.get("data") is None:
        return []
    accepted = inspect.signature(pkgutil.resolve_name(path)).parameters
    return [name for name in FROM_DATA if name in accepted and f"{POTENTIAL}.{name}" not in given]


def arguments_from_data(data: Any, cutoff: float | None, names: Sequence[str]) -> dict[str, Any]:
    """Returns the values of arguments of a potential.

    Args:
        data: A data module with ``species`` and ``statistics()``, such as a
            :class:`~lightning_januspipe.data.StructureDataModule`.
        cutoff: Cutoff of the data's neighbour lists in Å; None where it has none.
        names: The wanted names out of :data:`FROM_DATA`.

    Returns:
        Value by name: the species, the cutoff (Å), the names of the tasks, the edges per atom of the training data, the
        root mean square of its force components in eV/Å as the scale of atomic energies, and the energy per atom of
        each species (eV), by task where the data has several.

    Raises:
        ValueError: The data module lacks one of them.
    """
    if not hasattr(data, "species") or not callable(getattr(data, "statistics", None)):
        raise ValueError(
            f"{type(data).__name__} has no species and statistics() to take {list(names)} of the potential from; give "
            f"them under {POTENTIAL}, or use a StructureDataModule"
        )
    if "cutoff" in names and cutoff is None:
        raise ValueError(f"{type(data).__name__} has no argument cutoff; give it under {POTENTIAL}")
    values: dict[str, Any] = {
        "species": list(data.species),
        "cutoff": cutoff,
        "tasks": list(getattr(data, "tasks", ())) or FROM_DATA["tasks"],
    }
    if set(names) - set(values):
        statistics = data.statistics()
        values["avg_num_neighbors"] = statistics.avg_num_neighbors or 1.0
        values["per_species_scale"] = statistics.force_rms or 1.0
        shifts = {task: list(energies) for task, energies in getattr(statistics, "task_shifts", {}).items()}
        values["per_species_shift"] = shifts or list(statistics.energy_shifts)
    return {name: values[name] for name in names}
