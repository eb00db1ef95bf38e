"""``januspipe plan``: the numbers are those of the schedules, the files are valid, mistakes are told in one line."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from lightning_januspipe.cli.main import main
from lightning_januspipe.cli.plan_options import parse_bytes
from lightning_januspipe.cli.plan_tables import notes, schedule_table
from lightning_januspipe.cli.recipe import strategy_arguments
from lightning_januspipe.plan import (
    CutCosts,
    SchedulePlan,
    plan_costs,
    plan_cuts,
)
from lightning_januspipe.plan.compare import PlanOptions, format_bytes
from lightning_januspipe.schedule import (
    Link,
    MemoryCosts,
    PhaseCosts,
    Schedule,
    build_schedule,
    simulate,
    validate_schedule,
)
from lightning_januspipe.schedule.build_schedule import GENERATORS

COSTS = PhaseCosts(0.010, 0.014, 0.012, 0.009, 0.006, 0.005)
MEMORY = MemoryCosts(30e6, 20e6, 10e6)
FORM_2 = ["plan", "--costs", "10,14,12,9,6,5", "--ranks", "4", "--num_microbatches", "8"]
MEASURED_BYTES = ["--memory", "30MB,20MB,10MB"]


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def row_of(plan: SchedulePlan, name: str) -> Any:
    return next(row for row in plan.rows if row.name == name)


def failure(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake is told in."""
    with pytest.raises(SystemExit) as exit_info:
        main(args)
    assert exit_info.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and text.startswith("januspipe plan: error: ")
    return text


