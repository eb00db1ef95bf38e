"""Holds short runs of the recipes: options of the command line, and a command line that is parsed only."""

from __future__ import annotations

from pathlib import Path

from lightning_januspipe.cli.fit import PotentialCLI

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = str(ROOT / "recipes" / "quickstart.yaml")
EXTXYZ = str(ROOT / "recipes" / "extxyz.yaml")
FINETUNE = str(ROOT / "recipes" / "finetune.yaml")
RESUME = str(ROOT / "recipes" / "resume.yaml")
EQUIVARIANT = "lightning_januspipe.models.EquivariantPotential"
MODEL = "lightning_januspipe.models.PotentialModule"
DATA = "lightning_januspipe.data.EMTDataModule"

ONE_PROCESS = ["--trainer.strategy=auto", "--trainer.devices=1", "--trainer.accelerator=cpu"]
SMALL = ["--model.potential.num_layers=2", "--model.potential.num_features=4", "--model.potential.l_max=1"]
SMALL_EMT = ["--data.num_train=12", "--data.num_val=4", "--data.num_test=4", "--data.sizes=[4]", "--data.batch_size=4"]
QUIET = ["--trainer.enable_progress_bar=false"]
IN_ONE_PROCESS = ["--trainer.devices=1", "--trainer.strategy.pipeline_size=1"]


class ParsedOnly(PotentialCLI):
    """The command line parsed, with nothing made of it."""

    def before_instantiate_classes(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def missing_arguments(args: list[str]) -> list[str]:
    """The arguments of the potential that are left to the data."""
    return ParsedOnly(args)._missing
