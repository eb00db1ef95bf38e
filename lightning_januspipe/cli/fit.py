"""LightningCLI for potentials."""

from __future__ import annotations

import inspect
import io
import pkgutil
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from typing_extensions import override

from lightning_januspipe.callbacks import ErrorReport

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    try:
        from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    except ModuleNotFoundError:
        from pytorch_lightning.cli import LightningArgumentParser, LightningCLI


DESCRIPTION = """\
Train interatomic potentials in a pipeline of devices. Beside the subcommands below there are `januspipe plan`, which
tells before training what each schedule would give, `januspipe bench`, which measures this machine, and `januspipe
consolidate`, which makes one file of a checkpoint folder; see their own --help.
"""


POTENTIAL = "model.init_args.potential.init_args."


FROM_DATA: dict[str, Any] = {
    "species": [],
    "cutoff": 1.0,
    "avg_num_neighbors": 1.0,
    "per_species_scale": 1.0,
    "per_species_shift": 0.0,
}
"""Arguments of a potential that come from the data where they are left out, and what stands for them until then."""


class PotentialCLI(LightningCLI):
    """LightningCLI with any LightningModule and LightningDataModule, named by their class paths.

    Two additions:

    - Arguments in :data:`FROM_DATA` that a recipe leaves out of ``model.init_args.potential`` are taken from the data
      module, if it has ``species`` and ``statistics()``. The configuration that is saved with a run holds the values.
    - ``fit`` ends with a test, if the data has a test split, and a table of the errors.
    """

    def __init__(self, args: Sequence[str]) -> None:
        """Parse the arguments and run the subcommand.

        Args:
            args: The command line without the name of the program.
        """
        self._missing: list[str] = []
        self._data: Any = None
        self.report = ErrorReport(print_after_fit=False)
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            # All of the validation data before training, for the table.
            trainer_defaults={"callbacks": [self.report], "num_sanity_val_steps": -1},
            parser_kwargs={
                "prog": "januspipe",
                "description": DESCRIPTION,
                "allow_abbrev": False,  # missing_arguments needs full names
            },
            args=list(args),
        )

    @override
    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options of the report."""
        parser.add_argument(
            "--test_after_fit",
            type=Literal["best", "last", "no"],
            default="best",
            help="Weights to test when fit ends: those of the best checkpoint, those of the last step, or no test.",
        )

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse; where the data shall give arguments of the potential, let placeholders stand for them."""
        self._missing = missing_arguments(args)
        placeholders = [f"--{POTENTIAL}{name}={FROM_DATA[name]}" for name in self._missing]
        if not any(arg.startswith("--print_config") for arg in args):
            self.config = parser.parse_args([*args, *placeholders])
            return
        printed = io.StringIO()
        try:
            with redirect_stdout(printed):
                self.config = parser.parse_args([*args, *placeholders])
        finally:
            print(without_placeholders(printed.getvalue(), self._missing), end="")

    @override
    def before_instantiate_classes(self) -> None:
        """Replace the placeholders by what the data says."""
        if not self._missing:
            return
        config = self.config[self.config.subcommand].data
        parser = LightningArgumentParser()
        parser.add_lightning_class_args(self._datamodule_class, "data", subclass_mode=True)
        instantiate = getattr(parser, "instantiate", None) or parser.instantiate_classes  # older jsonargparse
        self._data = instantiate(parser.parse_object({"data": config})).data
        values = arguments_from_data(self._data, config.init_args.get("cutoff"), self._missing)
        for name, value in values.items():
            self.config[f"{self.config.subcommand}.{POTENTIAL}{name}"] = value

    @override
    def instantiate_classes(self) -> None:
        """Make model, data module and Trainer; a data module that was asked already has its data, and is kept."""
        super().instantiate_classes()
        if self._data is not None:
            self.datamodule = self._data

    def after_fit(self) -> None:
        """Test the trained weights and print the table of the errors."""
        weights = self.config.fit.test_after_fit
        if weights != "no" and self._has_test_data():
            has_best = bool(getattr(self.trainer.checkpoint_callback, "best_model_path", ""))
            self.trainer.test(
                self.model,
                datamodule=self.datamodule,
                ckpt_path="best" if weights == "best" and has_best else None,
                verbose=not self.report.errors.known(),  # the table shows what Lightning would print, in better units
            )
        self.report.print(self.trainer)

    def _has_test_data(self) -> bool:
        if self.datamodule is None:
            return False
        self.datamodule.setup("test")
        loaders = self.datamodule.test_dataloader()
        return bool(loaders) if isinstance(loaders, (list, tuple)) else True


