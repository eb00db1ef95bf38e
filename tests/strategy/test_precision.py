"""Precision plugins in a pipeline: the gradients of plain Lightning, clipping and loss scales over all stages."""

from __future__ import annotations

import importlib
from functools import cache
from types import SimpleNamespace
from typing import Any

import precision_workers as workers
import pytest
import torch
from engine_workers import clip_in_pipeline, clip_parameters
from pools import slow
from torch import Tensor, nn

from lightning_januspipe.mesh import Mesh, MeshShape
from lightning_januspipe.runtime.single_stage import SingleStage
from lightning_januspipe.strategy.gradient_norm import clip_gradients_by_norm
from lightning_januspipe.strategy.precision import (
    MeshClipping,
    MeshScaling,
    loss_scale,
    mesh_aware,
)
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
    norm = clip_gradients_by_norm(list(module.parameters()), 0.5, SingleStage(module, mesh).parameters, mesh)
    assert float(norm) == pytest.approx(float(total))
    for parameter, gradient in zip(module.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 0.5 / total, rtol=1e-5, atol=0)


def test_no_gradients_at_all() -> None:
    module = nn.Linear(3, 2)
    mesh = Mesh(MeshShape(1, 1), 0, torch.device("cpu"))
    assert (
        float(clip_gradients_by_norm(list(module.parameters()), 1.0, SingleStage(module, mesh).parameters, mesh)) == 0.0
    )


def _plugins(namespace: str) -> list[Any]:
    precision = importlib.import_module(f"{namespace}.plugins.precision")
    return [precision.Precision(), precision.DoublePrecision()]


@pytest.mark.parametrize("namespace", ["lightning.pytorch", "pytorch_lightning"])
def test_wrapped_plugins_stay_what_they_are(namespace: str) -> None:
    pytest.importorskip(namespace)
    for plugin in _plugins(namespace):
        cls, strategy, other = type(plugin), object(), object()
        assert mesh_aware(plugin, strategy) is plugin and type(plugin) is cls
        clipping = plugin.clip_grad_by_norm.__self__
        assert isinstance(clipping, MeshClipping) and clipping.strategy is strategy
        assert mesh_aware(plugin, other) is plugin
        assert plugin.clip_grad_by_norm.__self__ is clipping is plugin.clip_grad_by_value.__self__, "wrapped once"
        assert clipping.strategy is other
        assert not isinstance(cls().clip_grad_by_norm.__self__, MeshClipping), "other plugins are left alone"


def test_plugin_clips_over_the_mesh_once_there_is_one() -> None:
    pytest.importorskip("lightning.pytorch")
    module = nn.Linear(2, 1, bias=False).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    mesh = Mesh(MeshShape(1, 1), 0, torch.device("cpu"))
    asked: list[nn.Parameter] = []

    def owns(parameter: nn.Parameter) -> bool:
        """No rank owns anything, so that the norm is zero and nothing is clipped."""
        asked.append(parameter)
        return False

    own_nothing = SingleStage(module, mesh)
    own_nothing.parameters.owns = owns  # type: ignore[method-assign]
    for runner, expected in ((None, 1.0), (own_nothing, 5.0)):
        module.weight.grad = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
        strategy = SimpleNamespace(runner=runner, mesh=mesh)
        mesh_aware(_plugins("lightning.pytorch")[0], strategy).clip_grad_by_norm(optimizer, 1.0)
        assert float(module.weight.grad.norm()) == pytest.approx(expected, rel=1e-5)
    assert len(asked) == 1


def test_scaler_of_a_plugin_is_wrapped_too() -> None:
    pytest.importorskip("lightning.pytorch")
    plugins = importlib.import_module("lightning.pytorch.plugins.precision")
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    plugin = mesh_aware(plugins.MixedPrecision("16-mixed", "cpu", scaler), object())
    assert plugin.scaler is scaler and type(scaler) is torch.amp.GradScaler and loss_scale(plugin) == 16.0
    scaling = scaler.unscale_.__self__
    assert isinstance(scaling, MeshScaling)
    mesh_aware(plugin, object())
    assert scaler.unscale_.__self__ is scaling is scaler._check_inf_per_device.__self__, "wrapped once"
    assert loss_scale(plugins.MixedPrecision("bf16-mixed", "cpu")) == loss_scale(plugins.Precision()) == 1.0


