"""The script that makes the environments of the client packages, without making any."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from . import environments
from .environments import CLIENTS, TORCH, main


class Commands:
    """Stands for ``venv`` and ``subprocess.run``: notes what is run, and fails where a word occurs in it."""

    def __init__(self, failing: str = "") -> None:
        self.run_commands: list[list[str]] = []
        self.failing = failing

    def create(self, folder: Path, with_pip: bool) -> None:
        folder.mkdir(parents=True)
        (folder / "pyvenv.cfg").touch()

    def run(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.run_commands.append(command)
        fails = bool(self.failing) and any(self.failing in word for word in command)
        return subprocess.CompletedProcess(command, int(fails), "ERROR: why" if fails else "")

    @property
    def installed(self) -> list[list[str]]:
        return [c[6:] for c in self.run_commands if c[2:4] == ["pip", "install"]]


def commands(monkeypatch: pytest.MonkeyPatch, failing: str = "") -> Commands:
    found = Commands(failing)
    monkeypatch.setattr(environments.venv, "create", found.create)
    monkeypatch.setattr(environments.subprocess, "run", found.run)
    return found


def test_torch_is_first_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in CLIENTS:
        found = commands(monkeypatch)
        assert main([name, "--folder", str(tmp_path)]) == 0
        first, *others = found.installed
        assert first == [TORCH]
        assert all(TORCH in install or install[0] == "--no-deps" for install in others)
        assert any("==" in word and word != TORCH for install in others for word in install)
        assert str(environments.ROOT) in others[-1]


def test_complete_environments_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["nequip", "--folder", str(tmp_path)]
    commands(monkeypatch)
    assert main(arguments) == 0
    found = commands(monkeypatch)
    assert main([*arguments, "--run"]) == 0
    (command,) = found.run_commands
    assert command[0] == str(tmp_path / "nequip" / "bin" / "python") and command[-1] == "tests/clients/test_nequip.py"


def test_what_cannot_be_installed_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = commands(monkeypatch, "schnetpack==")
    (tmp_path / "mace").mkdir()
    (tmp_path / "mace" / "mine.txt").touch()
    for _ in range(2):  # an incomplete environment is made again
        assert main(["schnetpack", "mace", "matris", "--folder", str(tmp_path)]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert any(line.startswith("schnetpack: not installed: pip install") for line in lines)
        assert "ERROR: why" in lines
        assert any(line.startswith("mace: not installed:") and "no virtual environment" in line for line in lines)
        assert f"matris: ready: {tmp_path / 'matris'}" in lines
    assert (tmp_path / "mace" / "mine.txt").exists()
    assert [TORCH] in found.installed


def test_failing_tests_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands(monkeypatch, "test_nequip.py")
    assert main(["nequip", "mace", "--folder", str(tmp_path), "--run"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nequip"], "--folder"),
        (["nequip", "mase", "--folder", "."], "unknown package mase; expected nequip, schnetpack, matgl"),
        (["nequip", "--folder", __file__], "is a file; expected a folder"),
    ],
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err
