from __future__ import annotations

import inspect
import logging
import re
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import get_args

import ase.io
import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lightning_januspipe
from lightning_januspipe import strategy_class
from lightning_januspipe.bench.command import BENCHMARKS
from lightning_januspipe.cli.fit import FROM_DATA, POTENTIAL, PotentialCLI, arguments_from_data
from lightning_januspipe.cli.main import main, print_error
from lightning_januspipe.data import ASEDataModule, EMTDataModule, StructureDataModule, emt_structures
from lightning_januspipe.errors import CheckpointError
from lightning_januspipe.models import EquivariantPotential, PotentialModule
from lightning_januspipe.schedule.build_schedule import GENERATORS, ScheduleName

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


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_yaml(path: str, content: dict) -> str:
    Path(path).write_text(yaml.safe_dump(content))
    return path


def config_of(folder: str = ".") -> dict:
    return yaml.safe_load((Path(folder) / "lightning_logs" / "version_0" / "config.yaml").read_text())


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


class TestHelp:
    def test_lists_the_subcommands(self, capsys: pytest.CaptureFixture[str]) -> None:
        for args in (["--help"], []):
            with pytest.raises(SystemExit) as exit_info:
                main(args)
            assert exit_info.value.code == 0
            text = capsys.readouterr().out
            assert text.startswith("usage: januspipe ") and len(text.splitlines()) < 30
            for name in ("fit", "validate", "test", "predict", "plan", "bench", "init", "export", "consolidate"):
                assert re.search(rf"^    {name} +[A-Z]", text, re.MULTILINE), name

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["--version"])
        assert capsys.readouterr().out.split() == ["januspipe", lightning_januspipe.__version__]

    @pytest.mark.parametrize(
        ("args", "said"),
        [
            (["fti"], "invalid choice: 'fti' (choose from 'fit', "),
            (["fit", "--config", QUICKSTART, "--trainer.max_epoch=3"], "did you mean --trainer.max_epochs?"),
            (["fit", "--config", QUICKSTART, "--data.batch_sizes=3"], "did you mean batch_size?"),
            (
                ["fit", "--config", QUICKSTART, "--model.potential.num_layer=3"],
                "--model.potential: unknown argument num_layer of EquivariantPotential; did you mean num_layers?",
            ),
            (["fit", "--config", QUICKSTART, "--data=EMTDataModul"], "unknown class EMTDataModul; did you mean EMT"),
            (["fit", "--config", QUICKSTART, "--trainer.max_epochs=many"], "invalid value many; expected int or null"),
            (
                ["fit", "--config", QUICKSTART, "--data.batch_size=x"],
                "--data.batch_size: invalid value x; expected int",
            ),
            (["fit"], "missing --model; a recipe has it: --config RECIPE"),
            (["fit", "--data", "lightning_januspipe.data.ASEDataModule"], "missing --data.train_file"),
            (["fit", QUICKSTART], f"did you mean --config {QUICKSTART}?"),
            (["consolidate", "."], "is no checkpoint folder"),
            (["consolidate"], "missing FOLDER (checkpoint that was saved with save_distributed_checkpoint=True)"),
            (["export", "best.ckpt"], "missing FILE (file to write; its name ends in .pt2)"),
        ],
    )
    def test_a_wrong_argument_is_an_error_of_one_line(
        self, args: list[str], said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as exit_info:
            main(args)
        assert exit_info.value.code == 2
        text = capsys.readouterr().err
        assert said in text and text.startswith("januspipe") and text.count("\n") == 1

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"trainer": {"max_epoch": 3}}, "unknown key trainer.max_epoch; did you mean trainer.max_epochs?"),
            ({"trainr": {"max_epochs": 3}}, "unknown key trainr.max_epochs; did you mean trainer.max_epochs?"),
            ({"trainr": {"strategy": {"class_path": "x"}}}, "unknown key trainr; did you mean trainer?"),
            (
                {"trainer": {"strategi": {"hel": "x"}}},
                "unknown key trainer.strategi.hel; did you mean trainer.strategy?",
            ),
            (
                {"trainer": {"strategy": {"init_args": {"schedule": "wavezk"}}}},
                "--trainer.strategy.schedule: invalid value wavezk; expected one of 'gpipe', ",
            ),
            ({"trainer": {"strategy": {"init_args": {"schedule": "wavezk"}}}}, "; did you mean wavek?"),
            (
                {"trainer": {"callbacks": [{"class_path": "ModelCheckpont"}]}},
                "--trainer.callbacks: unknown class ModelCheckpont; did you mean ModelCheckpoint?",
            ),
            (
                {"trainer": {"callbacks": [{"class_path": "ModelCheckpoint", "init_args": {"monitr": "x"}}]}},
                "unknown argument monitr of ModelCheckpoint; did you mean monitor?",
            ),
        ],
    )
    def test_a_wrong_key_is_an_error_of_one_line(
        self, change: dict, said: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            main(["fit", "--config", QUICKSTART, "--config", write_yaml("change.yaml", change)])
        text = capsys.readouterr().err
        assert said in text and text.count("\n") == 1

    def test_a_file_that_is_no_yaml_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("bad.yaml").write_text("trainer:\n  max_epochs: 3\n   devices: 1\n")
        with pytest.raises(SystemExit):
            main(["fit", "--config", QUICKSTART, "--config", "bad.yaml"])
        text = capsys.readouterr().err
        assert 'this is no YAML: mapping values are not allowed in this context in "bad.yaml", line 3' in text
        assert text.count("\n") == 1

    def test_an_error_in_a_class_is_printed_without_its_types(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ValueError, match="Namespace") as raised:
            main(["fit", "--config", QUICKSTART, "--data.species", "[Cu, Xx]"])
        capsys.readouterr()
        print_error("januspipe fit", ValueError, raised.value, None)
        assert capsys.readouterr().err == (
            "januspipe fit: error: --data: species ['Cu', 'Xx'] holds ['Xx']; expected chemical symbols such as 'H' "
            "and 'Cu' (--debug prints where)\n"
        )

    def test_a_file_that_is_no_checkpoint_is_named(self, capsys: pytest.CaptureFixture[str]) -> None:
        Path("bad.ckpt").write_text("hello")
        with pytest.raises(CheckpointError, match=r"^bad.ckpt is no checkpoint") as raised:
            main(["test", "--config", QUICKSTART, *ONE_PROCESS, *SMALL, *SMALL_EMT, "--ckpt_path", "bad.ckpt"])
        capsys.readouterr()
        print_error("januspipe test", CheckpointError, raised.value, None)
        assert capsys.readouterr().err.startswith("januspipe test: error: bad.ckpt is no checkpoint")
        with pytest.raises(SystemExit):
            main(["export", "bad.ckpt", "model.pt2"])
        assert capsys.readouterr().err.startswith("januspipe export: error: bad.ckpt is no checkpoint")
        with pytest.raises(CheckpointError, match=r"^bad.ckpt is no checkpoint"):
            lightning_januspipe.load("bad.ckpt")

    def test_errors_of_users_have_no_traceback(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        print_error("januspipe fit", ValueError, ValueError("frame 3 has no energy"), None)
        assert capsys.readouterr().err == "januspipe fit: error: frame 3 has no energy (--debug prints where)\n"
        try:
            {}["nothing"]
        except KeyError as error:
            print_error("januspipe fit", KeyError, error, error.__traceback__)
        lines = capsys.readouterr().err.splitlines()
        assert lines[-1] == "KeyError: 'nothing'" and "test_main.py" in lines[0]
        monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
        monkeypatch.setenv("JANUSPIPE_DEBUG", "")
        monkeypatch.delenv("JANUSPIPE_DEBUG")
        for args, is_default in ((["--version", "--debug"], True), (["--version"], False)):
            with pytest.raises(SystemExit):
                main(args)
            assert (sys.excepthook is sys.__excepthook__) == is_default
            monkeypatch.delenv("JANUSPIPE_DEBUG", raising=False)

    @pytest.mark.parametrize("namespace", ["lightning", "pytorch_lightning"])
    def test_every_argument_of_the_strategy_is_explained(self, namespace: str) -> None:
        pytest.importorskip(namespace)
        explained(strategy_class(namespace))

    @pytest.mark.parametrize("cls", [PotentialModule, EquivariantPotential, EMTDataModule, ASEDataModule])
    def test_every_argument_of_models_and_data_is_explained(self, cls: type) -> None:
        explained(cls)

    def test_of_the_strategy(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["fit", "--trainer.strategy.help", "lightning_januspipe.JanusPipeStrategy"])
        text = " ".join(capsys.readouterr().out.split())
        assert "Trains a conservative potential on several devices: its layers in a pipeline" in text
        assert "--trainer.strategy.schedule {gpipe,1f1b-fold,1f1b-2nd,hanayo-2nd,wavek,wavek-zb} Order of" in text
        assert "default: wavek-zb)" in text and "(type: timedelta | float, default: 0:30:00)" in text
        assert get_args(ScheduleName) == tuple(GENERATORS)

    @pytest.mark.parametrize(("given", "said"), [("schedule=wavezb", "'wavek-zb'"), ("wave_size=2.5", "'auto'")])
    def test_wrong_values_are_refused(self, given: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", "--config", QUICKSTART, f"--trainer.strategy.{given}"])
        assert exit_info.value.code == 2
        assert said in capsys.readouterr().err

    def test_benchmarks_explain_their_options(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            main(["bench", "single", "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert "--cutoff CUTOFF Cutoff of the potential, in Å. (type: float, default: 5.0)" in text
        with pytest.raises(SystemExit):
            main(["bench", "--help"])
        text = capsys.readouterr().out
        assert all(re.search(rf"^    {name} +[A-Z]", text, re.MULTILINE) for name in (*BENCHMARKS, "emulate"))

    def test_printed_configurations_leave_to_the_data_what_is_left_to_it(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        for recipe in (QUICKSTART, "printed.yaml"):
            with pytest.raises(SystemExit) as exit_info:
                main(["fit", "--config", recipe, "--print_config"])
            assert exit_info.value.code == 0
            text = capsys.readouterr().out
            Path("printed.yaml").write_text(text)
            potential = yaml.safe_load(text)["model"]["init_args"]["potential"]["init_args"]
            assert not set(FROM_DATA) & set(potential) and potential["num_features"] == 16
            assert f"# {POTENTIAL}.cutoff: taken from the data" in text
            assert yaml.safe_load(text)["data"]["init_args"]["cutoff"] == 4.5
            assert missing_arguments(["fit", "--config", "printed.yaml"]) == list(FROM_DATA)


def explained(cls: type) -> None:
    """Assert that a command line tells the type, default and meaning of every argument of a class."""
    parser = jsonargparse.ArgumentParser()
    parser.add_class_arguments(cls, "cls")
    actions = {action.dest.removeprefix("cls."): action for action in parser._actions}
    own = [name for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD]
    assert set(own) <= set(actions)
    for name in [name for name, action in actions.items() if action.dest.startswith("cls.")]:
        text = str(actions[name].help)
        assert text[:1].isupper() or text[:1] in '"`', (name, text)
        assert len(text.split()) >= 3 and ":class:" not in text, (name, text)
        assert actions[name].metavar is not None or actions[name].choices or actions[name].option_strings, name


class TestMissingArguments:
    """Which arguments of the potential are left to the data."""

    def test_all_of_the_quickstart(self) -> None:
        assert missing_arguments(["fit", "--config", QUICKSTART]) == list(FROM_DATA)

    @pytest.mark.parametrize(
        "args",
        [
            ["--model.potential.species=[Cu]"],
            ["--model.potential.species", "[Cu]"],
            ["--model.init_args.potential.init_args.species=[Cu]"],
            ["--model.potential.species+=Cu"],
        ],
    )
    def test_those_on_the_command_line_are_given(self, args: list[str]) -> None:
        missing = missing_arguments(["fit", "--config", QUICKSTART, *args])
        assert missing == [name for name in FROM_DATA if name != "species"]

    @pytest.mark.parametrize("nested", [False, True])
    def test_those_in_a_second_file_are_given(self, nested: bool) -> None:
        content = {"model": {"init_args": {"potential": {"init_args": {"per_species_shift": {"Cu": -3.0}}}}}}
        if nested:
            whole = yaml.safe_load(Path(QUICKSTART).read_text())
            whole["model"]["init_args"]["potential"]["init_args"]["per_species_shift"] = {"Cu": -3.0}
            args = ["--config", write_yaml("whole.yaml", {"fit": whole}), "fit"]
        else:
            args = ["fit", "-c", QUICKSTART, f"--config={write_yaml('more.yaml', content)}"]
        assert missing_arguments(args) == [name for name in FROM_DATA if name != "per_species_shift"]

    def test_files_of_parts(self) -> None:
        potential = {"class_path": EQUIVARIANT, "init_args": {"cutoff": 3.0}}
        model = write_yaml("model.yaml", {"class_path": MODEL, "init_args": {"potential": potential}})
        args = ["fit", "--model", model, "--data", DATA]
        assert missing_arguments(args) == [name for name in FROM_DATA if name != "cutoff"]

    def test_other_potentials_get_nothing(self) -> None:
        linear = ["--model.potential=torch.nn.Linear", "--model.potential.in_features=1"]
        assert (
            missing_arguments(["fit", "--model", MODEL, *linear, "--model.potential.out_features=1", "--data", DATA])
            == []
        )

    def test_a_potential_that_is_not_there_is_an_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_info:
            main(["fit", "--model", MODEL, "--model.potential", "no.such.module", "--data", DATA])
        assert exit_info.value.code == 2 and "no.such.module" in capsys.readouterr().err

    def test_no_potential_or_no_data(self) -> None:
        given = [
            "--model.potential.species=[Cu]",
            "--model.potential.cutoff=4",
            "--model.potential.avg_num_neighbors=9",
        ]
        assert missing_arguments(["fit", "--model", "lightning.pytorch.demos.BoringModel", "--data", DATA]) == []
        assert missing_arguments(["fit", "--model", MODEL, "--model.potential", EQUIVARIANT, *given]) == []

    def test_flags_without_value_hide_nothing(self) -> None:
        args = [
            "fit",
            "--config",
            QUICKSTART,
            "--trainer.enable_progress_bar",
            "false",
            "--model.potential.cutoff",
            "1.5",
        ]
        assert missing_arguments(args) == [name for name in FROM_DATA if name != "cutoff"]


class TestArgumentsFromData:
    def test_values(self) -> None:
        data = EMTDataModule(num_train=6, num_val=1, num_test=1, sizes=[4], cutoff=4.0)
        statistics = data.statistics()
        values = arguments_from_data(data, 4.0, list(FROM_DATA))
        assert values == {
            "species": ["Cu", "Ni", "Al"],
            "cutoff": 4.0,
            "avg_num_neighbors": statistics.avg_num_neighbors,
            "per_species_scale": statistics.force_rms,
            "per_species_shift": list(statistics.energy_shifts),
        }

    def test_statistics_are_computed_only_where_needed(self) -> None:
        class NoStatistics(StructureDataModule):
            @property
            def species(self) -> list[str]:
                return ["Cu"]

            def statistics(self):
                raise AssertionError

        data = NoStatistics(batch_size=1)
        assert arguments_from_data(data, 4.0, ["species", "cutoff"]) == {"species": ["Cu"], "cutoff": 4.0}

    def test_refuses_data_that_cannot_tell(self) -> None:
        with pytest.raises(ValueError, match="object has no species"):
            arguments_from_data(object(), 4.0, ["species"])
        with pytest.raises(ValueError, match="no argument cutoff"):
            arguments_from_data(EMTDataModule(), None, ["cutoff"])


class Stop(Callback):
    """Stops the run after three steps, as on SIGTERM."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 3:
            raise SIGTERMException


class TestFit:
    def test_a_run_that_is_stopped_says_how_to_go_on(
        self, capsys: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
    ) -> None:
        """The user's config.yaml stays as it is, and the run's own lies beside its checkpoints."""
        Path("config.yaml").write_text("mine")
        args = ["fit", "--config", QUICKSTART, *ONE_PROCESS, *SMALL, *SMALL_EMT, *QUIET, "--trainer.logger=false"]
        args += ["--trainer.callbacks=OnExceptionCheckpoint", "--trainer.callbacks.dirpath=saved"]
        args += ["--trainer.callbacks+=test_main.Stop", "--trainer.val_check_interval=2"]
        sys.modules.setdefault("test_main", sys.modules[__name__])
        with pytest.raises(SystemExit):
            main(args)
        assert not [w for w in recwarn if "no last checkpoint" in str(w.message)]
        text = capsys.readouterr().out
        assert f"To go on: januspipe {shlex.join(args)} --ckpt_path saved/on_exception.ckpt" in text
        assert "force MAE (meV/Å)" in text and Path("saved/on_exception.ckpt").is_file()
        assert Path("config.yaml").read_text() == "mine" and not Path("config-2.yaml").exists()
        assert "max_epochs" in Path("saved/config.yaml").read_text()

    def test_quickstart_in_one_process(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = [*ONE_PROCESS, *SMALL, *SMALL_EMT, *QUIET]
        cli = PotentialCLI(["fit", "--config", QUICKSTART, *args, "--trainer.max_epochs=3", "--data.cutoff=3.5"])

        # The data's values are in the potential and in the saved configuration.
        statistics = cli.datamodule.statistics()
        potential = config_of()["model"]["init_args"]["potential"]["init_args"]
        assert potential["species"] == ["Cu", "Ni", "Al"]
        assert potential["cutoff"] == 3.5 == cli.model.potential.cutoff
        assert potential["avg_num_neighbors"] == statistics.avg_num_neighbors
        assert potential["per_species_shift"] == list(statistics.energy_shifts)
        assert cli.model.potential.energy_model.shift.tolist() == pytest.approx(statistics.energy_shifts)
        assert cli.model.potential.energy_model.scale.tolist() == pytest.approx([statistics.force_rms] * 3)

        # The table shows what was measured: untrained, trained, and on the test data.
        errors = cli.report.errors
        assert errors.before["forces_mae"] > 0 and errors.test["forces_mae"] > 0
        assert errors.after["forces_mae"] != errors.before["forces_mae"]
        text = capsys.readouterr().out
        for value in (errors.before, errors.after, errors.test):
            assert f"{1000 * value['forces_mae']:.3g}" in text
        checkpoint = Path("lightning_logs/version_0/checkpoints/best.ckpt").absolute()
        assert checkpoint.is_file() and f"Checkpoint: {checkpoint}" in text
        assert "test: test data, weights of best.ckpt" in text

        # The saved configuration and the checkpoint give the same test errors again, in the recipe's place.
        config = "lightning_logs/version_0/config.yaml"
        again = PotentialCLI(["test", "--config", config, "--ckpt_path", str(checkpoint)])
        assert again.report.errors.test == pytest.approx(errors.test)
        text, warned = capsys.readouterr()
        assert "force MAE (meV/Å)" in text and "test_forces_mae" not in text and "untrained" not in warned
        PotentialCLI(["validate", "--config", config, "--ckpt_path", str(checkpoint)])
        text = capsys.readouterr().out
        assert "validation" in text and "stress RMSE (meV/Å³)" in text and "val_forces_mae" not in text
        assert missing_arguments(["test", "--config", config]) == []

        # A file of predictions has the same errors.
        PotentialCLI(["predict", "--config", config, "--ckpt_path", str(checkpoint), "--output", "out.extxyz"])
        text = capsys.readouterr().out
        assert f"{1000 * errors.test['forces_mae']:.3g} / {1000 * errors.test['forces_rmse']:.3g}" in text
        found = ase.io.read("out.extxyz", index=":")
        assert len(found) == len(cli.datamodule.dataset("test")) and "given_energy" in found[0].info
        assert "were not written" not in text

        # Without a checkpoint and without a file, it says so.
        PotentialCLI(["predict", "--config", config])
        text, warned = capsys.readouterr()
        assert text.splitlines()[-1].startswith("januspipe predict: the predictions were not written; --output FILE")
        line = "januspipe predict: warning: no --ckpt_path is given, so the weights of the potential are untrained\n"
        assert line in warned

    def test_file_of_structures(self) -> None:
        ase.io.write("my.extxyz", emt_structures(12, species=["Cu", "Al"], sizes=[4]), format="extxyz")
        args = [*ONE_PROCESS, *SMALL, *QUIET, "--trainer.max_epochs=1", "--trainer.num_sanity_val_steps=0"]
        cli = PotentialCLI(
            ["fit", "--config", EXTXYZ, "--data.train_file", "my.extxyz", "--test_after_fit", "no", *args]
        )
        assert cli.model.potential.species == ("Al", "Cu")
        assert not cli.report.errors.before and not cli.report.errors.test
        assert cli.report.errors.after["forces_mae"] > 0
        assert cli.config.fit.data.init_args.train_file == "my.extxyz"

    def test_explicit_values_win(self) -> None:
        given = ["--model.potential.species=[Cu, Al, Ni]", "--model.potential.per_species_shift=[1.0, 2.0, 3.0]"]
        args = [*ONE_PROCESS, *SMALL, *SMALL_EMT, *QUIET, *given, "--trainer.fast_dev_run=true", "--data.species=[Cu]"]
        cli = PotentialCLI(["fit", "--config", QUICKSTART, *args])
        assert cli.model.potential.species == ("Cu", "Al", "Ni")
        assert cli.model.potential.energy_model.shift.tolist() == [1.0, 2.0, 3.0]

    def test_without_test_data(self) -> None:
        args = [*ONE_PROCESS, *SMALL, *SMALL_EMT, *QUIET, "--data.num_test=0", "--trainer.max_epochs=1"]
        cli = PotentialCLI(["fit", "--config", QUICKSTART, *args])
        assert not cli.report.errors.test and cli.report.errors.after


IN_ONE_PROCESS = ["--trainer.devices=1", "--trainer.strategy.pipeline_size=1"]


def test_finetune(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe starts from the weights and with the potential of an earlier run, and trains its last layers."""
    args = [*IN_ONE_PROCESS, *QUIET, *SMALL_EMT, "--trainer.max_epochs=2"]
    first = PotentialCLI(["fit", "--config", QUICKSTART, *SMALL, *args])
    config = "lightning_logs/version_0/config.yaml"
    caplog.set_level(logging.INFO)
    second = PotentialCLI(["fit", "--config", config, "--config", FINETUNE, *args, "--test_after_fit=last"])
    parameters = dict(second.model.potential.named_parameters())
    num_frozen = sum(p.numel() for p in parameters.values() if not p.requires_grad)
    said = [record.getMessage() for record in caplog.records]
    assert said.count("weights of lightning_logs/version_0/checkpoints/best.ckpt loaded") == 1
    num = sum(p.numel() for p in parameters.values())
    assert said.count(f"frozen: embedding, layers.0 ({num_frozen:,} of {num:,} parameters)") == 1
    assert 0 < num_frozen < num
    capsys.readouterr()
    PotentialCLI(["validate", "--config", config, "--config", FINETUNE, *args])
    assert "untrained" not in capsys.readouterr().err

    old = torch.load("lightning_logs/version_0/checkpoints/best.ckpt", weights_only=True)["state_dict"]
    new = second.model.state_dict()
    same = {name for name in new if torch.equal(new[name], old[name])}
    frozen = {name for name, _ in second.model.named_parameters() if "embedding" in name or "layers.0." in name}
    trained = {name for name, _ in second.model.named_parameters()} - frozen
    assert frozen and frozen <= same and not trained & same
    assert second.model.potential.avg_num_neighbors == first.model.potential.avg_num_neighbors
    assert second.datamodule.statistics().avg_num_neighbors != first.datamodule.statistics().avg_num_neighbors
    assert second.config.fit.data.init_args.strain == 0.08 and second.config.fit.data.init_args.cutoff == 4.5
    assert second.report.errors.before["forces_mae"] != first.report.errors.before["forces_mae"]


def test_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe, stopped in the middle of an epoch and started again, ends as one that was never stopped."""
    args = ["fit", "--config", RESUME, *IN_ONE_PROCESS, *SMALL, *SMALL_EMT, *QUIET, "--trainer.max_epochs=3"]
    Path("whole").mkdir()
    monkeypatch.chdir("whole")
    whole = PotentialCLI(args)
    monkeypatch.chdir("..")

    step = PotentialModule.training_step
    steps: set[int] = set()

    def stopped_once(module: PotentialModule, batch, batch_idx: int):
        if module.trainer.global_step == 5 and not Path("resumable/on_exception.ckpt").exists():
            raise RuntimeError("stopped")
        steps.add(module.trainer.global_step)
        return step(module, batch, batch_idx)

    monkeypatch.setattr(PotentialModule, "training_step", stopped_once)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="stopped"):
            PotentialCLI(args)
        assert steps == {0, 1, 2, 3, 4}
        steps.clear()
        resumed = PotentialCLI(args)
    assert not [w for w in warned if re.search("last checkpoint|not empty", str(w.message))]
    assert steps == {5, 6, 7, 8}
    assert resumed.trainer.global_step == whole.trainer.global_step == 9
    assert not Path("resumable/on_exception.ckpt").exists()
    best = [torch.load(f"{f}/resumable/best.ckpt", weights_only=True)["state_dict"] for f in (".", "whole")]
    torch.testing.assert_close(best[0], best[1], rtol=1e-5, atol=1e-6)
    assert resumed.report.errors.test == pytest.approx(whole.report.errors.test, rel=1e-4)


@pytest.mark.slow
def test_resume_two_processes() -> None:
    """Killed while it trains, the same command goes on from the last checkpoint."""
    args = ["fit", "--config", RESUME, *SMALL, *SMALL_EMT, *QUIET, "--trainer.max_epochs=12"]  # 36 steps
    command = [sys.executable, "-m", "lightning_januspipe.cli", *args]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not Path("resumable/last.ckpt").exists() and process.poll() is None:
            time.sleep(0.1)
        process.kill()
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "Restored all states from the checkpoint at" in done.stderr
    assert done.stdout.count("Checkpoint: ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["module", "script"])
def test_two_processes(launch: str) -> None:
    """The Trainer starts the second process by running the command line again; the table is printed once."""
    command = [sys.executable, "-m", "lightning_januspipe.cli"]
    if launch == "script":  # what an installed entry point looks like
        Path("januspipe").write_text(
            "import sys\nfrom lightning_januspipe.cli.main import main, print_error\nsys.exit(main())\n"
        )
        command = [sys.executable, "januspipe"]
    args = ["fit", "--config", QUICKSTART, *SMALL, *SMALL_EMT, *QUIET, "--trainer.max_epochs=1"]
    done = subprocess.run([*command, *args], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("× better") + done.stdout.count("× worse") >= 2  # the table and the sentence
    assert done.stdout.count("Checkpoint: ") == 1
    assert Path("lightning_logs/version_0/checkpoints/best.ckpt").is_file()
    assert "WORLD_SIZE: 2" in done.stderr or "2 processes" in done.stderr
