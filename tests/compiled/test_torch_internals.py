"""The private names of torch that compiled phases use are there and do what they are used for."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import sympy
import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.utils._sympy.functions import FloorDiv, ModularIndexing

from lightning_januspipe.compiled import torch_internals as internals


def test_sizes_may_be_zero_and_one_and_are_inputs() -> None:
    mode = internals.symbolic_mode()
    rows = internals.new_size(mode, "rows", 5)
    with mode:
        values = torch.empty([rows, 3])
        index = torch.empty([rows], dtype=torch.int64)

    def function(size: torch.SymInt, x: torch.Tensor, index: torch.Tensor) -> list[torch.Tensor]:
        return [x.new_zeros(size, 3).index_add(0, index, x.sin()).sum(1)]

    graph = internals.traced_graph(function, [rows, values, index])
    assert not internals.size_guards(mode)
    for num in (4, 1, 0):
        x, places = torch.randn(num, 3), torch.arange(num)
        (found,) = graph(num, x, places)
        torch.testing.assert_close(found, x.sin().sum(1))
    assert internals.hint_of(rows) == 5 == internals.hint_of(5)
    assert internals.expression_of(2 * rows) == f"2*{internals.expression_of(rows)}"


@pytest.mark.slow
def test_sums_into_rows_are_concatenated() -> None:
    """As in PaiNN, where inductor by itself reads the sums before they are there."""
    mode = internals.symbolic_mode()
    rows, edges = internals.new_size(mode, "rows", 5), internals.new_size(mode, "edges", 12)
    with mode:
        fakes = [torch.empty(9, 16), torch.empty(edges, 1, 16), torch.empty(16, 16)]
        species, index = torch.empty(rows, dtype=torch.int64), torch.empty(edges, dtype=torch.int64)

    def function(
        rows: Any, edges: Any, table: Tensor, messages: Tensor, weight: Tensor, species: Tensor, index: Tensor
    ) -> list[Tensor]:
        x = torch.nn.functional.embedding(species, table).unsqueeze(1)
        features = (x.view(rows, 16) @ weight).view(rows, 1, 16).sigmoid()
        sums = x.new_zeros(rows, 1, 16).index_add(0, index, messages * features[index])
        vectors = x.new_zeros(rows, 3, 16).index_add(0, index, messages.expand(-1, 3, -1))
        total = x + sums
        norms = (vectors.view(3 * rows, 16) @ weight).view(rows, 3, 16).square().sum(1, keepdim=True).add(1e-8).sqrt()
        return [total, torch.cat([total, norms], -1)]

    graph = internals.traced_graph(function, [rows, edges, *fakes, species, index])
    places = torch.arange(7) % 4
    given = 4, 7, torch.randn(9, 16), torch.randn(7, 1, 16), torch.randn(16, 16), torch.arange(4), places
    for found, expected in zip(internals.compiled(graph, mode)(*given), graph(*given), strict=True):
        torch.testing.assert_close(found, expected)


def test_guards_are_recorded() -> None:
    mode = internals.symbolic_mode()
    rows = internals.new_size(mode, "rows", 6)
    assert rows % 2 == 0
    (guard,) = internals.size_guards(mode)
    assert "Mod" in guard


def test_repetitions_are_removed() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    one, two = (graph.call_function(torch.ops.aten.sin.default, (x,)) for _ in range(2))
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (one, two)),))
    found = internals.without_repetitions(graph)
    assert sum(n.target is torch.ops.aten.sin.default for n in found.nodes) == 1


def test_tracing_decomposes_what_inductor_decomposes() -> None:
    mode = internals.symbolic_mode()
    with mode:
        x = torch.empty(4)
    graph = internals.traced_graph(lambda x: [torch.nn.functional.silu(x)], [x])
    assert not any("silu" in str(n.target) for n in graph.graph.nodes)


def test_inductor_keeps_what_it_compiles_in_the_given_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the user has named one: torch writes its default into the same variable."""
    variable = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.delenv(variable, raising=False)
    default = cache_dir()
    assert os.environ[variable] == default
    with internals.inductor_cache(tmp_path):
        assert cache_dir() == str(tmp_path)
    with internals.inductor_cache(None):
        assert cache_dir() == default
    monkeypatch.setenv(variable, str(tmp_path / "own"))
    with internals.inductor_cache(tmp_path):
        assert cache_dir() == str(tmp_path / "own")


def test_another_process_gets_the_same_settings() -> None:
    settings = internals.Settings.current("cpu")
    assert settings.inductor and settings.machine
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64 if dtype == torch.float32 else torch.float32)
        changed = internals.Settings.current("cpu")
        assert changed != settings
        settings.apply()
        assert internals.Settings.current("cpu") == settings
    finally:
        torch.set_default_dtype(dtype)


def test_only_what_was_compiled_has_bytes() -> None:
    """Real ones are written and read in test_compiler.py."""
    assert internals.packed(lambda *inputs: list(inputs)) is None


def test_a_process_that_is_one_of_several_compiles_in_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internals.inductor_config, "compile_threads", 4)
    internals.compile_one_by_one()
    assert internals.inductor_config.compile_threads == 1


def test_exported_files_call_the_checks_of_their_inputs() -> None:
    wrapper = internals.CppWrapperCpu
    before = wrapper.generate_input_output_runtime_checks
    source = inspect.getsource(wrapper)
    assert "__check_inputs_outputs(input_handles, output_handles);" in source
    assert "if (_check_aoti_runtime_check_inputs_env())" in source

    class Prefix:
        def splice_aot(self, code: str) -> None:
            self.code = code

    made = mock.Mock(prefix=Prefix())
    with internals.checking_inputs("the checks"):
        wrapper.generate_input_output_runtime_checks(made)
    assert made.prefix.code == "the checks"
    assert wrapper.generate_input_output_runtime_checks is before


@pytest.mark.parametrize(
    ("index", "is_simplified"),
    [
        ("(size + 1) * d0 + d1", False),
        ("3 * (d0 + size * (d1 + 2)) + d1 * (5 - 3 * size) - 3 * d0", False),
        ("4 * d0 + d1 + 7", False),
        ("FloorDiv(d0, 16) + size * d1", True),
        ("ModularIndexing(d0, 1, 32) + 2 * d1", True),
        ("(d0 + 1) / size + d1", True),
    ],
)
def test_strides_of_indices_are_those_that_inductor_finds(index: str, is_simplified: bool) -> None:
    names = {"FloorDiv": FloorDiv, "ModularIndexing": ModularIndexing}
    symbols = {n: sympy.Symbol(n, integer=True, nonnegative=True) for n in ("d0", "d1", "size")}
    expression, sizevars = eval(index, names | symbols), internals.sizevars
    variables = [symbols["d0"], symbols["d1"]]
    sizevars.stride_at_vec_range.cache_clear()
    expected = [sizevars.stride_at_vec_range(expression, v, 16) for v in variables]
    sizevars.stride_at_vec_range.cache_clear()
    with (
        mock.patch.object(sizevars, "simplify_index_in_vec_range", wraps=sizevars.simplify_index_in_vec_range) as calls,
        internals.indices_multiplied_out(),
    ):
        found = [sizevars.stride_at_vec_range(expression, v, 16) for v in variables]
    sizevars.stride_at_vec_range.cache_clear()
    assert calls.called == is_simplified
    assert all(sympy.expand(a - b) == 0 for a, b in zip(found, expected, strict=True))
    assert [a.is_number for a in found] == [b.is_number for b in expected]
