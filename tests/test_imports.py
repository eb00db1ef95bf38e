"""Which part of the package may import which: dependencies point one way."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = "lightning_januspipe"
ROOT = Path(__file__).resolve().parents[1] / PACKAGE

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "keys": set(),
    "mesh": {"distributed"},
    "distributed": {"errors"},
    "random_state": set(),
    "schedule": set(),
    "experts": set(),
    "checkpoint": {"errors"},
    "engine": {"distributed", "errors", "schedule"},
    "loader": {"keys", "random_state"},
    "capture": {"engine", "errors", "experts", "random_state", "schedule"},
    "compiled": {"capture", "engine", "errors", "keys", "schedule"},
    "expert_ranks": {"capture", "distributed", "engine", "errors", "graph"},
    "graph": {"capture", "distributed", "engine", "errors", "loader"},
    "data": {"checkpoint", "keys", "loader"},
    "calculator": {"compiled", "data", "distributed", "errors", "keys", "mesh", "models", "runtime"},
    "models": {"checkpoint", "experts", "keys"},
    "deploy": {"__init__", "calculator", "checkpoint", "compiled", "keys", "models"},
    "runtime": {
        *("capture", "checkpoint", "compiled", "distributed", "engine", "errors", "expert_ranks", "experts", "graph"),
        *("mesh", "random_state", "schedule"),
    },
    "strategy": {
        *("capture", "checkpoint", "compiled", "distributed", "engine", "errors", "graph", "loader", "mesh"),
        *("random_state", "runtime", "schedule"),
    },
    "callbacks": {"distributed", "keys", "loader", "mesh", "runtime", "schedule"},
    "plan": {"capture", "engine", "errors", "graph", "mesh", "random_state", "runtime", "schedule"},
    "lightning": {"strategy"},
    "pytorch_lightning": {"strategy"},
    "__init__": {"capture", "graph", "strategy"},
}
"""What each folder, or file beside the folders, may import beside itself."""

FREE = {"bench", "cli", "testing"}
"""The ends of the graph: they may import anything, and only ends may import them."""

CAPTURE = ("trees", "patches", "side_effects", "adapters", "find", "trace", "cache", "cut", "stages", "validate")
"""The steps of capture in their order: a folder may import those before it. Files beside them join the steps."""

LIGHTNING_ALLOWED = {"bench", "callbacks", "cli", "data", "models.lightning_module", "plan", "strategy", "testing"}
"""Folders and modules that may import lightning or pytorch_lightning outside ``if TYPE_CHECKING``."""

TORCH_FORBIDDEN = {"schedule", "errors", "keys"}

MOST_FILES_AT_THE_ROOT = 8

FIELD_LIBRARIES = {"ase", "e3nn", "vesin", "matscipy", "rich", "matplotlib", "wandb", "jsonargparse"}
"""Not needed by ``import lightning_januspipe``, and so not imported by what it imports."""


def imported_modules(source: str, module: str = PACKAGE) -> set[str]:
    """Dotted names that a file imports at run time; the names in ``from x import y`` count as ``x.y`` too."""
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child)
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")[: -node.level]
                base = ".".join([*parents, base]) if base else ".".join(parents)
            names.add(base)
            names.update(f"{base}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(source))
    return names


def violations(module: str, source: str, parts: set[str]) -> list[str]:
    """What is wrong with the imports of a file.

    Args:
        module: Dotted name within the package, such as ``"engine.stage"`` or ``"__init__"``.
        source: Its text.
        parts: Names of the package's files and folders.
    """
    part = module.split(".")[0]
    names = imported_modules(source, f"{PACKAGE}.{module}")
    found = []
    if part not in FREE:
        for name in names:
            root, _, inner = name.partition(".")
            target = inner.split(".")[0] if inner else "__init__"
            if root != PACKAGE or (target not in parts and target != "__init__"):
                continue
            if target == "__init__" and any(n.startswith(f"{PACKAGE}.") and n.split(".")[1] in parts for n in names):
                continue  # "from lightning_januspipe import keys" imports keys
            if target != part and target not in ALLOWED.get(part, set()):
                found.append(f"{module} imports {name}")
    if part == "capture" and module.split(".")[1] in CAPTURE:
        later = CAPTURE[CAPTURE.index(module.split(".")[1]) + 1 :]
        found += [
            f"{module} imports {name}" for name in names if name.split(".")[1:3] in [["capture", s] for s in later]
        ]
    roots = {name.split(".")[0] for name in names}
    if not LIGHTNING_ALLOWED & {part, module}:
        found += [f"{module} imports {name}" for name in sorted(roots & {"lightning", "pytorch_lightning"})]
    if part in TORCH_FORBIDDEN and "torch" in roots:
        found.append(f"{module} imports torch")
    return found


def files() -> dict[str, str]:
    """Source of each module, by its dotted name within the package; packages by the name of the folder."""
    sources = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        sources[".".join(parts)] = path.read_text()
    return sources


SOURCES = files()
PARTS = {name.split(".")[0] for name in SOURCES} - {"__init__"}


def test_every_part_has_its_place() -> None:
    unplaced = PARTS - set(ALLOWED) - FREE
    assert not unplaced, f"add {sorted(unplaced)} to ALLOWED: say what it may import"


@pytest.mark.parametrize("module", SOURCES)
def test_dependencies_point_one_way(module: str) -> None:
    assert not violations(module, SOURCES[module], PARTS)


def test_no_two_files_have_one_name() -> None:
    names = [name for module in SOURCES if (name := module.rpartition(".")[2]) != "__init__"]
    of_folders = {module.rpartition(".")[2] for module in SOURCES if any(m.startswith(f"{module}.") for m in SOURCES)}
    repeated = {name for name in names if names.count(name) > 1} - of_folders
    assert not repeated, f"files of one name: {[m for m in SOURCES if m.rpartition('.')[2] in repeated]}"


def test_no_two_public_classes_have_one_name() -> None:
    found: dict[str, list[str]] = {}
    for module, source in SOURCES.items():
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(module)
    assert not {name: modules for name, modules in found.items() if len(modules) > 1}


def test_private_names_stay_in_their_file() -> None:
    imports = re.compile(rf"from {PACKAGE}[\w.]* import (\([^)]*\)|.*)")
    for file in [*Path(__file__).parent.rglob("*.py"), *ROOT.rglob("*.py")]:
        private = re.findall(r"\b_[a-zA-Z]\w*", " ".join(imports.findall(file.read_text())))
        assert not private, f"{file} imports {private}: give them public names, or test what uses them"


def test_few_files_at_the_root() -> None:
    assert len(list(ROOT.glob("*.py"))) <= MOST_FILES_AT_THE_ROOT


def test_no_file_imports_itself_by_way_of_others() -> None:
    imports = {
        module: {
            name.removeprefix(f"{PACKAGE}.")
            for name in imported_modules(source, f"{PACKAGE}.{module}")
            if name.removeprefix(f"{PACKAGE}.") in SOURCES
        }
        for module, source in SOURCES.items()
    }
    remaining = dict(imports)
    while remaining:
        leaves = [module for module, targets in remaining.items() if not targets & set(remaining)]
        assert leaves, f"a circle among {sorted(remaining)}"
        for leaf in leaves:
            del remaining[leaf]


def test_allowed_arrows_have_no_cycle() -> None:
    remaining = {part: set(targets) for part, targets in ALLOWED.items()}
    while remaining:
        leaves = [part for part, targets in remaining.items() if not targets & set(remaining)]
        assert leaves, f"a cycle among {sorted(remaining)}"
        for leaf in leaves:
            del remaining[leaf]


def test_field_libraries_are_not_imported_with_the_package() -> None:
    reached, todo = set(), {"__init__"}
    while todo:
        part = todo.pop()
        reached.add(part)
        todo |= ALLOWED.get(part, set()) - reached
    for module, source in SOURCES.items():
        if module.split(".")[0] in reached:
            at_top = "\n".join(
                ast.unparse(node) for node in ast.parse(source).body if isinstance(node, (ast.Import, ast.ImportFrom))
            )
            assert not {name.split(".")[0] for name in imported_modules(at_top)} & FIELD_LIBRARIES, module


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("schedule.build", "import torch"),
        ("schedule.build", "from torch.nn import Module"),
        ("schedule.build", "from lightning_januspipe.engine.stage import Stage"),
        ("engine.stage", "import lightning.pytorch as pl"),
        ("engine.stage", "from pytorch_lightning import Trainer"),
        ("engine.stage", "from lightning_januspipe import strategy"),
        ("engine.stage", "from lightning_januspipe.capture import capture_module"),
        ("engine.stage", "from ..capture import capture_module"),
        ("engine.stage", "import lightning_januspipe"),
        ("engine.stage", "from lightning_januspipe import JanusPipeStrategy"),
        ("engine.stage", "def f():\n    from lightning_januspipe.mesh import Mesh"),
        ("capture.find.potential", "import lightning_januspipe.strategy"),
        (
            "capture.find.potential",
            "if TYPE_CHECKING:\n    pass\nelse:\n    from lightning.pytorch import LightningModule",
        ),
        ("mesh", "from lightning_januspipe.runtime.pipeline import Pipeline"),
        ("runtime.pipeline", "from lightning_januspipe.strategy import JanusPipeStrategy"),
        ("models.potential", "from lightning.pytorch import LightningModule"),
        ("models.potential", "from lightning_januspipe.data import collate_structures"),
        ("__init__", "from lightning_januspipe.models import PotentialModule"),
        ("plan.measure", "from lightning_januspipe.cli.recipe import Recipe"),
        ("capture.trace.trace", "from lightning_januspipe.capture.cut.cut import Cut"),
    ],
)
def test_bad_imports_are_found(module: str, line: str) -> None:
    assert violations(module, line, PARTS | set(ALLOWED))


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("engine.stage", "from lightning_januspipe.schedule import Action"),
        ("engine.stage", "from .gradients import GradientBuffers"),
        ("models.potential", "from lightning_januspipe import keys"),
        ("capture.find.potential", "if TYPE_CHECKING:\n    from lightning.pytorch import LightningModule"),
        ("models.lightning_module", "from lightning.pytorch import LightningModule"),
        ("data.datamodule", "from pytorch_lightning import LightningDataModule"),
        ("cli.main", "import lightning_januspipe"),
        ("schedule.build", "import math"),
    ],
)
def test_good_imports_pass(module: str, line: str) -> None:
    assert not violations(module, line, PARTS | set(ALLOWED))
