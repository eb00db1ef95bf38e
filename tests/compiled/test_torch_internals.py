"""The private names of torch that compiled phases use are there and do what they are used for."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch._inductor.runtime.cache_dir_utils import cache_dir

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


def test_guards_are_recorded() -> None:
    mode = internals.symbolic_mode()
    rows = internals.new_size(mode, "rows", 6)
    assert rows % 2 == 0
    (guard,) = internals.size_guards(mode)
    assert "Mod" in str(guard)


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