def missing_arguments(args: Sequence[str]) -> list[str]:
    """Names in :data:`FROM_DATA` that the potential accepts and the command line and its files do not give.

    Args:
        args: The command line without the name of the program.
    """
    given = given_arguments(args)
    if "data" not in given or "model.potential.class_path" not in given:
        return []
    try:
        potential = pkgutil.resolve_name(str(given["model.potential.class_path"]))
        accepted = inspect.signature(potential).parameters
    except (ImportError, AttributeError, TypeError, ValueError):
        return []  # the parser says what is wrong with it
    return [
        name
        for name in FROM_DATA
        if name in accepted and not any(f"{key}.".startswith(f"model.potential.{name}.") for key in given)
    ]


def without_placeholders(config: str, names: Sequence[str]) -> str:
    """A printed configuration that leaves to the data what is left to it, and so can be used as a recipe.

    Args:
        config: YAML, in which arguments of the potential have placeholders.
        names: These arguments.
    """
    lines, path = [], list[tuple[int, str]]()
    for line in config.splitlines():
        indent, key = len(line) - len(line.lstrip()), line.strip().partition(":")[0]
        if key and not key.startswith(("#", "-")):
            path = [*((i, k) for i, k in path if i < indent), (indent, key)]
            dotted = ".".join(k for _, k in path)
            if dotted.removeprefix(POTENTIAL) in names and dotted.startswith(POTENTIAL):
                line = f"{' ' * indent}# {key}: taken from the data"
        lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def given_arguments(args: Sequence[str]) -> dict[str, Any]:
    """Model and data arguments of a command line and of the files that it names, by dotted key without ``init_args``.

    Args:
        args: The command line without the name of the program.
    """
    given: dict[str, Any] = {}
    position = 0
    while position < len(args):
        option, has_value, value = args[position].partition("=")
        position += 1
        if not option.startswith("-"):
            continue
        if not has_value and position < len(args) and not args[position].startswith("--"):
            value = args[position]
            position += 1
        key = "" if option in ("-c", "--config") else option.lstrip("-").removesuffix("+")
        if key.partition(".")[0] not in ("", "model", "data"):
            continue
        if Path(value).suffix in (".yaml", ".yml", ".json") and Path(value).is_file():
            content = yaml.safe_load(Path(value).read_text()) or {}
            subcommand = next((arg for arg in args if arg in PotentialCLI.subcommands()), "")
            if not key and isinstance(content.get(subcommand), dict):
                content = content[subcommand]
            _flatten(content, key, given)
        else:
            _flatten(value, key, given)
            _flatten(value, f"{key}.class_path", given)  # "--model CLASS" is short for "--model.class_path CLASS"
    return given


def _flatten(value: Any, key: str, into: dict[str, Any]) -> None:
    """Add a nested mapping under dotted keys, the mappings themselves included."""
    key = ".".join(part for part in key.split(".") if part != "init_args")
    into[key] = value
    if isinstance(value, Mapping):
        for name, item in value.items():
            _flatten(item, f"{key}.{name}" if key else str(name), into)


def arguments_from_data(data: Any, cutoff: float | None, names: Sequence[str]) -> dict[str, Any]:
    """Values of arguments of a potential.

    Args:
        data: Data module with ``species`` and ``statistics()``, such as a
            :class:`~lightning_januspipe.data.StructureDataModule`.
        cutoff: Cutoff of the data's neighbour lists in Å; None where it has none.
        names: Which of :data:`FROM_DATA` are asked for.

    Returns:
        Value by name: the species, the cutoff (Å), the edges per atom of the training data, the root mean square of
        its force components in eV/Å as the scale of atomic energies, and the energy per atom of each species (eV).

    Raises:
        ValueError: The data module cannot tell.
    """
    if not hasattr(data, "species") or not callable(getattr(data, "statistics", None)):
        raise ValueError(
            f"{type(data).__name__} has no species and statistics() to take {list(names)} of the potential from; give "
            "them under model.init_args.potential.init_args, or use a StructureDataModule"
        )
    if "cutoff" in names and cutoff is None:
        raise ValueError(
            f"{type(data).__name__} has no argument cutoff; give it under model.init_args.potential.init_args"
        )
    values: dict[str, Any] = {"species": list(data.species), "cutoff": cutoff}
    if set(names) - set(values):
        statistics = data.statistics()
        values["avg_num_neighbors"] = statistics.avg_num_neighbors or 1.0
        values["per_species_scale"] = statistics.force_rms or 1.0
        values["per_species_shift"] = list(statistics.energy_shifts)
    return {name: values[name] for name in names}
