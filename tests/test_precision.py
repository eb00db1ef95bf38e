"""Clipping by the norm over all stages, by any precision plugin."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_workers import clip_in_pipeline, clip_parameters
from torch import nn

from lightning_januspipe.mesh import Mesh, MeshShape
from lightning_januspipe.pipeline import Undivided
from lightning_januspipe.precision import MeshClipping, clip_gradients_by_norm, mesh_aware
from lightning_januspipe.testing import RankPool


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
def test_norm_counts_shared_parameters_once(pool: RankPool, max_norm: float) -> None:
    expected = clip_parameters()
    unclipped = [p.grad.clone() for p in expected if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(expected, max_norm)
    for rank, (found_norm, gradients) in enumerate(pool.run(clip_in_pipeline, max_norm, world_size=2)):
        assert found_norm == pytest.approx(float(norm), rel=1e-14)
        assert set(gradients) == {str(rank), "2", "3"}
        assert gradients["3"] is None
        for i in (rank, 2):
            torch.testing.assert_close(gradients[str(i)], expected[i].grad, rtol=1e-12, atol=0)
            assert (max_norm < norm) != torch.equal(gradients[str(i)], unclipped[i]), "clipped only where needed"  # type: ignore[arg-type]


def test_in_one_process() -> None:
    module = nn.Linear(3, 2).double()
    module(torch.ones(1, 3, dtype=torch.float64)).square().sum().backward()
    expected = [p.grad.clone() for p in module.parameters()]  # type: ignore[union-attr]
    total = torch.stack([g.norm() for g in expected]).norm()
    mesh = Mesh(MeshShape(1, 1), 0, torch.device("cpu"))
    norm = clip_gradients_by_norm(list(module.parameters()), 0.5, Undivided(module, mesh), mesh)
    assert float(norm) == pytest.approx(float(total))
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 0.5 / total, rtol=1e-5, atol=0)


def test_no_gradients_at_all() -> None:
    module = nn.Linear(3, 2)
    mesh = Mesh(MeshShape(1, 1), 0, torch.device("cpu"))
    assert float(clip_gradients_by_norm(list(module.parameters()), 1.0, Undivided(module, mesh), mesh)) == 0.0


def _plugins(namespace: str) -> list[Any]:
    precision = importlib.import_module(f"{namespace}.plugins.precision")
    return [precision.Precision(), precision.DoublePrecision()]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_wrapped_plugins_stay_what_they_are(namespace: str) -> None:
    pytest.importorskip(namespace)
    for plugin in _plugins(namespace):
        cls, strategy, other = type(plugin), object(), object()
        assert mesh_aware(plugin, strategy) is plugin
        assert isinstance(plugin, cls) and isinstance(plugin, MeshClipping)
        assert type(plugin).__name__ == cls.__name__ and type(plugin).__module__ == cls.__module__
        assert plugin.januspipe_strategy is strategy
        wrapped = type(plugin)
        assert mesh_aware(plugin, other) is plugin and type(plugin) is wrapped, "wrapped once"
        assert plugin.januspipe_strategy is other
        assert not isinstance(cls(), MeshClipping), "other plugins of the class are left alone"


def test_plugin_clips_over_the_mesh_once_there_is_one() -> None:
    pytest.importorskip("lightning.pytorch")
    module = nn.Linear(2, 1, bias=False).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    mesh = Mesh(MeshShape(1, 1), 0, torch.device("cpu"))
    asked: list[nn.Parameter] = []

    class Half(Undivided):
        """Owns nothing, so that the norm is zero and nothing is clipped."""

        def owns(self, parameter: nn.Parameter) -> bool:
            asked.append(parameter)
            return False

    for runner, expected in ((None, 1.0), (Half(module, mesh), 5.0)):
        module.weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        strategy = SimpleNamespace(runner=runner, mesh=mesh)
        mesh_aware(_plugins("lightning.pytorch")[0], strategy).clip_grad_by_norm(optimizer, 1.0)
        assert float(module.weight.grad.norm()) == pytest.approx(expected, rel=1e-5)
    assert len(asked) == 1
