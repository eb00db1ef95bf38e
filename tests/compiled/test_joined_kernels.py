"""The C++ kernels of a graph are compiled as one library: the compiler takes longer to begin than for most kernels."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._inductor import cpp_builder

from lightning_januspipe.compiled import torch_internals as internals
from lightning_januspipe.compiled.joined_kernels import joined


def function(x: Tensor, y: Tensor) -> list[Tensor]:
    """Has a kernel before a matrix product, and two after it that nothing fuses."""
    product = x.exp() @ y
    return [product.cumsum(0), product.relu().sum(1)]


def graph_of(traced: torch.fx.GraphModule) -> torch.fx.GraphModule:
    """Returns a graph as those of phases are made, which torch can write down."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(traced.graph, {}))
    return torch.fx.GraphModule(traced, graph)


@pytest.mark.slow
@pytest.mark.skipif(torch.version.cuda is not None, reason="compiles for the CPU")
@pytest.mark.parametrize("is_known", [True, False])
def test_kernels_of_a_graph_are_one_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_known: bool) -> None:
    """Or one for each kernel, where torch writes bindings in another way."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    if not is_known:
        monkeypatch.setattr(internals, "joined", lambda kernels, bindings: None)
    commands, run = list[str](), cpp_builder.run_compile_cmd

    def noted(command: str, *arguments: object, **options: object) -> object:
        commands.append(command)
        return run(command, *arguments, **options)

    monkeypatch.setattr(cpp_builder, "run_compile_cmd", noted)
    mode = internals.symbolic_mode()
    rows = internals.new_size(mode, "rows", 6)
    with mode:
        inputs = torch.empty([rows, 3]), torch.empty([3, 4])
    with internals.inductor_config.patch(compile_threads=1):
        compiled = internals.compiled(graph_of(internals.traced_graph(function, inputs)), mode)
    libraries = [command for command in commands if "main.cpp" in command]
    assert len(libraries) == 1 if is_known else len(libraries) >= 2
    content = internals.packed(compiled)
    assert content is not None
    again = internals.unpacked(content)
    for num in (5, 1):
        x, y = torch.randn(num, 3), torch.randn(3, 4)
        for run_compiled in (compiled, again):
            for found, expected in zip(run_compiled(x, y), function(x, y), strict=True):
                torch.testing.assert_close(found, expected)
    assert len([command for command in commands if "main.cpp" in command]) == len(libraries)


def test_other_bindings_are_not_joined() -> None:
    binding = internals._binding(["const float*", "float*"])
    assert "parse_arg<float*>(args, 1)" in binding
    source = joined(['#include <cmath>\nextern "C" void kernel(const float* x, float* y) {}'] * 2, [binding] * 2)
    assert source is not None and source.count("#include <cmath>") == 1
    assert all(f'"kernel_{i}", kernel_{i}_py' in source and f"        kernel_{i}(parse_arg" in source for i in (0, 1))
    assert joined([""], [binding.replace("METH_VARARGS", "METH_FASTCALL")]) is None
