"""A stage that inductor compiles: exact for sizes that were never seen, and read from the cache by a second start."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy
import torch
from capture_models import OTHER, TRACED, Potential, Step, Traced, assert_parity, make_batch
from torch._dynamo.utils import counters

from lightning_januspipe.compiled import compiler as compiler_module
from lightning_januspipe.compiled import torch_internals
from lightning_januspipe.compiled.compiled_stage import CompiledStage
from lightning_januspipe.compiled.compiler import StageCompiler
from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.specs import ChainSpec, StageFunction
from lightning_januspipe.engine.stage import Stage

SIZES = [(2, 5, 1, 3), (1,), (1, 1, 1)]
"""Other sizes than traced; one atom; no edges."""


@pytest.mark.slow  # half a minute of CPU time, most of it in the C++ compiler
@pytest.mark.timeout(1800)
@pytest.mark.skipif(torch.version.cuda is not None, reason="compiles for the CPU")
def test_a_stage_compiled_by_inductor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    traced = Traced(Step(Potential(1)))
    captured = traced.cut(1)
    inputs = captured.inputs(traced.potential)
    calls = [traced.call_on(make_batch(sizes)) for sizes in (TRACED, OTHER)]
    first, second = (captured.bind_sizes(inputs(c.args, c.kwargs)) for c in calls)
    hits = []
    for _ in range(2):
        made: list[Stage] = []
        compiler = StageCompiler((first, second), "cpu", tolerance=1e-9, cache=tmp_path)

        def make(
            function: StageFunction,
            gradients: GradientBuffers,
            chain: ChainSpec,
            compiler: StageCompiler = compiler,
            made: list[Stage] = made,
        ) -> Stage:
            made.append(compiler(function, gradients, chain))
            return made[-1]

        before = counters["inductor"]["fxgraph_cache_hit"]
        for sizes in SIZES:
            assert_parity(captured, traced.module, make_batch(sizes, seed=1), make_stage=make)
        hits.append(counters["inductor"]["fxgraph_cache_hit"] - before)
        assert not compiler.refused and compiler.report().num_compiled == 1
        assert all(isinstance(stage, CompiledStage) and not stage.num_misfits for stage in made)
        torch._dynamo.reset()
    assert any(tmp_path.iterdir()), "nothing was kept in the folder"
    assert hits == [0, 4], "the second start does not find FE, FF, BF and BE"


def test_conditions_that_cannot_be_evaluated_leave_a_stage_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch may record a function of sizes that is not known here."""
    traced = Traced(Step(Potential(1)))
    captured = traced.cut(1)
    inputs = captured.inputs(traced.potential)
    calls = [traced.call_on(make_batch(sizes)) for sizes in (TRACED, OTHER)]
    first, second = (captured.bind_sizes(inputs(c.args, c.kwargs)) for c in calls)
    unknown = sympy.Function("Unknown")(sympy.Symbol("s0")) > 1
    monkeypatch.setattr(torch_internals, "size_guards", lambda mode: [unknown])
    monkeypatch.setattr(compiler_module, "compile_graph", lambda graph, mode: graph)
    compiler = StageCompiler((first, second), "cpu")
    stage = compiler(captured.stage(0, traced.potential), GradientBuffers(), captured.chain)
    assert not isinstance(stage, CompiledStage)
    assert compiler.report().eager == ("stage 0 runs eagerly: KeyError: 'Unknown'",)
