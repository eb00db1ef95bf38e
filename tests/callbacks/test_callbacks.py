from __future__ import annotations

import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from rich.console import Console
from torch.utils.data import DataLoader

from lightning_januspipe import callbacks, keys
from lightning_januspipe.callbacks import (
    ErrorReport,
    Errors,
    NarrowProgressBar,
    Throughput,
    count_atoms,
    count_structures,
    describe_change,
    error_table,
)
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.testing import quiet_trainer


def make_batch(num_atoms: int = 5, num_structures: int = 2) -> dict[str, torch.Tensor]:
    structure = torch.arange(num_atoms) * num_structures // num_atoms
    return {
        keys.POSITIONS: torch.zeros(num_atoms, 3),
        keys.BATCH: structure,
        keys.CELL: torch.zeros(num_structures, 3, 3),
    }


def render(renderable) -> str:
    console = Console(width=100)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


class TestCounts:
    def test_dict(self) -> None:
        assert (count_atoms(make_batch()), count_structures(make_batch())) == (5, 2)

    def test_micro_batches_are_summed(self) -> None:
        batch = MicroBatches([make_batch(5, 2), make_batch(7, 3)], [2, 3])
        assert (count_atoms(batch), count_structures(batch)) == (12, 5)

    def test_structures_without_cell(self) -> None:
        batch = make_batch(6, 3)
        del batch[keys.CELL]
        assert count_structures(batch) == 3

    def test_graph_object(self) -> None:
        batch = SimpleNamespace(pos=torch.zeros(4, 3), num_graphs=2)
        assert (count_atoms(batch), count_structures(batch)) == (4, 2)

    @pytest.mark.parametrize(
        "batch",
        [
            {"_positions": torch.zeros(4, 3), "_idx_m": torch.tensor([0, 0, 1, 1]), "_cell": torch.zeros(2, 3, 3)},
            {"_positions": torch.zeros(4, 3), "_idx_m": torch.tensor([0, 0, 1, 1])},
            SimpleNamespace(positions=torch.zeros(4, 3), cell=torch.zeros(6, 3), num_graphs=2),
            (SimpleNamespace(pos=torch.zeros(4, 3), batch=torch.tensor([0, 0, 1, 1])), torch.zeros(2), None),
        ],
        ids=["underscores", "indices", "cells in one matrix", "a graph in a tuple"],
    )
    def test_formats_of_others(self, batch: object) -> None:
        assert (count_atoms(batch), count_structures(batch)) == (4, 2)

    def test_other_formats_do_not_fail(self) -> None:
        assert (count_atoms({"x": torch.zeros(3)}), count_structures({"x": torch.zeros(3)})) == (0, 1)
        assert count_atoms([torch.zeros(3, 3)]) == 0


