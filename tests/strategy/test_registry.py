"""The strategy of either Lightning, by names that stay."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

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


def test_unknown_namespace() -> None:
    with pytest.raises(ValueError, match="expected one of lightning, pytorch_lightning"):
        lightning_januspipe.strategy_class("lightning.pytorch")
