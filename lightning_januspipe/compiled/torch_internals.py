"""Wraps the private names of torch that compiled phases use, each in a function that says what it is needed for.

``tests/compiled/test_torch_internals.py`` pins every one of them, so that a torch without it fails there and not in a
training run.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

import sympy
import torch
from torch import SymInt, Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.source import ConstantSource
from torch._functorch.compile_utils import fx_graph_cse
from torch._guards import TracingContext, tracing
from torch._inductor import config as inductor_config
from torch._inductor import sizevars
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.codegen.cpp_wrapper_cpu import CppWrapperCpu
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch._inductor.scheduler import SchedulerNode
from torch._inductor.standalone_compile import AOTCompiledArtifact
from torch._subclasses import FakeTensorMode as FakeTensorMode
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._triton import has_triton

from lightning_januspipe.compiled.joined_kernels import NAME, joined
from lightning_januspipe.compiled.small_products import products_of_small_matrices
from lightning_januspipe.compiled.whole_slices import gradient_of_slice
from lightning_januspipe.errors import CaptureError


class _AnySizes(ShapeEnv):
    """Notes sizes of which torch has asked whether they are 1, instead of taking for granted that they are not.

    Torch asks this whenever it wants to know whether a tensor is contiguous, such as a transposed gradient that
    autograd reshapes: strides of a dimension of size 1 do not matter. What it does for other sizes is right for 1 too,
    unless shapes depend on the answer; :func:`~.size_one.guards_of_ones` finds that out.

    Attributes:
        asked: the sizes, by their names.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.asked: dict[str, None] = {}

    def evaluate_expr(self, orig_expr: Any, *arguments: Any, **options: Any) -> Any:
        symbol = _asked_for_one(orig_expr)
        if symbol is None:
            return super().evaluate_expr(orig_expr, *arguments, **options)
        with self.suppress_guards():
            found = super().evaluate_expr(orig_expr, *arguments, **options)
        if bool(found) is isinstance(orig_expr, sympy.Ne):
            self.asked[str(symbol)] = None
            return found
        return super().evaluate_expr(orig_expr, *arguments, **options)


@lru_cache(maxsize=4096)
def _asked_for_one(relation: Any) -> Any:
    """Returns the size that a relation tells from 1, such as ``s0`` in ``Eq(3*s0, 3)``; None for other relations."""
    if not isinstance(relation, (sympy.Eq, sympy.Ne)) or len(relation.free_symbols) != 1:
        return None
    (symbol,) = relation.free_symbols
    return symbol if relation.lhs.xreplace({symbol: 1}) == relation.rhs.xreplace({symbol: 1}) else None


def symbolic_mode() -> FakeTensorMode:
    """Returns a mode in which tensors have shapes and no values; sizes that are equal by chance stay apart."""
    return FakeTensorMode(shape_env=_AnySizes(duck_shape=False), allow_non_fake_inputs=True)