class Module(LightningModule):
    """A module with one parameter, whose validation errors are those in a list."""

    def __init__(self, force_errors: list[float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.force_errors = list(force_errors)

    def training_step(self, batch, batch_idx):
        return (self.weight * batch[keys.POSITIONS].sum()).square().sum()

    def validation_step(self, batch, batch_idx) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log("val_forces_mae", self.force_errors.pop(0))
        self.log("val_loss", 1.0)

    def test_step(self, batch, batch_idx) -> None:
        self.log("test_forces_mae", 0.05)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def make_trainer(*given, **options) -> Trainer:
    return quiet_trainer(**{"callbacks": list(given), "max_epochs": 1, **options})


def make_loader(num_batches: int) -> DataLoader:
    return DataLoader([make_batch() for _ in range(num_batches)], batch_size=None)


class TestThroughput:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> list[float]:
        """The time in seconds, which only the test moves."""
        now = [100.0]
        monkeypatch.setattr(time, "perf_counter", lambda: now[0])
        return now

    @pytest.fixture
    def logged(self) -> dict[str, float]:
        return {}

    @pytest.fixture
    def step(self, clock, logged):
        """Function that runs one batch of a number of seconds through the hooks."""
        trainer = SimpleNamespace(world_size=3)
        module = SimpleNamespace(log=lambda name, value, **options: logged.update({name: value}))

        def run(callback: Throughput, seconds: float, batch=None) -> None:
            batch = make_batch() if batch is None else batch
            callback.on_train_batch_start(trainer, module, batch, 0)
            clock[0] += seconds
            callback.on_train_batch_end(trainer, module, None, batch, 0)

        return run

    def test_counts_all_replicas_and_not_the_first_batch(self, step, logged) -> None:
        callback = Throughput()
        step(callback, 1000.0)
        assert not logged
        step(callback, 0.5)
        step(callback, 1.5)
        assert logged["atoms_per_s"] == pytest.approx(3 * 10 / 2.0)
        assert logged["structures_per_s"] == pytest.approx(3 * 4 / 2.0)

    def test_window_moves(self, step, logged) -> None:
        callback = Throughput(window=2)
        for seconds in (1.0, 100.0, 1.0, 1.0):
            step(callback, seconds)
        assert logged["atoms_per_s"] == pytest.approx(3 * 5 / 1.0)

    def test_validation_is_left_out_and_loading_is_not(self, step, clock, logged) -> None:
        callback = Throughput()
        step(callback, 1.0)
        clock[0] += 500.0
        callback.on_validation_end(None, None)
        step(callback, 1.0)
        assert logged["atoms_per_s"] == pytest.approx(3 * 5 / 1.0)
        clock[0] += 3.0
        step(callback, 1.0)
        assert logged["atoms_per_s"] == pytest.approx(3 * 10 / 5.0)

    def test_micro_batches(self, step, logged) -> None:
        callback = Throughput()
        batch = MicroBatches([make_batch(5, 2), make_batch(7, 3)], [2, 3])
        step(callback, 1.0, batch)
        step(callback, 1.0, batch)
        assert (logged["atoms_per_s"], logged["structures_per_s"]) == (pytest.approx(36.0), pytest.approx(15.0))

    def test_in_a_trainer(self) -> None:
        trainer = make_trainer(Throughput(), limit_val_batches=0)
        trainer.fit(Module([]), make_loader(3))
        metrics = trainer.callback_metrics
        assert metrics["atoms_per_s"] > 0 and set(trainer.progress_bar_metrics) == {"atoms_per_s"}
        assert metrics["atoms_per_s"] / metrics["structures_per_s"] == pytest.approx(2.5)

    def test_rejects_an_empty_window(self) -> None:
        with pytest.raises(ValueError, match="window=0"):
            Throughput(window=0)


class TestErrorReport:
    def test_collects_before_after_and_test(self) -> None:
        report = ErrorReport(prints=False)
        trainer = make_trainer(report, max_epochs=2, num_sanity_val_steps=-1)
        module = Module([0.6, 0.3, 0.1])
        trainer.fit(module, make_loader(1), make_loader(3))
        trainer.test(module, make_loader(1), verbose=False)
        assert report.errors.before == pytest.approx({"forces_mae": 0.6, "loss": 1.0})
        assert report.errors.after == pytest.approx({"forces_mae": 0.1, "loss": 1.0})
        assert report.errors.test == pytest.approx({"forces_mae": 0.05}) and report.errors.tested == ""
        assert not report.errors.before_is_partial

    def test_knows_which_checkpoint_was_tested(self, tmp_path: Path) -> None:
        report = ErrorReport(prints=False)
        trainer = make_trainer(report, num_sanity_val_steps=-1)
        module = Module([0.6, 0.3])
        trainer.fit(module, make_loader(1), make_loader(1))
        trainer.save_checkpoint(tmp_path / "best.ckpt")
        trainer.test(module, make_loader(1), ckpt_path=str(tmp_path / "best.ckpt"), verbose=False)
        assert report.errors.tested == "best.ckpt"
        trainer.test(module, make_loader(1), verbose=False)
        assert report.errors.tested == ""

    def test_knows_that_the_first_batches_are_not_all(self) -> None:
        report = ErrorReport(prints=False)
        trainer = make_trainer(report, num_sanity_val_steps=2)
        trainer.fit(Module([0.6, 0.3]), make_loader(1), make_loader(3))
        assert report.errors.before_is_partial

    def test_prints_after_fit_on_the_first_process_only(self, capsys: pytest.CaptureFixture[str]) -> None:
        report = ErrorReport()
        trainer = make_trainer(report, num_sanity_val_steps=-1)
        trainer.fit(Module([0.6, 0.15]), make_loader(1), make_loader(1))
        assert "600 → 150 meV/Å, 4.00× better" in capsys.readouterr().out
        report.print(SimpleNamespace(is_global_zero=False))  # type: ignore[arg-type]
        assert not capsys.readouterr().out

    def test_validate_and_test_print_their_errors_with_units(self, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = make_trainer(ErrorReport())
        trainer.validate(Module([0.6]), make_loader(1), verbose=False)
        assert "force MAE (meV/Å)" in (text := capsys.readouterr().out) and "600" in text
        trainer.test(Module([]), make_loader(1), verbose=False)
        assert "50.0" in capsys.readouterr().out

    def test_quantities_without_labels_or_weight_have_no_row(self) -> None:
        report = ErrorReport(prints=False)
        module = Module([math.nan])
        make_trainer(report).validate(module, make_loader(1), verbose=False)
        assert report.errors.validation == {"loss": 1.0}
        module = Module([0.5, 0.5])
        module.weights = {"forces": 0.0}
        make_trainer(report).validate(module, make_loader(1), verbose=False)
        assert not report.errors.known()
        module.weights = {"forces": 1.0}
        make_trainer(report).validate(module, make_loader(1), verbose=False)
        assert report.errors.validation["forces_mae"] == 0.5


class TestProgressBar:
    @pytest.mark.filterwarnings("ignore")
    def test_one_line_of_80_columns(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        class Logged(Module):
            def training_step(self, batch, batch_idx):
                for name in ("train_loss", "val_loss", "atoms_per_s", "structures_per_s", "other"):
                    self.log(name, 123456.789 if name == "atoms_per_s" else 0.000123456, prog_bar=True)
                return super().training_step(batch, batch_idx)

        monkeypatch.setenv("COLUMNS", "80")
        bar = NarrowProgressBar(console_kwargs={"width": 80, "force_terminal": True, "color_system": None})
        trainer = make_trainer(bar, enable_progress_bar=True, max_epochs=1000, max_steps=3, limit_val_batches=0)
        trainer.fit(Logged([]), make_loader(2))
        lines = [line for line in re.split(r"[\r\n]", capsys.readouterr().out) if "Epoch" in line]
        (last,) = {line.rstrip() for line in lines if "1/2" in line and "atoms/s" in line and "Epoch 1" in line}
        text = re.sub(r"\x1b\[[\d?;]*[a-zA-Z]", "", last)
        assert len(text) <= 80
        assert "loss: 0.000123 val: 0.000123 atoms/s: 123457" in text
        assert "other" not in text and "v_num" not in text


class TestTable:
    def test_units_ratio_and_missing_values(self) -> None:
        errors = Errors(
            before={"forces_mae": 0.5, "energy_mae": 0.0123456, "loss": 3.0},
            after={"forces_mae": 0.1, "energy_mae": math.nan},
            test={"forces_mae": 0.2, "stress_rmse": 0.004},
        )
        rows = [line for line in render(error_table(errors)).splitlines() if line.startswith("│")]
        lines = [line.strip("│").split("│") for line in rows]
        assert {label.strip(): [cell.strip() for cell in cells] for label, *cells in lines} == {
            "energy MAE (meV/atom)": ["12.3", "–", "–", "–"],
            "force MAE (meV/Å)": ["500", "100", "5.00× better", "200"],
            "stress RMSE (meV/Å³)": ["–", "–", "–", "4.00"],
        }

    def test_an_error_that_grew_is_red(self) -> None:
        table = error_table(Errors({"forces_mae": 0.1, "energy_mae": 0.2}, {"forces_mae": 0.75, "energy_mae": 0.1}))
        console = Console(width=100, force_terminal=True, color_system="standard")
        with console.capture() as capture:
            console.print(table)
        (row,) = [line for line in capture.get().splitlines() if "force MAE" in line]
        assert "\x1b[1;31m7.50× worse\x1b[0m" in row
        (row,) = [line for line in capture.get().splitlines() if "energy MAE" in line]
        assert "2.00× better" in row and "\x1b[1;31m" not in row

    def test_validation_outside_a_fit_has_its_column(self) -> None:
        text = render(error_table(Errors(validation={"forces_mae": 0.2})))
        assert "validation" in text and "force MAE (meV/Å)" in text and "Errors before" not in text

    def test_columns_without_values_are_left_out(self) -> None:
        text = render(error_table(Errors(test={"forces_mae": 0.2})))
        assert "test" in text and "before" not in text.splitlines()[2] and "better" not in text

    def test_fits_a_narrow_terminal(self) -> None:
        full = {q.metric: 1234.5 for q in callbacks.QUANTITIES}
        assert max(len(line) for line in render(error_table(Errors(full, full, full))).splitlines()) <= 80

    def test_says_when_the_start_is_partial(self) -> None:
        values = {"forces_mae": 0.2}
        assert "first batches" in render(error_table(Errors(values, values, before_is_partial=True)))
        assert "first batches" not in render(error_table(Errors(values, values)))

    def test_says_which_data_and_weights_a_column_is_of(self) -> None:
        full = {q.metric: 1234.5 for q in callbacks.QUANTITIES}
        lines = [
            line.strip() for line in render(error_table(Errors(full, full, test=full, tested="best.ckpt"))).splitlines()
        ]
        assert lines[-2:] == [
            "before, after: validation data, first and last weights",
            "test: test data, weights of best.ckpt",
        ]
        text = render(error_table(Errors(after=full, test=full)))
        assert "after: validation data, last weights" in text
        assert "test: test data, last weights" in text

    def test_drop(self) -> None:
        assert "5.00× better" in describe_change(Errors({"forces_mae": 0.5}, {"forces_mae": 0.1}))
        assert "2.00× worse" in describe_change(Errors({"forces_mae": 0.1}, {"forces_mae": 0.2}))
        assert describe_change(Errors(after={"forces_mae": 0.2})) == ""
        assert describe_change(Errors({"forces_mae": 0.1}, {"forces_mae": math.nan})) == ""
