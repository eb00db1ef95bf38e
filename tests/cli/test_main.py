from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import get_args

import jsonargparse
import pytest
import yaml
from small_runs import DATA, EQUIVARIANT, MODEL, ONE_PROCESS, QUICKSTART, SMALL, SMALL_EMT, missing_arguments

import lightning_januspipe
from lightning_januspipe import strategy_class
from lightning_januspipe.bench.command import BENCHMARKS
from lightning_januspipe.cli.fit import FROM_DATA, POTENTIAL, arguments_from_data
from lightning_januspipe.cli.main import main, print_error
from lightning_januspipe.data import ASEDataModule, EMTDataModule, StructureDataModule
from lightning_januspipe.errors import CheckpointError
from lightning_januspipe.models import EquivariantPotential, PotentialModule
from lightning_januspipe.schedule.build_schedule import GENERATORS, ScheduleName

OF_EQUIVARIANT = list(FROM_DATA)
"""The arguments that the potential of the quickstart takes from the data."""


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_yaml(path: str, content: dict) -> str:
    Path(path).write_text(yaml.safe_dump(content))
    return path


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
            (["export", "best.ckpt"], "missing FILE (file to write: .pt2, or .pt for a model of metatomic)"),
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
        assert all(re.search(rf"^    {name} +[A-Z]", text, re.MULTILINE) for name in BENCHMARKS)

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
            assert missing_arguments(["fit", "--config", "printed.yaml"]) == OF_EQUIVARIANT


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
        assert missing_arguments(["fit", "--config", QUICKSTART]) == OF_EQUIVARIANT

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
        assert missing == [name for name in OF_EQUIVARIANT if name != "species"]

    @pytest.mark.parametrize("nested", [False, True])
    def test_those_in_a_second_file_are_given(self, nested: bool) -> None:
        content = {"model": {"init_args": {"potential": {"init_args": {"per_species_shift": {"Cu": -3.0}}}}}}
        if nested:
            whole = yaml.safe_load(Path(QUICKSTART).read_text())
            whole["model"]["init_args"]["potential"]["init_args"]["per_species_shift"] = {"Cu": -3.0}
            args = ["--config", write_yaml("whole.yaml", {"fit": whole}), "fit"]
        else:
            args = ["fit", "-c", QUICKSTART, f"--config={write_yaml('more.yaml', content)}"]
        assert missing_arguments(args) == [name for name in OF_EQUIVARIANT if name != "per_species_shift"]

    def test_files_of_parts(self) -> None:
        potential = {"class_path": EQUIVARIANT, "init_args": {"cutoff": 3.0}}
        model = write_yaml("model.yaml", {"class_path": MODEL, "init_args": {"potential": potential}})
        args = ["fit", "--model", model, "--data", DATA]
        assert missing_arguments(args) == [name for name in OF_EQUIVARIANT if name != "cutoff"]

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
        assert missing_arguments(args) == [name for name in OF_EQUIVARIANT if name != "cutoff"]


class TestArgumentsFromData:
    def test_values(self) -> None:
        data = EMTDataModule(num_train=6, num_val=1, num_test=1, sizes=[4], cutoff=4.0)
        statistics = data.statistics()
        values = arguments_from_data(data, 4.0, list(FROM_DATA))
        assert values == {
            "species": ["Cu", "Ni", "Al"],
            "cutoff": 4.0,
            "tasks": ["default"],
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