# -- the gradients of plain Lightning -------------------------------------------------------------------------------


class Runs:
    """Training runs, each made once."""

    def __init__(self, pool: RankPool) -> None:
        self.plain = cache(lambda *a: pool.run(workers.train, a[0], None, *a[1:], world_size=1)[0])
        self._pool = pool
        self._pipelined: dict[str, list[Any]] = {}

    def exact(self, num_microbatches: int, namespace: str = "lightning") -> Tensor:
        """The gradient of the first step in float64."""
        return flat([self.plain("64-true", num_microbatches, 1, namespace)])

    def pipelined(self, precision: str, num_microbatches: int, *arguments: Any, **strategy: Any) -> list[Any]:
        """The records of both ranks."""
        run = (precision, strategy, num_microbatches, *arguments)
        if repr(run) not in self._pipelined:
            self._pipelined[repr(run)] = self._pool.run(workers.train, *run, world_size=2)
        return self._pipelined[repr(run)]


@pytest.fixture(scope="module")
def runs(pool: RankPool) -> Runs:
    return Runs(pool)


def flat(ranks: list[Any], what: str = "gradients", step: int = 0) -> Tensor:
    """The values of all ranks' parameters in one step."""
    found = {n: g for record in ranks for n, g in record[what][step].items()}
    return torch.cat([found[n].reshape(-1) for n in sorted(found)])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    ("precision", "num_microbatches", "rounding"),
    [
        ("32-true", 3, 1e-6),
        ("bf16-true", 1, 4e-2),
        slow("bf16-true", 3, 4e-2),
        slow("16-true", 3, 5e-3),
        slow("bf16-mixed", 1, 2.5e-2),
        ("bf16-mixed", 3, 2.5e-2),
        slow("16-mixed", 1, 3e-3),
        ("16-mixed", 3, 3e-3),
    ],
)
def test_gradients_are_as_good_as_those_of_plain_lightning(
    runs: Runs, precision: str, num_microbatches: int, rounding: float
) -> None:
    exact, plain = runs.exact(num_microbatches), runs.plain(precision, num_microbatches)
    ranks = runs.pipelined(precision, num_microbatches)
    plain_error = error(flat([plain]), exact)
    assert rounding / 3 < plain_error < 3 * rounding, "plain Lightning computes in this precision"
    assert error(flat(ranks), exact) < 1.2 * plain_error
    assert error(flat(ranks), flat([plain])) < 0.4 * plain_error, "the roundings are those of plain Lightning"
    loss = sum(plain["losses"][:num_microbatches])  # each is divided by their number
    assert all(rank["losses"][0] == pytest.approx(loss, rel=rounding) for rank in ranks)


@pytest.mark.parametrize("num_microbatches", [slow(1), 3])
def test_double_precision_is_exact(runs: Runs, num_microbatches: int) -> None:
    assert error(flat(runs.pipelined("64-true", num_microbatches)), runs.exact(num_microbatches)) < 1e-12


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
def test_one_process_is_plain_lightning(pool: RankPool, runs: Runs, precision: str) -> None:
    (record,) = pool.run(workers.train, precision, {}, 1, world_size=1)
    assert torch.equal(flat([record]), flat([runs.plain(precision, 1)]))


@pytest.mark.parametrize("precision", [slow("bf16-true"), slow("bf16-mixed"), "16-mixed"])
def test_plugins_of_the_other_lightning(runs: Runs, precision: str) -> None:
    pytest.importorskip("pytorch_lightning")
    arguments = (2, 1, "pytorch_lightning", 1.0)
    exact, plain = runs.exact(2, "pytorch_lightning"), flat([runs.plain(precision, *arguments)])
    found = flat(runs.pipelined(precision, *arguments))
    assert 1e-4 < error(plain, exact) < 0.2
    assert error(found, exact) < 1.2 * error(plain, exact)
    assert error(found, plain) < 0.4 * error(plain, exact)


@pytest.mark.parametrize("precision", [slow("bf16-true"), "bf16-mixed"])
def test_evaluation(pool: RankPool, precision: str) -> None:
    (exact,) = pool.run(workers.evaluate, "32-true", None, world_size=1)
    (plain,) = pool.run(workers.evaluate, precision, None, world_size=1)
    for found in pool.run(workers.evaluate, precision, {}, world_size=2):
        assert found == pytest.approx(plain, rel=2e-2)
        assert abs(found["val_forces_mae"] / exact["val_forces_mae"] - 1) > 1e-5, "in this precision"


