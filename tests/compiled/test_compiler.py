"""A stage that inductor compiles: exact for sizes that were never seen, and read from the cache by a second start."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sympy
import torch
from capture_models import DTYPE, OTHER, TRACED, Batch, Potential, Step, Traced, assert_parity, make_batch
from compiled_models import factory, joint_graphs
from torch import nn
from torch._inductor import cpp_builder

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.compiled import compiler as compiler_module
from lightning_januspipe.compiled import torch_internals
from lightning_januspipe.compiled.background import BackgroundCompile
from lightning_januspipe.compiled.compiled_stage import CompiledStage
from lightning_januspipe.compiled.compiler import StageCompiler
from lightning_januspipe.compiled.phase_graphs import phase_graphs
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.engine.stage import Stage

SIZES = [(2, 5, 1, 3), (1,), (1, 1, 1)]
"""Other sizes than traced; one atom; no edges."""


class Springs(nn.Module):
    """The smallest potential whose four phases all have work: the C++ compiler takes its time for each operation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.energies = nn.Embedding(3, 1, dtype=DTYPE)
        self.stiffness = nn.Parameter(torch.tensor(0.7, dtype=DTYPE))

    def forward(self, batch: Batch) -> Batch:
        """Returns energies and forces of springs between all atoms of a structure, and of the atoms themselves."""
        positions = batch["positions"].detach().requires_grad_()
        source, target = batch["edges"]
        # A transposed tensor that is reshaped: torch asks whether there is a single edge.
        vectors = (positions[target] - positions[source]).t().reshape(-1).view(3, -1).t()
        of_edges = torch.exp(-self.stiffness * (vectors * vectors).sum(-1))
        of_atoms = self.energies(batch["species"])[:, 0].index_add(0, target, of_edges)
        energy = of_atoms.new_zeros(batch["cell"].shape[0]).index_add(0, batch["index"], of_atoms)
        (derivative,) = torch.autograd.grad([energy.sum()], [positions], create_graph=self.training)
        return {"energy": energy, "forces": -derivative}


class SpringStep(Step):
    """A loss without stresses."""

    def training_step(self, batch: Batch) -> Any:
        """Returns the loss."""
        out = self.potential(batch)
        return ((out["energy"] - batch["energy"]) ** 2).mean() + ((out["forces"] - batch["forces"]) ** 2).mean()


class Transposed(Springs):
    """Takes a view that only the order of a tensor's entries in memory allows."""

    def forward(self, batch: Batch) -> Batch:
        """Returns the same, with energies of atoms that are shifted."""
        out = super().forward(batch)
        shifts = batch["shifts"].t().view(-1)[: len(batch["species"])]
        return {**out, "energy": out["energy"] + 0 * shifts.sum() * self.stiffness}


def transposed(sizes: tuple[int, ...]) -> Batch:
    """Returns a batch with a tensor (N, 2), whose columns follow each other in memory."""
    batch = make_batch(sizes)
    return {**batch, "shifts": torch.ones(2, len(batch["species"]), dtype=DTYPE).t()}


def test_views_of_transposed_tensors() -> None:
    """Graphs get contiguous tensors, of which these views have to be copies."""
    traced = Traced(SpringStep(Transposed()), transposed(TRACED), transposed(OTHER))
    captured = traced.cut(1)
    inputs = captured.inputs(traced.potential)
    first, second = (captured.bind_sizes(inputs((transposed(sizes),), {})) for sizes in (TRACED, OTHER))
    compiler = StageCompiler((first, second), "cpu", interprets=True)
    for sizes in SIZES:
        assert_parity(captured, traced.module, transposed(sizes), make_stage=compiler)
    assert not compiler.refused


@pytest.mark.slow  # most of it in the C++ compiler
@pytest.mark.skipif(torch.version.cuda is not None, reason="compiles for the CPU")
@pytest.mark.parametrize("where", ["in this process", "in the background"])
def test_a_stage_compiled_by_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    traced = Traced(SpringStep(Springs()))
    captured = traced.cut(1)
    inputs = captured.inputs(traced.potential)
    calls = [traced.call_on(make_batch(sizes)) for sizes in (TRACED, OTHER)]
    first, second = (captured.bind_sizes(inputs(c.args, c.kwargs)) for c in calls)
    commands: list[str] = []
    monkeypatch.setattr(cpp_builder, "run_compile_cmd", noting(commands, cpp_builder.run_compile_cmd))
    stage = captured.stage(0, traced.potential)
    if where == "in the background":
        source, key = StageCompiler((first, second), "cpu").source(stage, captured.chain)
        assert key is not None
        background = BackgroundCompile({key: source}, tmp_path / "compiled", tmp_path / "inductor", num_workers=2)
        while not background.has_ended():
            time.sleep(0.1)
        assert not background.result().failed
        background.end()
    for compiles in (True, False) if where == "in this process" else (False,):
        made: list[Stage] = []
        compiler = StageCompiler(
            (first, second),
            "cpu",
            tolerance=1e-9,
            cache=tmp_path / "inductor",
            artifacts=tmp_path / "compiled",
            compiles=compiles,
        )

        def make(
            function: StageFunction,
            gradients: GradientBuffers,
            chain: ChainSpec,
            compiler: StageCompiler = compiler,
            made: list[Stage] = made,
        ) -> Stage:
            made.append(compiler(function, gradients, chain))
            return made[-1]

        for sizes in SIZES:
            assert_parity(captured, traced.module, make_batch(sizes, seed=1), make_stage=make)
        assert not compiler.refused and compiler.report().num_compiled == 1
        assert all(isinstance(stage, CompiledStage) and not stage.num_misfits for stage in made)
        libraries = [c for c in commands if "main.cpp" in c]
        assert len(libraries) == (4 if compiles else 0), "a phase is not one library, or the second start has compiled"
        commands.clear()


