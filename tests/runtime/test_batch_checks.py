"""A branch that only a batch of another kind takes is seen when that batch comes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from capture_models import OTHER, TRACED, Batch, Potential, Step, make_batch
from torch import Tensor

from lightning_januspipe.capture import Capture, CaptureError, capture_module
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.runtime.batch_checks import BatchChecks
from lightning_januspipe.runtime.user_step import CapturedStep


class Single(Potential):
    """Another energy for one structure alone."""

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        energy = super().pool(values, batch)
        return 2.0 * energy if batch["cell"].shape[0] == 1 else energy


class SqueezedSingle(Potential):
    """Another way to the same energy for one structure alone."""

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        return values.sum().reshape(1) if batch["cell"].shape[0] == 1 else super().pool(values, batch)


class NoEdges(Potential):
    """Another energy where there are no edges."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        if batch["edges"].shape[1] == 0:
            return 0.5 * self.embedding(batch["species"]) + 0.0 * vectors.sum()
        return super().features(batch, vectors)


class Charged(Potential):
    """Reads an entry that not all batches have."""

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        energy = super().pool(values, batch)
        return energy * batch["charge"] if "charge" in batch else energy


def captured(potential: Potential) -> tuple[Step, Capture]:
    module = Step(potential)
    traced, other = make_batch(TRACED), make_batch(OTHER)
    return module, capture_module(module, module.training_step, traced, other, [[0, 1]])


def prepared(module: Step, found: Capture, *batches: Any) -> None:
    checks = BatchChecks(found.potential, module)
    step = CapturedStep(found.potential, module, GradientBuffers().add, checks.note)
    for index, batch in enumerate(batches):
        step.prepare(index, module.training_step, batch)
        checks.run()


@pytest.mark.parametrize(
    ("potential", "batch", "words"),
    [
        (Single, make_batch((5,)), r"this batch has .*size 1 in dimension 0 of args\[0\]\['cell'\].*differs from"),
        (NoEdges, make_batch((1, 1)), r"size 0 in dimension 1 of args\[0\]\['edges'\]"),
        (
            Charged,
            {**make_batch(OTHER), "charge": torch.tensor(3.0, dtype=torch.float64)},
            r"an entry args\[0\]\['charge'\]",
        ),
    ],
)
def test_another_energy_is_refused(potential: type[Potential], batch: Batch, words: str) -> None:
    module, found = captured(potential())
    prepared(module, found, make_batch(OTHER), make_batch(TRACED))
    with pytest.raises(CaptureError, match=words):
        prepared(module, found, batch)
    module.potential.eval()  # as in validation
    with pytest.raises(CaptureError, match=words):
        prepared(module, found, batch)


def test_each_kind_is_validated_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_januspipe.runtime import batch_checks

    seen = []
    monkeypatch.setattr(
        batch_checks, "validate_stages", lambda _, potential, call, mode: seen.append(call.args[0]["cell"].shape[0])
    )
    module, found = captured(SqueezedSingle())
    with_label = {**make_batch(OTHER), "label": torch.zeros(2)}
    prepared(module, found, make_batch(OTHER), make_batch((4,)), make_batch((3,)), with_label, with_label)
    assert seen == [1, 2]


def test_right_kinds_pass_and_nothing_is_changed() -> None:
    module, found = captured(SqueezedSingle())
    before = torch.get_rng_state()
    prepared(module, found, make_batch((4,)))
    assert all(p.grad is None for p in module.parameters())
    torch.set_rng_state(before)
    torch.randint(2**31, ())  # the one number that every micro-batch takes
    after = torch.get_rng_state()
    torch.set_rng_state(before)
    prepared(module, found, make_batch((4,)))
    assert torch.equal(torch.get_rng_state(), after)


def test_lists_may_have_any_length() -> None:
    module = Step(Potential())
    names = ["a", "b", "c", "d", "e"]
    traced, other = ({**make_batch(s), "names": names[: len(s)]} for s in (TRACED, OTHER))
    found = capture_module(module, module.training_step, traced, other, [[0, 1]])
    longer = {**make_batch((2, 2, 2, 3, 2)), "names": names}
    symbols = found.potential.bind_sizes(found.potential.inputs(module.potential)((longer,), {}))
    assert found.potential.unvalidated_kinds(module.potential, (longer,), {}, symbols) == frozenset()
