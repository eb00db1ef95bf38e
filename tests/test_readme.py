"""The README says what is so."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from lightning_januspipe.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [shlex.split(part) for line in lines for part in line.split("&&")]


def test_the_checks_run_the_test_commands() -> None:
    block = next(block for block in blocks("bash") if "pytest" in block)
    install, test = block.strip().split(" && ")
    script = (ROOT / ".ci" / "run").read_text()
    assert f"\n{install} ||" in script
    assert f"\ncheck {test}\n" in script


def test_recipes_are_there_and_parse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [command for command in commands() if command[:2] == ["januspipe", "fit"]]
    assert runs
    for command in runs:
        recipe = ROOT / command[command.index("--config") + 1]
        assert recipe.is_file()
        args = [str(recipe) if part.endswith(".yaml") else part for part in command[1:]]
        with pytest.raises(SystemExit) as exit_info:
            main([*args, "--print_config"])
        assert exit_info.value.code == 0
        assert "JanusPipeStrategy" in capsys.readouterr().out


def test_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's command, on fewer structures and measured once."""
    (command,) = [command for command in commands() if command[:2] == ["januspipe", "plan"]]
    assert command[-2:] == ["--output", "plan"]
    args = [str(ROOT / part) if part.endswith(".yaml") else part for part in command[1:-1]]
    fewer = ["--data.num_train", "24", "--data.num_val", "4", "--data.num_test", "4", "--repeats", "1"]
    main([*args, str(tmp_path / "plan"), *fewer])
    assert "→ " in capsys.readouterr().out
    assert {"gantt.svg", "memory.svg", "trace.json", "plan.json"} <= {p.name for p in (tmp_path / "plan").iterdir()}


def test_every_recipe_is_described() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text()
    for recipe in (ROOT / "recipes").glob("*.yaml"):
        assert f"recipes/{recipe.name}" in text


def test_links_lead_somewhere() -> None:
    for file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text()):
            assert (file.parent / target).exists(), f"{file.name}: {target}"


def test_python_snippets_run_up_to_the_fit() -> None:
    names: dict[str, object] = {}
    for snippet in blocks("python"):
        shown = snippet.replace('accelerator="gpu", devices=8, strategy="januspipe"', 'accelerator="cpu", devices=1')
        shown = shown.replace('accelerator="gpu", devices=8', 'accelerator="cpu", devices=8')
        exec(re.sub(r"^trainer\.fit.*$", "", shown, flags=re.MULTILINE), names)
    assert type(names["trainer"].strategy) is names["JanusPipeStrategy"]  # type: ignore[attr-defined]