class TestPlanCosts:
    def test_numbers_are_those_of_the_simulator(self) -> None:
        plan = plan_costs(COSTS, 4, 8, memory=MEMORY)
        assert [row.name for row in plan.rows] == list(GENERATORS)
        for row in plan.rows:
            schedule = build_schedule(row.name, 4, 8, COSTS)
            report = simulate(schedule, COSTS, memory=MEMORY)
            assert row.schedule == schedule
            assert row.step_time == pytest.approx(report.makespan)
            assert row.over_ideal == pytest.approx(report.makespan / report.ideal)
            assert row.peak_memory == pytest.approx(max(report.peak_memory))
            assert row.fits and row.needed is None
        baseline = row_of(plan, "1f1b-2nd").step_time
        assert plan.choice is not None and plan.choice.step_time == min(row.step_time for row in plan.rows)
        assert plan.speed(plan.choice) == pytest.approx(baseline / plan.choice.step_time)
        # One equal stage on each rank, nothing deferred: M·T + (P-1)(t_FE + t_BE), WE included.
        bound = 8 * COSTS.total + 3 * (0.010 + 0.009 + 0.005)
        wavek = row_of(plan, "wavek")
        assert wavek.bound == pytest.approx(bound)
        assert wavek.gap == pytest.approx(wavek.step_time / bound - 1, abs=1e-9)
        assert row_of(plan, "1f1b-2nd").bound is None

    def test_speed_is_against_the_baseline_even_where_it_is_not_asked_for(self) -> None:
        plan = plan_costs(COSTS, 4, 8, schedules=["wavek"])
        expected = simulate(build_schedule("1f1b-2nd", 4, 8, COSTS), COSTS).makespan
        assert [row.name for row in plan.rows] == ["wavek"]
        assert plan.speed(plan.rows[0]) == pytest.approx(expected / plan.rows[0].step_time)

    def test_messages_take_time_and_are_counted(self) -> None:
        free = plan_costs(COSTS, 4, 8, schedules=["1f1b-fold"]).rows[0]
        row = plan_costs(COSTS, 4, 8, schedules=["1f1b-fold"], latency=1e-3, bandwidth=1e9, message_bytes=2e6).rows[0]
        assert row.num_messages == 4 * 3 * 8  # four phases, three borders, eight micro-batches
        assert row.message_bytes == row.num_messages * 2e6
        expected = simulate(row.schedule, COSTS, comm=Link(1e-3, 1e9, 2e6)).makespan
        assert row.step_time == pytest.approx(expected)
        assert row.step_time > free.step_time

    def test_memory_limit(self) -> None:
        limit = 250e6
        plan = plan_costs(COSTS, 4, 8, memory=MEMORY, memory_limit=limit)
        assert row_of(plan, "wavek-zb").fits and row_of(plan, "wavek-zb").peak_memory <= limit
        gpipe = row_of(plan, "gpipe")
        expected = max(simulate(build_schedule("gpipe", 4, 8, COSTS), COSTS, memory=MEMORY).peak_memory)
        assert not gpipe.fits and gpipe.needed == pytest.approx(expected) and gpipe.needed > limit
        assert plan.choice is not None and plan.choice.fits

    def test_what_a_searched_schedule_needs_is_enough(self) -> None:
        plan = plan_costs(COSTS, 4, 8, schedules=["wavek"], memory=MEMORY, memory_limit=10e6)
        needed = plan.rows[0].needed
        assert needed == pytest.approx(60e6) and plan.choice is None  # one micro-batch in BF holds all three
        assert "No schedule fits in 10 MB" in plan.reason() and format_bytes(needed) in plan.reason()
        assert plan_costs(COSTS, 4, 8, schedules=["wavek"], memory=MEMORY, memory_limit=needed).choice is not None

    def test_the_reason_names_a_faster_one_that_does_not_fit(self) -> None:
        stages = CutCosts(COSTS, memory=MEMORY, deferred_memory=MemoryCosts(300e6, 200e6, 100e6))
        plan = plan_cuts([stages], PlanOptions(4, 8, memory_limit=400e6), ["wavek", "wavek-zb"])
        assert plan.choice is not None and plan.choice.name == "wavek"
        assert not row_of(plan, "wavek-zb").fits
        assert "wavek: " in plan.reason() and "wavek-zb would take" in plan.reason() and "400 MB" in plan.reason()

    def test_costs_with_deferral_are_for_deferred_schedules(self) -> None:
        slow = PhaseCosts(*(10 * getattr(COSTS, name) for name in ("fe", "ff", "bf", "be", "wf", "we")))
        plan = plan_cuts([CutCosts(COSTS, deferred=slow)], PlanOptions(4, 8), ["wavek", "wavek-zb"])
        assert row_of(plan, "wavek").report.ideal == pytest.approx(8 * COSTS.total)
        assert row_of(plan, "wavek-zb").report.ideal == pytest.approx(80 * COSTS.total)

    def test_more_stages_are_taken_where_they_gain(self) -> None:
        per_rank = [COSTS] * 4
        half = [PhaseCosts(0.005, 0.007, 0.006, 0.0045, 0.003, 0.0025)] * 8
        choices = [CutCosts(per_rank, chunks=1), CutCosts(half, chunks=2)]
        plan = plan_cuts(choices, PlanOptions(4, 8), ["wavek", "wavek-zb"])
        assert row_of(plan, "wavek").schedule.num_stages == 4
        assert row_of(plan, "wavek-zb").schedule.num_stages == 8
        slower = [CutCosts(per_rank, chunks=1), CutCosts([COSTS] * 8, chunks=2)]
        assert row_of(plan_cuts(slower, PlanOptions(4, 8), ["wavek-zb"]), "wavek-zb").schedule.num_stages == 4

    def test_of_equally_fast_ones_the_smaller_is_chosen(self) -> None:
        plan = plan_costs(COSTS, 1, 4, schedules=["gpipe", "1f1b-fold"], memory=MEMORY)
        assert row_of(plan, "gpipe").step_time == pytest.approx(row_of(plan, "1f1b-fold").step_time)
        assert plan.choice is not None and plan.choice.name == "1f1b-fold"
        assert "the next best, gpipe, has 1.00 and is as fast" in plan.reason()

    def test_one_rank_and_uneven_stages(self) -> None:
        double = PhaseCosts(*(2 * getattr(COSTS, name) for name in ("fe", "ff", "bf", "be", "wf", "we")))
        plan = plan_cuts([CutCosts([COSTS, double, COSTS], chunks=1)], PlanOptions(3, 6), ["wavek"])
        assert plan.one_rank == pytest.approx(6 * 4 * COSTS.total) and plan.busiest == pytest.approx(0.5)
        assert "3 ranks are at best 2.0 times as fast as one" in notes(plan)[0]
        assert f"3 ranks are {plan.one_rank / plan.rows[0].step_time:.1f} times as fast" in plan.reason()
        assert not notes(plan_costs(COSTS, 3, 6))

    def test_no_speed_up_of_more_than_the_ranks(self) -> None:
        """Unequal measurements of the same work would give it."""
        quick = PhaseCosts(*(getattr(COSTS, name) / 3 for name in ("fe", "ff", "bf", "be", "wf", "we")))
        plan = plan_cuts([CutCosts(COSTS, deferred=quick)], PlanOptions(2, 8), ["wavek", "wavek-zb"])
        assert plan.choice is not None and plan.one_rank / plan.choice.step_time > 2
        assert plan.speed_up(plan.choice) is None
        assert plan.reason().endswith("The measurement is too noisy to tell how much faster 2 ranks are than one.")
        speeds = {row["name"]: row["speed_over_one_rank"] for row in plan.to_dict()["schedules"]}
        assert speeds["wavek-zb"] is None and 1 < speeds["wavek"] <= 2
        assert "ranks are 1.0 times as fast as one" in plan_costs(COSTS, 1, 4).reason()

    def test_throughput(self) -> None:
        plan = plan_cuts([CutCosts(COSTS)], PlanOptions(4, 8), ["wavek"], structures=2, atoms=60)
        content = plan.to_dict()["schedules"][0]
        assert content["structures_per_second"] == pytest.approx(8 * 2 / plan.rows[0].step_time)
        assert content["atoms_per_second"] == pytest.approx(8 * 60 / plan.rows[0].step_time)

    def test_refusals(self) -> None:
        with pytest.raises(ValueError, match="Did you mean 'wavek'"):
            plan_costs(COSTS, 4, 8, schedules=["wavekk"])
        with pytest.raises(ValueError, match="memory_limit needs memory"):
            plan_costs(COSTS, 4, 8, memory_limit=1e6)
        with pytest.raises(ValueError, match="num_ranks is 0"):
            plan_costs(COSTS, 0, 8)
        with pytest.raises(ValueError, match="bandwidth is 0"):
            plan_costs(COSTS, 4, 8, bandwidth=0)

    def test_schedules_are_not_told_apart_where_the_measurement_is_coarser_than_their_differences(self) -> None:
        plan = plan_costs(COSTS, 4, 8, schedules=["wavek", "wavek-zb", "gpipe"])
        chosen = plan.choice
        assert chosen is not None and not plan.rivals and plan.reason().startswith("wavek-zb: ")
        second = min(row.step_time for row in plan.rows if row is not chosen) / chosen.step_time - 1
        assert not replace(plan, uncertainty=0.9 * second).rivals
        coarse = replace(plan, uncertainty=1.1 * second)
        assert [row.name for row in coarse.rivals] == ["wavek"]
        assert re.match(r"wavek-zb, wavek cannot be told apart: they differ by .* % at most", coarse.reason())
        marks = [list(cell) for cell in zip(*(column.cells for column in schedule_table(coarse).columns), strict=True)]
        assert not any(cells[0] for cells in marks)


