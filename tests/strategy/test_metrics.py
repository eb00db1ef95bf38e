"""``self.log`` of a step that runs once for each micro-batch, and torchmetrics that are gathered over replicas."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric, MetricCollection

from lightning_januspipe.strategy import metric_gather
from lightning_januspipe.strategy.metric_gather import ReplicaGather
from lightning_januspipe.strategy.microbatch_log import LogRecorder


def _replayed(*calls: tuple[tuple[Any, ...], dict[str, Any]], sizes: list[int] | None = None) -> dict[str, Any]:
    """The calls of ``log`` that a recorder makes of these, by name."""
    recorder = LogRecorder()
    for i, (args, kwargs) in enumerate(calls):
        recorder.num_samples = sizes[i] if sizes else None
        recorder(*args, **kwargs)
    found: dict[str, Any] = {}

    def log(name: str, value: Any, **kwargs: Any) -> None:
        assert name not in found, f"{name} is logged twice"
        found[name] = (value, kwargs)

    recorder.replay(log)
    return found


def _values(*values: Any, **kwargs: Any) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    return [(("loss", v), kwargs) for v in values]


def test_mean_is_weighted_with_the_numbers_of_samples() -> None:
    value, kwargs = _replayed(*_values(torch.tensor(1.0), torch.tensor(5.0)), sizes=[3, 1])["loss"]
    assert value.item() == 2.0
    assert kwargs == {"batch_size": 4}


def test_batch_sizes_given_by_the_step_go_first() -> None:
    calls = [(("loss", torch.tensor(1.0)), {"batch_size": 1}), (("loss", torch.tensor(5.0)), {"batch_size": 3})]
    value, kwargs = _replayed(*calls, sizes=[3, 1])["loss"]
    assert value.item() == 4.0
    assert kwargs["batch_size"] == 4


def test_without_any_size_the_mean_is_plain() -> None:
    value, kwargs = _replayed(*_values(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(6.0)))["loss"]
    assert value.item() == 3.0
    assert kwargs == {}


@pytest.mark.parametrize(
    ("reduce_fx", "expected"),
    [
        ("sum", 7.0),
        ("max", 4.0),
        ("min", 1.0),
        (torch.sum, 7.0),
        (torch.max, 4.0),
        (min, 1.0),
        ("mean", 1.6),
        (torch.mean, 1.6),
    ],
)
def test_reductions(reduce_fx: Any, expected: float) -> None:
    calls = _values(torch.tensor(1.0), torch.tensor(4.0), torch.tensor(2.0), reduce_fx=reduce_fx)
    value, kwargs = _replayed(*calls, sizes=[7, 1, 2])["loss"]
    assert value.item() == pytest.approx(expected * (1.0 if expected != 1.6 else 1.5 / 1.6))
    assert kwargs["reduce_fx"] is reduce_fx


def test_arguments_are_kept_by_name() -> None:
    calls = [(("loss", 1.0, True, False), {"on_epoch": True, "sync_dist": True})] * 2
    _, kwargs = _replayed(*calls, sizes=[2, 2])["loss"]
    assert kwargs == {"prog_bar": True, "logger": False, "on_epoch": True, "sync_dist": True, "batch_size": 4}


def test_python_numbers_and_vectors() -> None:
    found = _replayed(
        (("count", 1), {}),
        (("count", 4), {}),
        (("pair", torch.tensor([1.0, 0.0])), {}),
        (("pair", torch.tensor([2.0, 4.0])), {}),
        sizes=[2, 1, 3, 1],
    )
    assert found["count"][0].item() == 2.0
    assert found["pair"][0].tolist() == [1.25, 1.0]


def test_precision_is_kept() -> None:
    value, _ = _replayed(
        *_values(torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0 + 1e-12, dtype=torch.float64))
    )["loss"]
    assert value.dtype == torch.float64 and value.item() == pytest.approx(1 + 5e-13, abs=1e-15)


def test_a_metric_object_is_logged_as_it_is() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")
    metric = torchmetrics.MeanMetric()
    metric.update(torch.tensor([1.0, 3.0]))
    assert _replayed(*_values(metric, metric), sizes=[1, 1])["loss"][0] is metric


def test_one_micro_batch_logs_its_own_value() -> None:
    value = torch.tensor(3, dtype=torch.int64)
    found, kwargs = _replayed(*_values(value), sizes=[5])["loss"]
    assert found.dtype == torch.int64 and found.item() == 3 and kwargs == {"batch_size": 5}


def test_values_are_copied_and_detached() -> None:
    recorder = LogRecorder()
    value = torch.ones(2, requires_grad=True)
    total = value * 1.0
    recorder("a", total)
    with torch.no_grad():
        total.add_(5.0)
    found: list[torch.Tensor] = []
    recorder.replay(lambda name, value, **_: found.append(value))
    assert found[0].tolist() == [1.0, 1.0] and not found[0].requires_grad


def test_names_that_not_every_micro_batch_logs() -> None:
    found = _replayed((("a", 1.0), {}), (("b", 2.0), {}), (("a", 3.0), {}), sizes=[1, 1, 3])
    assert found["a"][0].item() == 2.5 and found["a"][1]["batch_size"] == 4
    assert found["b"] == (2.0, {"batch_size": 1})


class TestReplicaGather:
    def test_metrics_are_as_before_when_it_is_detached(self) -> None:
        own, group, gather = (lambda state, group: [state]), object(), ReplicaGather()
        module = MetricCollection({"a": MeanMetric(), "b": MeanMetric(dist_sync_fn=own)})
        module["c"] = MeanMetric(process_group=group)
        gather.attach(module, "replicas")
        assert module["a"].dist_sync_fn is gather
        gather.detach(module)
        for found, expected in (("a", (None, None)), ("b", (own, None)), ("c", (None, group))):
            assert (module[found].dist_sync_fn, module[found].process_group) == expected

    def test_group(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from torchmetrics.utilities import distributed

        monkeypatch.setattr(distributed, "gather_all_tensors", lambda state, group: [state + 1, group])
        gather, metric = ReplicaGather(), MeanMetric()
        gather.attach(metric, "replicas")
        assert metric.dist_sync_fn(torch.tensor(1), group=None) == [2, "replicas"]
        with monkeypatch.context() as patch:
            patch.setattr(metric_gather, "dist", SimpleNamespace(group=SimpleNamespace(WORLD="one rank")))
            assert metric.dist_sync_fn(torch.tensor(1), group=None) == [2, "one rank"]
        gather.detach(metric)
        assert gather(torch.tensor(1)) == [2, None]

    def test_pickles_and_copies(self) -> None:
        """A module is saved with its metrics, as a hyperparameter; nothing in the file names this package."""
        metric, gather = MeanMetric(), ReplicaGather()
        gather.attach(metric, lambda: "a process group cannot be pickled")
        metric.update(3.0)
        assert copy.deepcopy(metric).dist_sync_fn is gather
        saved = pickle.dumps(metric)
        assert b"januspipe" not in saved
        assert pickle.loads(saved).dist_sync_fn is None and pickle.loads(saved).compute() == 3.0