# -- loss scales -----------------------------------------------------------------------------------------------------


def test_published_gradients_are_scaled_and_seeds_too(runs: Runs) -> None:
    """Half-precision cotangents of a loss that is this small would underflow without."""
    plain, exact = runs.plain("16-mixed", 1, 1, "lightning", 2.0**-20), runs.exact(1)
    small = flat(runs.pipelined("16-mixed", 1, 1, "lightning", 2.0**-20))
    assert error(small, exact) > 10 * error(flat(runs.pipelined("16-mixed", 1)), exact)
    assert error(small, exact) == pytest.approx(error(flat([plain]), exact), rel=0.2)


# Each is read by one operation, which one rank has.
@pytest.mark.parametrize("name", [slow("layers.0.gate.weight"), "readout.2.weight"])
def test_step_that_overflows_on_one_rank_is_skipped_on_all(runs: Runs, name: str) -> None:
    arguments = (1, 3, "lightning", 2.0**10, f"potential.energy_model.{name}")
    plain, ranks = runs.plain("16-mixed", *arguments), runs.pipelined("16-mixed", *arguments)
    assert [plain["scales"], *(r["scales"] for r in ranks)] == [[1024.0, 512.0, 512.0]] * 3
    assert sum(bool(g.isinf().any()) for r in ranks for g in r["gradients"][1].values()) == 1, "on one rank only"
    for record in (plain, *ranks):
        first, second, third = record["parameters"]
        assert all(torch.equal(second[n], first[n]) for n in first) and record["parameters"][0]
        assert any(not torch.equal(third[n], second[n]) for n in second)


def test_scale_is_halved_until_nothing_overflows(runs: Runs) -> None:
    arguments = (3, 4, "lightning", 2.0**30)
    plain, ranks = runs.plain("16-mixed", *arguments), runs.pipelined("16-mixed", *arguments)
    assert plain["scales"] == [2.0**29, 2.0**28, 2.0**27, 2.0**26]
    assert all(r["scales"] == plain["scales"] for r in ranks)
    assert all(torch.equal(r["parameters"][0][n], v) for r in ranks for n, v in r["parameters"][-1].items())


@pytest.mark.parametrize("algorithm", ["norm", slow("value")])
def test_clipping_comes_after_unscaling(runs: Runs, algorithm: str) -> None:
    limit = 0.05 if algorithm == "norm" else 2e-3
    clip = {"gradient_clip_val": limit, "gradient_clip_algorithm": algorithm}
    ranks = runs.pipelined("16-mixed", 3, 1, "lightning", 2.0**10, None, clip)
    unclipped, clipped = flat(ranks), flat(ranks, "clipped")
    assert error(unclipped, runs.exact(3)) < 1e-2
    expected = unclipped * limit / unclipped.norm() if algorithm == "norm" else unclipped.clamp(-limit, limit)
    assert unclipped.norm() > 2 * limit and error(clipped, expected) < 1e-5


@pytest.mark.parametrize("case", ["unscaled before", "fused", "no gradients"])
def test_scaler_asks_all_ranks(pool: RankPool, case: str) -> None:
    for rank, (scales, made) in enumerate(pool.run(workers.scaled_steps, case, world_size=2)):
        assert scales == [8.0, 4.0, 4.0]
        assert made == ([False] * 3 if (case, rank) == ("no gradients", 0) else [True, False, True])


# -- messages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "schedule"),
    [
        ("32-true", "wavek-zb"),
        slow("64-true", "1f1b-2nd"),
        slow("32-true", "1f1b-2nd"),
        slow("64-true", "wavek-zb"),
    ],
)
def test_messages_in_bfloat16(runs: Runs, precision: str, schedule: str) -> None:
    found = flat(runs.pipelined(precision, 3, message_dtype="bf16", schedule=schedule))
    assert 1e-4 < error(found, runs.exact(3)) < 5e-3


def test_evaluation_has_the_same_messages(pool: RankPool) -> None:
    exact, rounded = (
        pool.run(workers.evaluate, "32-true", {"message_dtype": given}, world_size=2) for given in (None, "bf16")
    )
    assert rounded[0] == rounded[1]
    assert 1e-7 < abs(rounded[0]["val_forces_mae"] / exact[0]["val_forces_mae"] - 1) < 1e-2