def plain_mode() -> FakeTensorMode:
    """Returns a mode in which tensors have shapes of numbers, and no values."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def asked_for_one(mode: FakeTensorMode) -> list[str]:
    """Returns the names of the sizes of which torch has asked whether they are 1; it went on as if they were not."""
    env = mode.shape_env
    assert isinstance(env, _AnySizes)
    return list(env.asked)


def new_size(mode: FakeTensorMode, name: str, hint: int) -> SymInt:
    """Returns a symbolic size that may have any value, 0 and 1 included.

    Args:
        mode: the mode that its tensors belong to.
        name: what torch calls it in messages.
        hint: its value in the example call.
    """
    env = mode.shape_env
    assert env is not None
    symbol = env.create_symbol(hint, ConstantSource(name), DimDynamic.DYNAMIC, None, do_not_specialize_zero_one=True)
    size = env.create_symintnode(symbol, hint=hint)
    assert isinstance(size, SymInt)
    return size


def size_guards(mode: FakeTensorMode) -> list[str]:
    """Returns the relations between sizes that torch has taken for granted so far, as sympy writes them.

    They are not simplified: torch replaces a size that it took for another one, and the relation would become "true".
    """
    env = mode.shape_env
    assert env is not None
    return [str(guard.expr) for guard in env.guards if getattr(guard.expr, "free_symbols", None)]


def hint_of(size: int | SymInt) -> int:
    """Returns the value of a size in the example call.

    Raises:
        CaptureError: it depends on values, such as the number of rows that a mask selects.
    """
    if isinstance(size, int):
        return size
    if size.node.hint is None:
        raise CaptureError("a tensor has a size that depends on values, such as the number of rows that a mask selects")
    return int(size.node.hint)


def expression_of(size: int | SymInt) -> str:
    """Returns a size as text, in the names of the symbols."""
    return str(size if isinstance(size, int) else size.node.expr)


@contextmanager
def any_size() -> Iterator[None]:
    """Lets torch treat sizes of 0 and 1 like all others inside the block, without guards against them."""
    with symbolic_config.patch(backed_size_oblivious=True):  # type: ignore[attr-defined]
        yield


@contextmanager
def as_traced() -> Iterator[None]:
    """Gives operations of fake tensors inside the block the results that they have in :func:`traced_graph`."""
    with any_size(), enable_python_dispatcher():
        yield


def traced_graph(function: Callable[..., list[Tensor]], inputs: Sequence[Any]) -> fx.GraphModule:
    """Traces a function of fake tensors and symbolic sizes, in the operations that inductor compiles."""
    aten = torch.ops.aten
    decompositions: dict[Any, Callable[..., Any]] = {
        **select_decomp_table(),
        aten.bmm.default: products_of_small_matrices,
        aten.slice_backward.default: gradient_of_slice,
    }
    with as_traced():
        trace = make_fx(function, decompositions, tracing_mode="symbolic", _allow_non_fake_inputs=True)
        return trace(*inputs)


def without_repetitions(graph: fx.Graph) -> fx.Graph:
    """Returns a copy of a graph that computes equal operations once."""
    return fx_graph_cse(graph)


@contextmanager
def reading_after_writing() -> Iterator[None]:
    """Makes inductor of torch 2.13 order reads and writes rightly inside the block.

    Loops that the C++ backend computes anew, to fuse them with others, forget that what they read is written to by
    ``index_put`` before, and may run before it, as in SchNetPack's PaiNN.
    """
    compute = SchedulerNode.recompute_size_and_body

    def compute_and_rename(self: SchedulerNode, *arguments: Any, **options: Any) -> None:
        compute(self, *arguments, **options)
        self.set_read_writes(self.read_writes.rename(self.mutation_renames))

    with mock.patch.object(SchedulerNode, "recompute_size_and_body", compute_and_rename):
        yield


@contextmanager
def indices_multiplied_out() -> Iterator[None]:
    """Makes inductor multiply out indices of kernels inside the block, to find strides, instead of simplifying them.

    Polynomials have the same strides either way, and sympy takes milliseconds to simplify one: a sixth of the time that
    inductor takes for a phase.
    """
    simplify = sizevars.simplify_index_in_vec_range

    @cache
    def multiplied_out(index: sympy.Expr, variable: sympy.Symbol, vector_length: int) -> sympy.Expr:
        if index.atoms(sympy.Function, sympy.Rel) or not index.is_polynomial():
            return simplify(index, variable, vector_length)
        return sympy.expand(index)

    with mock.patch.object(sizevars, "simplify_index_in_vec_range", multiplied_out):
        yield


def compiled(module: fx.GraphModule, mode: FakeTensorMode) -> Callable[..., Sequence[Tensor]]:
    """Returns a graph as a function that inductor compiled, for all sizes that the guards allow.

    Nothing checks guards when it is called, so it is never compiled again.

    Args:
        module: the graph, whose inputs are symbolic sizes and tensors of ``mode``.
        mode: where inductor takes symbolic sizes from, and adds guards to.
    """
    fakes = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    with ExitStack() as stack:
        stack.enter_context(any_size())
        stack.enter_context(reading_after_writing())
        stack.enter_context(indices_multiplied_out())
        stack.enter_context(kernels_in_one_library())
        stack.enter_context(tracing(TracingContext(mode)))
        stack.enter_context(torch.no_grad())
        try:
            return torch._inductor.standalone_compile(module, fakes, dynamic_shapes="from_tracing_context", aot=True)
        except RuntimeError as error:  # of a graph that torch cannot write down, which runs all the same
            if "serialize" not in str(error):
                raise
        return torch._inductor.standalone_compile(module, fakes, dynamic_shapes="from_tracing_context")


@dataclass(frozen=True)
class _WaitingKernel:
    """Stands for a C++ kernel that is compiled together with the others of its graph."""

    argument_types: list[str]
    source: str


@contextmanager
def kernels_in_one_library() -> Iterator[None]:
    """Makes inductor compile all C++ kernels of a graph together inside the block, and load them so."""
    wait, alone = AsyncCompile.wait, AsyncCompile.cpp_pybinding

    def collect(self: AsyncCompile, argtypes: list[str], source_code: str) -> _WaitingKernel:
        return _WaitingKernel(argtypes, source_code)

    def load(self: AsyncCompile, scope: dict[str, Any]) -> None:
        waiting = {name: value for name, value in scope.items() if isinstance(value, _WaitingKernel)}
        sources = [kernel.source for kernel in waiting.values()]
        source = joined(sources, [_binding(kernel.argument_types) for kernel in waiting.values()]) if waiting else None
        if source is None:
            scope.update({name: alone(self, kernel.argument_types, kernel.source) for name, kernel in waiting.items()})
        else:
            library = CppPythonBindingsCodeCache.load(source)
            scope.update({name: getattr(library, f"{NAME}_{i}") for i, name in enumerate(waiting)})
        wait(self, scope)

    with mock.patch.object(AsyncCompile, "cpp_pybinding", collect), mock.patch.object(AsyncCompile, "wait", load):
        yield


def _binding(argument_types: list[str]) -> str:
    """Returns the source with which inductor makes a Python module of a kernel."""
    cls = CppPythonBindingsCodeCache
    arguments = [f"parse_arg<{t.replace('const ', '')}>(args, {n})" for n, t in enumerate(argument_types)]
    return cls.suffix_template.format(
        arg_len=len(argument_types),
        call_entry_func=cls.call_entry_function.format(", ".join(arguments)),
        entry_func=cls.entry_function,
        extra_parse_arg=cls.extra_parse_arg.format(array_len=-1),
    )


@contextmanager
def checking_inputs(code: str) -> Iterator[None]:
    """Gives the files that AOTInductor compiles inside the block other checks of their inputs.

    Torch's own checks run only where an environment variable asks for them, and know nothing of values.

    Args:
        code: C++ that defines ``__check_inputs_outputs``, which gets the handles of inputs and outputs before anything
            reads them, and ``_check_aoti_runtime_check_inputs_env``, whether torch's checks of strides run.
    """

    def write(wrapper: CppWrapperCpu) -> None:
        wrapper.prefix.splice_aot(code)

    with mock.patch.object(CppWrapperCpu, "generate_input_output_runtime_checks", write):
        yield


def packed(function: Callable[..., Sequence[Tensor]]) -> bytes | None:
    """Returns what :func:`compiled` made as bytes, for other processes of this machine; None where torch cannot.

    Libraries that the C++ compiler made stay in inductor's folder, and are made anew where they are missing.
    """
    return function.serialize() if isinstance(function, AOTCompiledArtifact) else None


def unpacked(content: bytes) -> Callable[..., Sequence[Tensor]]:
    """Returns the function that :func:`packed` made bytes of."""
    with kernels_in_one_library():
        return AOTCompiledArtifact.deserialize(content)


@dataclass(frozen=True)
class Settings:
    """Holds what compiled code depends on beside its graph.

    Attributes:
        dtype: the default dtype.
        num_threads: threads of this process, whose number is in the code.
        is_deterministic: whether torch runs deterministic algorithms only.
        matmul_precision: the precision of matrix products.
        inductor: the settings of inductor.
        device: the device that stages run on.
        machine: the processor, and on GPUs the device's name.
    """

    dtype: torch.dtype
    num_threads: int
    is_deterministic: bool
    matmul_precision: str
    inductor: Mapping[str, Any]
    device: str
    machine: str

    @classmethod
    def current(cls, device: str) -> Settings:
        """Returns the settings of this process.

        Args:
            device: type of the device that stages run on.
        """
        machine = _processor()
        if device == "cuda":
            index = torch.cuda.current_device()
            machine += f" {torch.cuda.get_device_name(index)} {torch.version.cuda}"
            device = f"cuda:{index}"
        return cls(
            torch.get_default_dtype(),
            torch.get_num_threads(),
            torch.are_deterministic_algorithms_enabled(),
            torch.get_float32_matmul_precision(),
            {k: v for k, v in inductor_config.save_config_portable().items() if k != "compile_threads"},
            device,
            machine,
        )

    def apply(self) -> None:
        """Gives this process the same settings, for a process that compiles for another one."""
        torch.set_default_dtype(self.dtype)
        torch.set_num_threads(self.num_threads)
        torch.use_deterministic_algorithms(self.is_deterministic)
        torch.set_float32_matmul_precision(self.matmul_precision)
        inductor_config.load_config(dict(self.inductor))
        if self.device != "cpu":
            torch.cuda.set_device(self.device)


@lru_cache(maxsize=1)
def _processor() -> str:
    """Returns in words the processor of this machine, which native code is compiled for."""
    words = [platform.machine(), platform.processor(), torch.backends.cpu.get_cpu_capability()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        words += sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return "\n".join(words)


def choose_vector_instructions() -> None:
    """Lets inductor try once which instructions this processor has, before copies of this process would all do it."""
    pick_vec_isa()


def compile_one_by_one() -> None:
    """Lets inductor compile in this process itself, for a process that is one of several that compile side by side."""
    inductor_config.compile_threads = 1


@contextmanager
def inductor_cache(folder: Path | None) -> Iterator[None]:
    """Makes inductor keep what it compiles inside the block in a folder; None for its own folder.

    A folder that the environment names stays. Torch itself writes its default there.
    """
    variable = "TORCHINDUCTOR_CACHE_DIR"
    with mock.patch.dict(os.environ):
        given = os.environ.get(variable)
        if folder is not None and (given is None or os.path.abspath(given) == os.path.abspath(default_cache_dir())):
            os.environ[variable] = str(folder)
        yield


def device_of(given: str | torch.device) -> torch.device:
    """Returns the device that a user names.

    Raises:
        ValueError: It is a GPU, and there is none.
    """
    device = torch.device(given)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}, but torch finds no GPU; expected 'cpu', or a machine with a GPU")
    return device


def missing_compiler(device: str) -> str | None:
    """Returns in words which compiler inductor lacks for a type of device; None where it has one."""
    if device == "cuda":
        return None if has_triton() else "Triton, which compiles for GPUs, is not installed or does not know this GPU"
    try:
        get_cpp_compiler()
    except RuntimeError:
        return "no C++ compiler was found: install g++, or name one in the environment variable CXX"
    return None
