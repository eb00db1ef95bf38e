"""The strategy of either Lightning, by names that stay."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from pools import slow

import lightning_januspipe
from lightning_januspipe.strategy.registry import NAMESPACES

TRAINER = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_names(namespace: str) -> None:
    """A configuration file can name the strategy of its Trainer, and the Trainer takes it."""
    library = pytest.importorskip(TRAINER[namespace])
    path = f"lightning_januspipe.{namespace}"
    __import__(path)
    cls = sys.modules[path].JanusPipeStrategy
    assert cls is lightning_januspipe.strategy_class(namespace)
    assert pickle.loads(pickle.dumps(cls)) is cls
    trainer = library.Trainer(accelerator="cpu", devices=1, strategy=cls(), logger=False, enable_checkpointing=False)
    assert type(trainer.strategy) is cls


def test_the_other_lightnings_is_named_where_it_is_refused() -> None:
    library = pytest.importorskip("pytorch_lightning")
    with pytest.raises(Exception, match=r"lightning_januspipe\.lightning\.JanusPipeStrategy"):
        library.Trainer(accelerator="cpu", devices=1, strategy=lightning_januspipe.strategy_class("lightning")())


def test_only_one_lightning() -> None:
    """Where ``lightning`` is not installed, the strategy is that of ``pytorch_lightning``."""
    pytest.importorskip("pytorch_lightning")
    script = """
import sys

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightning":
            raise ModuleNotFoundError(f"No module named {name!r}", name="lightning")

sys.meta_path.insert(0, Hidden())
import importlib.util as util
find_spec = util.find_spec
util.find_spec = lambda name, *rest: None if name == "lightning" else find_spec(name, *rest)
import lightning_januspipe
strategy = lightning_januspipe.JanusPipeStrategy
print(next(c for c in strategy.__mro__ if c.__name__ == "ParallelStrategy").__module__, strategy.__module__)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    base, module = done.stdout.split()
    assert base.startswith("pytorch_lightning.") and module == "lightning_januspipe.pytorch_lightning"


@pytest.mark.parametrize("comes_first", ["lightning_januspipe", slow("lightnings")])
def test_names_are_registered_whatever_is_imported_first(comes_first: str) -> None:
    """The package itself imports neither torch nor a Lightning; every Trainer knows its names all the same."""
    for library in TRAINER.values():
        pytest.importorskip(library)
    lightnings = "import lightning.pytorch, pytorch_lightning"
    package = "import lightning_januspipe; early = {m.split('.')[0] for m in sys.modules}"
    imports = [package, lightnings] if comes_first == "lightning_januspipe" else [lightnings, package]
    script = f"""
import sys
{imports[0]}
{imports[1]}
for library in (lightning.pytorch, pytorch_lightning):
    arguments = dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False)
    strategy = library.Trainer(strategy="januspipe_gpipe", **arguments).strategy
    print(type(strategy).__module__, strategy.schedule, strategy.options.graph_size)
print(*sorted(early & {{"torch", "lightning", "pytorch_lightning", "numpy"}}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    *strategies, early = done.stdout.splitlines()
    assert strategies == [f"lightning_januspipe.{namespace} gpipe 1" for namespace in TRAINER]
    if comes_first == "lightning_januspipe":
        assert early == "", "the package's import is cheap"


def test_the_public_names() -> None:
    assert set(lightning_januspipe.__all__) <= set(dir(lightning_januspipe))
    assert all(hasattr(lightning_januspipe, name) for name in lightning_januspipe.__all__)
    assert lightning_januspipe.schedule.build_schedule
    with pytest.raises(AttributeError, match="no attribute 'JanusPipe'"):
        _ = lightning_januspipe.JanusPipe


def test_unknown_namespace() -> None:
    with pytest.raises(ValueError, match="expected one of lightning, pytorch_lightning"):
        lightning_januspipe.strategy_class("lightning.pytorch")