def noting(commands: list[str], run: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that notes the commands of the C++ compiler and runs them."""

    def noted(command: str, *arguments: Any, **options: Any) -> Any:
        commands.append(command)
        return run(command, *arguments, **options)

    return noted


def test_guards_that_cannot_be_evaluated_leave_a_stage_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may record a function of sizes that is not known here."""
    traced = Traced(Step(Potential(1)))
    captured = traced.cut(1)
    inputs = captured.inputs(traced.potential)
    calls = [traced.call_on(make_batch(sizes)) for sizes in (TRACED, OTHER)]
    first, second = (captured.bind_sizes(inputs(c.args, c.kwargs)) for c in calls)
    unknown = sympy.Function("Unknown")(sympy.Symbol("s0")) > 1
    monkeypatch.setattr(torch_internals, "size_guards", lambda mode: [str(unknown)])
    monkeypatch.setattr(compiler_module, "compile_graph", lambda graph, mode: graph)
    compiler = StageCompiler((first, second), "cpu")
    stage = compiler(captured.stage(0, traced.potential), GradientBuffers(), captured.chain)
    assert not isinstance(stage, CompiledStage)
    assert compiler.report().eager == ("stage 0 runs eagerly: KeyError: 'Unknown'",)


def test_phases_that_keep_more_than_was_planned_leave_a_stage_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory limit has planned the schedule for what eager phases keep."""
    traced = Traced(Step(Potential(1)))
    captured = traced.cut(1)
    inputs = captured.inputs(traced.potential)
    first, second = (
        captured.bind_sizes(inputs(c.args, c.kwargs)) for c in (traced.call_on(make_batch(s)) for s in (TRACED, OTHER))
    )
    monkeypatch.setattr(compiler_module, "compile_graph", lambda graph, mode: graph)
    for limit, is_compiled in ((1e9, True), (100.0, False)):
        compiler = StageCompiler((first, second), "cpu", most_bytes=(limit,))
        stage = compiler(captured.stage(0, traced.potential), GradientBuffers(), captured.chain)
        assert isinstance(stage, CompiledStage) is is_compiled
    (line,) = compiler.report().eager
    assert "would keep" in line and "more than the 100 B that the memory limit has room for" in line


def test_stages_of_equal_layers_have_the_same_phases() -> None:
    """They are compiled once; gradients of parameters are right where one stage runs the phases of another."""
    traced = Traced(Step(Potential(4)))
    captured = traced.cut(4)
    keys = keys_of(traced, captured)
    assert keys[1] == keys[2] and len({*keys}) == 3
    joints = joint_graphs(traced, captured)
    of_key = {key: phase_graphs(joint, "pointwise") for key, joint in zip(keys, joints, strict=True)}
    batch = make_batch((2, 5, 3), seed=1)
    assert_parity(captured, traced.module, batch, make_stage=factory([of_key[key] for key in keys]))


@pytest.mark.parametrize("change", ["operation", "number", "frozen"])
def test_stages_of_unequal_layers_have_not(change: str) -> None:
    potential = Potential(4)
    if change == "frozen":
        potential.layers[2].mix.weight.requires_grad_(False)
    else:
        potential.layers[2].mix = nn.Sequential(potential.layers[2].mix, nn.ELU(0.5 if change == "number" else 1.0))
        potential.layers[1].mix = nn.Sequential(potential.layers[1].mix, nn.ELU() if change == "number" else nn.CELU())
    traced = Traced(Step(potential))
    keys = keys_of(traced, traced.cut(4))
    assert len({*keys}) == 4


def keys_of(traced: Traced, captured: CapturedPotential) -> list[str | None]:
    """Returns the keys of the stages in the cache."""
    inputs = captured.inputs(traced.potential)
    calls = [traced.call_on(make_batch(sizes)) for sizes in (TRACED, OTHER)]
    first, second = (captured.bind_sizes(inputs(c.args, c.kwargs)) for c in calls)
    compiler = StageCompiler((first, second), "cpu")
    stages = [captured.stage(i, traced.potential) for i in range(captured.num_stages)]
    return [compiler.source(stage, captured.chain)[1] for stage in stages]