class TestGivenCosts:
    def test_prints_every_schedule_and_one_choice(self, capsys: pytest.CaptureFixture[str]) -> None:
        main(FORM_2)
        text = capsys.readouterr().out
        for name in GENERATORS:
            assert sum(line.split()[:1] == [name] or line.split()[:2] == ["→", name] for line in text.splitlines()) == 1
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("→")]
        assert len(lines) == 2 and all(line.split()[1].rstrip(":") == "wavek-zb" for line in lines)
        assert "…" not in text and "\x1b" not in text
        step = simulate(build_schedule("wavek-zb", 4, 8, COSTS), COSTS).makespan
        assert f"{1e3 * step:.0f}" in lines[1].split()
        assert text.startswith("→ wavek-zb: ")

    def test_files(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        args = [*FORM_2, *MEASURED_BYTES, "--schedules", "gpipe,wavek-zb", "--output", "out/deep"]
        main([*args, "--memory_limit", "250MB"])
        folder = tmp_path / "out" / "deep"
        printed = capsys.readouterr().out.partition("Written:")[2].split()
        assert sorted(Path(path).resolve() for path in printed) == sorted(folder.iterdir())
        for name in ("gantt.svg", "memory.svg"):
            assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
        trace = json.loads((folder / "trace.json").read_text())
        assert {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"} == {
            "gpipe",
            "wavek-zb",
        }
        content = json.loads((folder / "plan.json").read_text())
        assert content["choice"] == "wavek-zb" and content["memory_limit"] == 250e6
        by_name = {row["name"]: row for row in content["schedules"]}
        assert not by_name["gpipe"]["fits"] and by_name["gpipe"]["needed_memory"] > 250e6
        assert len(by_name["wavek-zb"]["peak_memory"]) == 4
        for name, row in by_name.items():
            schedule = Schedule.from_csv((folder / f"schedule-{name}.csv").read_text())
            validate_schedule(schedule)
            assert simulate(schedule, COSTS).makespan == pytest.approx(row["step_time"])

    def test_png_without_memory(self, tmp_path: Path) -> None:
        main([*FORM_2, "--schedules", "wavek", "--output", "out", "--format", "png"])
        assert (tmp_path / "out" / "gantt.png").read_bytes().startswith(b"\x89PNG")
        assert not (tmp_path / "out" / "memory.png").exists()

    def test_the_unfit_say_what_they_need(self, capsys: pytest.CaptureFixture[str]) -> None:
        main([*FORM_2, *MEASURED_BYTES, "--memory_limit", "250MB"])
        text = capsys.readouterr().out
        assert "! gpipe does not fit in 250 MB per rank: it needs" in text

    def test_a_schedule_that_cannot_be_built_leaves_the_others(self, capsys: pytest.CaptureFixture[str]) -> None:
        main([*FORM_2, "--max_live", "2"])
        text = capsys.readouterr().out
        assert "! gpipe: " in text and "→ wavek" in text


class TestMistakes:
    @pytest.mark.parametrize(
        ("args", "expected"),
        [
            ([], "expected a recipe"),
            (["quickstart.yaml"], "--config quickstart.yaml"),
            (["--costs", "1,2,3"], "four or six times in ms"),
            (["--costs", "1,2,3,x"], "'1,2,3,x'"),
            (["--costs", "1,2,0,4"], "the first four are > 0"),
            (["--costs", "1,2,3,4"], "--ranks"),
            ([*FORM_2[1:], "--schedules", "wavez"], "did you mean wavek"),
            ([*FORM_2[1:], "--ranks", "0"], "does not conform to restriction v>0"),
            ([*FORM_2[1:], "--config", "recipe.yaml"], "--config was given too"),
            ([*FORM_2[1:], "--rank", "3"], "did you mean --ranks"),
            ([*FORM_2[1:], "--memory_limit", "3GB"], "--memory"),
            ([*FORM_2[1:], "--memory", "3GB"], "ENERGY,FORCE,KEPT"),
            ([*FORM_2[1:], *MEASURED_BYTES, "--memory_limit", "3 apples"], "'3 apples' is not a number of bytes"),
            ([*FORM_2[1:], "--bandwidth", "1e9"], "--message_bytes"),
            ([*FORM_2[1:], "--latency", "-1"], "does not conform to restriction v>=0"),
            ([*FORM_2[1:], "--extrapolate"], "--extrapolate is for a recipe"),
            (["--config", "recipe.yaml", "--memory", "1,2,3"], "with a recipe it is measured"),
            (["--config", "recipe.yaml", "--meshes", "--extrapolate"], "leave out one of them"),
            (["--config", "recipe.yaml", "--rank", "3"], "did you mean --ranks"),
            (["--config", "other.yaml"], "other.yaml"),
        ],
    )
    def test_one_line(self, args: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
        write_recipe()
        assert expected in failure(["plan", *args], capsys)

    def test_help(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_info:
            main(["plan", "--help"])
        assert exit_info.value.code == 0
        text = capsys.readouterr().out
        assert "--costs FE,FF,BF,BE[,WF,WE]" in text and "--config recipes/quickstart.yaml" in text


@pytest.mark.parametrize(
    ("text", "value"),
    [("40e9", 40e9), ("40GB", 40e9), ("40GiB", 40 * 2**30), ("1.5 kB", 1500), ("12", 12), ("2kib", 2048), ("7B", 7)],
)
def test_parse_bytes(text: str, value: float) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "1XB", "nan", "inf"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="40GiB"):
        parse_bytes(text)


class TestStrategyArguments:
    def asked(self, devices: Any, strategy: Any, num_nodes: int = 1, **more: Any) -> Any:
        given = {"devices": devices, "num_nodes": num_nodes, "accelerator": "cpu", "strategy": strategy}
        return strategy_arguments(SimpleNamespace(**given, **{"callbacks": None, "accumulate_grad_batches": 1, **more}))

    def januspipe(self, **arguments: Any) -> Any:
        path = "lightning_januspipe.JanusPipeStrategy"
        return SimpleNamespace(class_path=path, init_args=SimpleNamespace(**arguments))

    @pytest.mark.parametrize(
        ("devices", "nodes", "ranks"),
        [(8, 1, 8), ("4", 2, 8), ([0, 1, 2], 1, 3), ("0,1", 1, 2), ("auto", 1, 2), (1, 1, 2)],
    )
    def test_ranks_of_the_trainer(self, devices: Any, nodes: int, ranks: int) -> None:
        asked = self.asked(devices, "auto", nodes)
        assert asked.num_ranks == ranks and asked.num_microbatches is None and asked.wave_size == "auto"

    def test_arguments_of_the_strategy(self) -> None:
        strategy = self.januspipe(data_size=2, num_microbatches=6, memory_limit=1e9, potential="net", wave_size=3)
        asked = self.asked(8, strategy)
        assert (asked.num_ranks, asked.num_microbatches, asked.memory_limit) == (4, 6, 1e9)
        assert (asked.potential, asked.wave_size) == ("net", 3)

    def test_accumulation_by_argument_or_callback(self) -> None:
        def callback(**arguments: Any) -> Any:
            return SimpleNamespace(class_path="some.Callback", init_args=SimpleNamespace(**arguments))

        later = callback(scheduling={0: 1, 5: 4})
        never = callback(scheduling={0: 1})
        for more, expected in (
            ({}, False),
            ({"accumulate_grad_batches": 2}, True),
            ({"callbacks": [callback(monitor="val_loss"), later]}, True),
            ({"callbacks": later}, True),
            ({"callbacks": [never, SimpleNamespace(class_path="some.Callback")]}, False),
        ):
            assert self.asked(2, "auto", **more).accumulates is expected

    def test_sizes_that_do_not_multiply(self) -> None:
        with pytest.raises(ValueError, match="pipeline_size × data_size"):
            self.asked(8, self.januspipe(pipeline_size=3, data_size=2))


def write_recipe(**trainer: Any) -> str:
    """A tiny recipe of three layers on twelve small structures."""
    content = {
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "strategy": {"class_path": "lightning_januspipe.JanusPipeStrategy", "init_args": {"num_microbatches": 4}},
            "callbacks": [{"class_path": "lightning_januspipe.callbacks.Throughput"}],
            **trainer,
        },
        "model": {
            "class_path": "lightning_januspipe.models.PotentialModule",
            "init_args": {
                "potential": {
                    "class_path": "lightning_januspipe.models.EquivariantPotential",
                    "init_args": {"num_layers": 3, "num_features": 4, "l_max": 1},
                }
            },
        },
        "data": {
            "class_path": "lightning_januspipe.data.EMTDataModule",
            "init_args": {"num_train": 12, "num_val": 2, "num_test": 2, "sizes": [4], "batch_size": 8, "cutoff": 4.0},
        },
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    return "recipe.yaml"


class TestRecipe:
    def test_plan(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        recipe = write_recipe(precision="64-true", accumulate_grad_batches=2)
        main(["plan", "--config", recipe, "--repeats", "2", "--output", "out", "--memory_limit", "1GiB"])
        text = capsys.readouterr().out
        content = json.loads((tmp_path / "out" / "plan.json").read_text())
        assert (content["num_ranks"], content["num_microbatches"]) == (2, 4)
        assert content["precision"] == "64-true" and content["potential"] == "potential"
        assert content["extrapolated"] is False and content["memory_limit"] == 2**30
        # Batches of 8 in 4 micro-batches: two structures of four atoms.
        assert (content["structures_per_microbatch"], content["atoms_per_microbatch"]) == (2, 8)
        assert "2 structures with 8 atoms" in text
        assert "`fit` measures anew when it starts, and may cut elsewhere" in text
        # Parameters, two values of Adam for each, the gradients, and their sums over the accumulated batches.
        assert f"State of the largest rank: {format_bytes(content['state'] / 5)} of parameters" in text

        titles = [
            f"{name} stages" if name.isdigit() else name.replace(" on", " stages on") for name in content["stages"]
        ]
        assert len(titles) > 1 and [line.strip() for line in text.splitlines() if line.strip() in titles] == titles
        stages = content["stages"]["2"]
        assert len(stages) == 2
        assert all(value > 0 for stage in stages for value in stage["seconds"].values())
        assert stages[-1]["boundary"] == [] and stages[0]["boundary_bytes"] > 0
        assert {tensor["dtype"] for tensor in stages[0]["boundary"]} == {"float64"}
        (boundary,) = content["cuts"]["2"]["boundaries"]
        per_atom = boundary["bytes_per"]["atom"]
        assert list(boundary["bytes_per"]) == ["atom"] and stages[0]["boundary_bytes"] == 8 * per_atom
        assert f"stage 0 → 1: {per_atom:,} B per atom" in text
        shares = [line.split()[1] for line in text.splitlines() if line.split()[2:3] == ["%"]]
        assert sum(map(int, shares[:2])) == pytest.approx(100, abs=1) and shares[2] == "100"

        rows = {row["name"]: row for row in content["schedules"]}
        assert list(rows) == list(GENERATORS) and content["choice"] in rows
        total = sum(sum(stage["seconds"].values()) for stage in stages)
        busiest = max(sum(stage["seconds"].values()) for stage in stages)
        assert total / 2 <= busiest
        assert rows["wavek"]["step_time"] >= 4 * busiest * (1 - 1e-9)
        for name, row in rows.items():
            assert row["fits"] and len(row["peak_memory"]) == 2 and row["message_bytes"] > 0
            schedule = Schedule.from_csv((tmp_path / "out" / f"schedule-{name}.csv").read_text())
            validate_schedule(schedule)
            assert row["atoms_per_second"] == pytest.approx(4 * 8 / row["step_time"])
        keeps = {name: row["activation"] for name, row in rows.items()}
        assert keeps["wavek"] == "keep" and keeps["1f1b-2nd"] is None  # all fits; unfolded schedules have no choice
        assert len(re.findall(r"^ *\d +recompute ", text, re.MULTILINE)) >= 2
        # Nothing was trained, and nothing was logged.
        assert not Path("lightning_logs").exists()
        assert text.startswith("→ ")
        marked = sum(line.strip().startswith("→") for line in text.splitlines())
        assert marked == (1 if "cannot be told apart" in text.splitlines()[0] else 2)  # in words, and in the table

    @pytest.mark.slow
    def test_compiled_phases(self, capsys: pytest.CaptureFixture[str]) -> None:
        """What does not fit with cheap operations computed again fits with all of them."""
        strategy = "--trainer.strategy.init_args"
        args = ["plan", "--config", write_recipe(), "--repeats", "1", "--schedules", "1f1b-fold", "--output", "out"]
        main([*args, f"{strategy}.compile=true", "--memory_limit", "90kB"])
        text = capsys.readouterr().out
        (row,) = json.loads(Path("out/plan.json").read_text())["schedules"]
        assert row["activation"] == "recompute" and row["fits"]
        assert text.count(" pointwise ") == text.count(" keep ") == 2, "one row for each stage"

    def test_more_ranks_than_parts(self, capsys: pytest.CaptureFixture[str]) -> None:
        args = ["plan", "--config", write_recipe(), "--model.potential.num_layers=1", "--ranks", "60"]
        args += ["--schedules", "gpipe", "--repeats", "1"]
        text = failure(args, capsys)
        assert "60 ranks" in text and re.search(r"(give --ranks \d+|take a deeper model), or --extrapolate", text)

        main([*args, "--extrapolate", "--output", "out"])
        text = capsys.readouterr().out
        content = json.loads(Path("out/plan.json").read_text())
        assert content["extrapolated"] is True and "ASSUMPTION (--extrapolate)" in text
        (stages,) = content["stages"].values()
        assert 1 <= len(stages) < 60
        costs = PhaseCosts(*(sum(s["seconds"][n] for s in stages) / 60 for n in ("fe", "ff", "bf", "be")))
        gpipe = next(row for row in content["schedules"] if row["name"] == "gpipe")
        assert gpipe["ideal"] == pytest.approx(4 * costs.total)
        assert gpipe["step_time"] == pytest.approx(simulate(build_schedule("gpipe", 60, 4, costs), costs).makespan)

    def test_overrides_and_a_mistake_of_fit(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as exit_info:
            main(["plan", "--config", write_recipe(), "--data.batch_sizes=3"])
        assert exit_info.value.code == 2 and "batch_sizes" in capsys.readouterr().err
        text = failure(["plan", "--config", write_recipe(), "--trainer.precision=transformer-engine"], capsys)
        assert "transformer-engine" in text and "32-true" in text
