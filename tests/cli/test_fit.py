from __future__ import annotations

import logging
import re
import shlex
import subprocess
import sys
import time
import warnings
from pathlib import Path

import ase.io
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from small_runs import (
    EXTXYZ,
    FINETUNE,
    IN_ONE_PROCESS,
    ONE_PROCESS,
    QUICKSTART,
    QUIET,
    RESUME,
    SMALL,
    SMALL_EMT,
    missing_arguments,
)

from lightning_januspipe.cli.fit import PotentialCLI
from lightning_januspipe.cli.main import main
from lightning_januspipe.data import emt_structures
from lightning_januspipe.models import PotentialModule


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def config_of(folder: str = ".") -> dict:
    return yaml.safe_load((Path(folder) / "lightning_logs" / "version_0" / "config.yaml").read_text())


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
        args += ["--trainer.callbacks+=test_fit.Stop", "--trainer.val_check_interval=2"]
        sys.modules.setdefault("test_fit", sys.modules[__name__])
        with pytest.raises(SystemExit):
            main(args)
        assert not [w for w in recwarn if "no last checkpoint" in str(w.message)]
        text = capsys.readouterr().out
        assert f"To go on: januspipe {shlex.join(args)} --ckpt_path saved/on_exception.ckpt" in text
        assert "force MAE (meV/Å)" in text and Path("saved/on_exception.ckpt").is_file()
        assert Path("config.yaml").read_text() == "mine" and not Path("config-2.yaml").exists()
        assert "max_epochs" in Path("saved/config.yaml").read_text()

    def test_a_run_that_is_refused_leaves_no_folder(self) -> None:
        """The logger has made one by then, with the configuration."""
        args = [*ONE_PROCESS, *SMALL, *SMALL_EMT, *QUIET, "--trainer.callbacks=EarlyStopping"]
        with pytest.raises(ValueError, match="val_nothing"):
            main(["fit", "--config", QUICKSTART, *args, "--trainer.callbacks.monitor=val_nothing"])
        assert not list(Path().iterdir())

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
