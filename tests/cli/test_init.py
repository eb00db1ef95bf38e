"""``januspipe init``: the recipes of the package, which the README's first command needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from lightning_januspipe.cli import init
from lightning_januspipe.cli.main import main

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def test_recipes_are_written_and_files_of_the_user_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/extxyz.yaml").write_text("mine")
    main(["init"])
    text = capsys.readouterr().out
    assert "kept  recipes/extxyz.yaml" in text and "januspipe fit --config recipes/quickstart.yaml" in text
    names = {path.name for path in RECIPES.iterdir() if path.is_file()}
    assert {path.name for path in Path("recipes").iterdir()} == names
    for name in names - {"extxyz.yaml"}:
        assert Path("recipes", name).read_bytes() == (RECIPES / name).read_bytes()
    assert Path("recipes/extxyz.yaml").read_text() == "mine"
    main(["init", "other"])
    assert Path("other/extxyz.yaml").read_bytes() == (RECIPES / "extxyz.yaml").read_bytes()


def test_the_wheel_holds_the_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an installation from a package index has: recipes inside the package, where ``init`` looks first."""
    root = RECIPES.parent
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
        assert "lightning_januspipe/py.typed" in archive.namelist()
    package = tmp_path / "lightning_januspipe"
    assert (package / "recipes" / "quickstart.yaml").read_bytes() == (RECIPES / "quickstart.yaml").read_bytes()
    monkeypatch.setattr(init.lightning_januspipe, "__file__", str(package / "__init__.py"))
    assert init.packaged_recipes() == package / "recipes"
    shutil.rmtree(package / "recipes")
    assert init.packaged_recipes() == tmp_path / "recipes"
