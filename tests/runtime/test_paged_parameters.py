"""Modules whose parameters are in a file compute and are captured as others, with a part of them in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from capture_models import OTHER, TRACED, Potential, Step, make_batch
from torch import Tensor, nn

from lightning_januspipe.capture import Capture, PhaseMode, capture_module
from lightning_januspipe.capture.validate import against_eager
from lightning_januspipe.engine.clock import clock
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.runtime.initial_values import take_values
from lightning_januspipe.runtime.paged_parameters import PagedParameters, ParameterFile

LAYER = 50 * 50 * 8


def _layers() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(50, 50), nn.Tanh())]
    return nn.Sequential(*layers).double()


def _in_file(module: nn.Module, folder: Path) -> ParameterFile:
    file = ParameterFile(folder)
    for parameter in module.parameters():
        file.write(parameter, parameter)
        take_values(parameter)
    return file


def _gradients_of_force_loss(module: nn.Module) -> list[Tensor | None]:
    x = torch.linspace(-1, 1, 350, dtype=torch.float64).view(7, 50).requires_grad_()
    (force,) = torch.autograd.grad((module(x) ** 2).sum(), x, create_graph=True)
    return list(torch.autograd.grad((force**2).sum(), list(module.parameters()), allow_unused=True))


def test_derivatives_of_both_orders_are_the_same_bits(tmp_path: Path) -> None:
    expected, module = _gradients_of_force_loss(_layers()), _layers()
    pages, most = PagedParameters(_in_file(module, tmp_path), "cpu", 2.5 * LAYER), 0
    bring = PagedParameters._bring

    def counted(of: PagedParameters, wanted: Any) -> None:
        nonlocal most
        bring(of, wanted)
        most = max(most, sum(p.untyped_storage().nbytes() for p in module.parameters()))

    with patch.object(PagedParameters, "_bring", counted), pages.on(module.parameters()):
        before = clock()
        found = _gradients_of_force_loss(module)
        assert pages.seconds > 0 and clock() > before
    assert all(p.is_meta for p in module.parameters()) and not list(tmp_path.iterdir())
    assert LAYER < most <= 2.5 * LAYER
    for a, b in zip(expected, found, strict=True):
        assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def test_what_is_written_is_there_in_the_next_block(tmp_path: Path) -> None:
    module = _layers()
    file = _in_file(module, tmp_path)
    first, second, *others = [p for p in module.parameters() if p.dim() == 2]
    expected = {p: file.values(p) for p in others}
    with PagedParameters(file, "cpu", 1.5 * LAYER).on(module.parameters()), torch.no_grad():
        first.fill_(3.0)
        second.data = torch.full((50, 50), 4.0, dtype=torch.float64)
        for parameter in others:
            parameter.sum()
    with PagedParameters(file, "cpu", 1.5 * LAYER).on(module.parameters()), torch.no_grad():
        assert bool((first == 3.0).all()) and bool((second == 4.0).all())
        for parameter, values in expected.items():
            assert torch.equal(parameter, values)
    module.float()
    assert file.values(first).dtype == torch.float32 and bool((file.values(first) == 3.0).all())


def _captured(module: Step, gradient_bytes: float | None) -> Capture:
    mode = PhaseMode(gradient_bytes=gradient_bytes)
    traced, other = make_batch(TRACED), make_batch(OTHER)
    return capture_module(module, module.training_step, traced, other, [[0, 1]], phase_mode=mode)


def test_a_capture_is_the_same_with_a_part_of_the_gradients_at_once(tmp_path: Path) -> None:
    expected, module = _captured(Step(Potential()), None).potential, Step(Potential())
    size = sum(p.nbytes for p in module.parameters())
    file, groups = _in_file(module, tmp_path), []
    run_eager = against_eager.run_eager

    def noted(*given: Any, **more: Any) -> Any:
        found = run_eager(*given, **more)
        groups.append(sum(g.nbytes for g in found.gradients.values()))
        return found

    pages = PagedParameters(file, "cpu", size / 2)
    with patch.object(against_eager, "run_eager", noted), pages.on(module.parameters()):
        found = _captured(module, size / 2).potential
    assert str(found.program.nodes) == str(expected.program.nodes)
    assert found.parameter_stages().keys() == expected.parameter_stages().keys()
    assert len(groups) > 2 and max(groups) <= size / 2 and all(p.is_meta for p in module.parameters())


@pytest.mark.parametrize("wrong", ["first", "last"])
def test_a_wrong_gradient_is_found_in_every_group(tmp_path: Path, wrong: str) -> None:
    module = Step(Potential())
    trained = [p for p in module.potential.parameters() if p.requires_grad]
    chosen = trained[0 if wrong == "first" else -1]
    add = GradientBuffers.add

    def doubled(sums: GradientBuffers, parameters: Any, gradients: Any) -> None:
        scaled = [2 * g if p is chosen and g is not None else g for p, g in zip(parameters, gradients, strict=True)]
        add(sums, parameters, scaled)

    with patch.object(GradientBuffers, "add", doubled), pytest.raises(CaptureError, match="parameter gradient of a"):
        _captured(module, 1.0)
