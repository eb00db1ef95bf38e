"""TorchScript functions and modules are traced as Python: with symbolic sizes, and left as they were."""

import io
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export
from torch.fx.experimental import _config as symbolic_config
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from lightning_januspipe.capture.trace.torchscript import inlined_torchscript
from lightning_januspipe.errors import CaptureError

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")

SIZES = [(3, 2, 4), (5,), (1, 1), (2, 6, 3, 1, 4)]
"""Atoms of the structures of a batch; traced is the first."""


def make_inputs(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Values (N, 3), the structure of each atom (N,), and something of the length of the batch (B,)."""
    generator = torch.Generator().manual_seed(sum(sizes))
    values = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64)
    owner = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return values, owner, torch.ones(len(sizes), dtype=torch.float64)


def export_symbolic(module: nn.Module, inputs: tuple[Tensor, ...]) -> ExportedProgram:
    shapes = (tuple(dict.fromkeys(range(x.dim()), Dim.AUTO) for x in inputs),)
    with symbolic_config.patch(backed_size_oblivious=True):
        return export(_Flat(module), inputs, dynamic_shapes=shapes, strict=False)


class _Flat(nn.Module):
    """Any number of inputs, under one name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def results(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Outputs, and the derivative of their sum by the first input."""
    first = inputs[0].clone().requires_grad_(True)
    outputs = function(first, *inputs[1:])
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    (gradient,) = torch.autograd.grad(sum(x.sum() for x in outputs), first)
    return [*outputs, gradient]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [x.shape for x in found] == [x.shape for x in expected]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


def assert_captured(module: nn.Module) -> ExportedProgram:
    """Export within the block; the program and, afterwards, the live module are right on all sizes."""
    batches = [make_inputs(s) for s in SIZES]
    expected = [results(module, b) for b in batches]
    children, state = [id(m) for m in module.modules()], list(module.state_dict())
    parameters = {n: p.data_ptr() for n, p in module.named_parameters()}
    with inlined_torchscript(module):
        assert not any(isinstance(m, torch.jit.ScriptModule) for m in module.modules())
        assert list(module.state_dict()) == state
        assert {n: p.data_ptr() for n, p in module.named_parameters()} == parameters
        assert_same(results(module, batches[1]), expected[1])
        exported = export_symbolic(module, batches[0])
    assert [id(m) for m in module.modules()] == children
    program = exported.module(check_guards=False)
    for batch, right in zip(batches, expected, strict=True):
        assert_same(results(program, batch), right)
        assert_same(results(module, batch), right)
    return exported


@torch.jit.script
def shape_of(x: Tensor, first: int) -> list[int]:
    shape = list(x.shape)
    shape[0] = first
    return shape


@torch.jit.script
def scatter_sum(x: Tensor, index: Tensor, size: int) -> Tensor:
    return torch.zeros(shape_of(x, size), dtype=x.dtype).index_add(0, index, x)


class Mean(nn.Module):
    """Mean over the structures of sums over atoms."""

    scatter: Callable[..., Tensor] = staticmethod(scatter_sum)

    def forward(self, x: Tensor, index: Tensor, structures: Tensor) -> Tensor:
        return self.scatter(x**2, index, structures.shape[0]).mean(0)


def test_sizes_are_constants_without_it_and_symbols_with_it() -> None:
    batches = [make_inputs(s) for s in SIZES]
    expected = [results(Mean(), b) for b in batches]
    baked = make_fx(Mean(), tracing_mode="symbolic")(*batches[0])
    with inlined_torchscript(Mean()):
        symbolic = make_fx(Mean(), tracing_mode="symbolic")(*batches[0])
    # Two structures instead of three: no error, but the mean is over three.
    assert torch.allclose(baked(*batches[2]), expected[2][0] * 2 / 3)
    for batch, right in zip(batches, expected, strict=True):
        assert_same([symbolic(*batch)], right[:1])
        assert_same(results(Mean(), batch), right)


class Source(nn.Module):
    """Scripted functions in a closure, in a container, and one that has no Python source."""

    def __init__(self) -> None:
        super().__init__()
        unit = torch.jit.CompilationUnit(
            "def doubled(x: Tensor, k: float = 1.0, dtype: Optional[int] = None) -> Tuple[Tensor, int]:\n"
            "    n = x.size(0)\n"
            "    return torch.cat([x, k * x]).view(2, n, -1).sum(0).to(dtype), 2 * n\n"
        )
        self.functions = {"doubled": unit.doubled, "scatter": scatter_sum}
        inner = scatter_sum
        self.closure = lambda x, index, size: inner(x, index, size)

    def forward(self, x: Tensor, index: Tensor, structures: Tensor) -> Tensor:
        y, number = self.functions["doubled"](x, dtype=torch.float64, k=2)
        return self.closure(y, index, structures.shape[0]) * number


def test_functions_wherever_they_are() -> None:
    assert_captured(Mean())
    assert_captured(Source())


class Pair(NamedTuple):
    values: Tensor
    num: int


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(3, width, dtype=torch.float64)
        self.register_buffer("scale", torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * self.scale


class Scripted(nn.Module):
    """Parameters, buffers, plain attributes, submodules, control flow on sizes, lists, tuples, dicts, named tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(3), Block(3)])
        self.weight = nn.Parameter(torch.linspace(0, 1, 3, dtype=torch.float64))
        self.shift = torch.tensor([0.25], dtype=torch.float64)
        self.power = 2

    @torch.jit.ignore
    def ignored(self, x: Tensor) -> Tensor:
        return x * self.weight

    @torch.jit.export
    def scaled(self, x: Tensor, factor: float = 0.5) -> Tensor:
        return x * factor

    def counted(self, x: Tensor) -> Pair:
        return Pair(x, x.shape[0])

    def forward(self, x: Tensor, index: Tensor, num: int) -> tuple[Tensor, Pair, dict[str, list[Tensor]]]:
        assert x.shape[1] == 3, "three columns"
        sums: list[Tensor] = []
        for block in self.blocks:
            x = block(x)
            sums.append(scatter_sum(x, index, num))
        if x.dtype == torch.float64 and x.shape[1] > 2:
            x = self.ignored(x) + self.shift
        else:
            raise RuntimeError("not reached")
        total, columns = torch.zeros(num, dtype=x.dtype, device=x.device), 0
        while columns < x.shape[1]:
            total = total + sums[-1][:, columns] ** self.power
            columns += 1
        for j in range(1, x.shape[1], 2):
            total = total * j / max(num, 1) + float(x.numel() // x.shape[1])
        parts = {"sums": sums, "total": [total]}
        if "other" in parts:
            parts["sums"] = [total]
        halves = x.repeat(2, 1)[: x.size(0)], x[-1:]
        parts["halves"] = [halves[0], halves[1]]
        return torch.stack(parts["sums"]).sum(0), self.counted(x), parts


class Holder(nn.Module):
    """A Python module with a TorchScript one inside, as a potential has it."""

    def __init__(self, scripted: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"scripted": scripted, "again": scripted})

    def forward(self, x: Tensor, index: Tensor, structures: Tensor) -> list[Tensor]:
        scripted = self.inner["scripted"]
        sums, pair, parts = scripted(x, index, num=structures.shape[0])
        return [sums, pair[0] * pair[1], *parts["total"], *parts["halves"], scripted.scaled(x, 3) ** scripted.power]


def loaded(scripted: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.fixture(scope="module")
def scripted() -> nn.Module:
    torch.manual_seed(0)
    return torch.jit.script(Scripted())


def test_scripted_module(scripted: nn.Module) -> None:
    exported = assert_captured(Holder(scripted))
    names = {f"module.{n}" for n, _ in Holder(scripted).named_parameters(remove_duplicate=False)}
    assert set(exported.graph_signature.inputs_to_parameters.values()) == names
    assert exported.graph_signature.inputs_to_buffers


def test_tensors_are_the_same_objects_and_named_tuples_keep_their_fields(scripted: nn.Module) -> None:
    x, index, _ = make_inputs((2, 3))
    holder = Holder(scripted)
    with inlined_torchscript(holder):
        assert all(p is q for p, q in zip(holder.parameters(), scripted.parameters(), strict=True))
        assert all(p is q for p, q in zip(holder.buffers(), scripted.buffers(), strict=True))
        pair = holder.inner["scripted"](x, index, 2)[1]
        assert holder.inner["scripted"].scaled(torch.ones(2, dtype=torch.int64), 3).dtype == torch.float32
    assert (type(pair).__name__, pair._fields, pair.num) == ("Pair", ("values", "num"), 5)


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, dtype=torch.float64)

    def forward(self, x: Tensor, index: Tensor, structures: Tensor) -> tuple[Tensor, Tensor]:
        y = self.linear(x).view(x.shape[0] * 2, 1)[index] / structures.shape[0]
        return y + torch.arange(x.shape[0]).unsqueeze(1), x * (x.shape[0] // 2 + 1)


class Around(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.traced = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.traced(*inputs)


class SeenItems(TorchFunctionMode):
    """Counts numbers read from tensors, which a trace would take for data."""

    num = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func is Tensor.item
        return func(*args, **(kwargs or {}))


def test_traced_and_loaded_modules() -> None:
    traced = torch.jit.trace(Reshaped(), make_inputs((2, 1)))
    assert_captured(Around(traced))
    around, seen = Around(loaded(traced)), SeenItems()
    with inlined_torchscript(around), seen:
        around(*make_inputs((1, 4)))
    assert not seen.num
    exported = assert_captured(Around(loaded(traced)))
    assert len(exported.graph_signature.inputs_to_parameters) == 2


def test_generated_code_of_e3nn() -> None:
    e3nn = pytest.importorskip("e3nn")
    from e3nn import o3

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.product = o3.FullyConnectedTensorProduct("1o", "1o", "0e + 1e + 2e").double()

        def forward(self, x: Tensor, index: Tensor, structures: Tensor) -> Tensor:
            return scatter_sum(self.product(x, x.flip(0)), index, structures.shape[0])

    before = e3nn.get_optimization_defaults()
    try:
        e3nn.set_optimization_defaults(jit_mode="script")
        module = Product()
    finally:
        e3nn.set_optimization_defaults(**before)
    assert any(isinstance(m, torch.jit.ScriptModule) for m in module.modules())
    assert_captured(module)


class Divisor(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * math.gcd(x.shape[0], 12)


class Filled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nan_to_num(x, nan=float(x.shape[0]))


class Sorted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        columns = [2, 0]
        columns.sort()
        return x[:, columns[0]]


class Guarded(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x * 2


@pytest.mark.parametrize(
    ("module", "node"),
    [
        (Divisor(), r"aten::gcd \[aten::gcd\.int.*\]"),
        (Filled(), r"aten::nan_to_num \[.*\]"),
        (Sorted(), r"aten::sort \[aten::sort\.int.*\]"),
        (Guarded(), "prim::CreateObject"),
    ],
    ids=str,
)
def test_nodes_that_cannot_be_interpreted_are_named(module: nn.Module, node: str) -> None:
    holder = Around(torch.jit.script(module))
    call = torch._C.ScriptFunction.__dict__["__call__"]
    place = rf"the TorchScript node {node} \(module 'traced', .*test_torchscript\.py:\d+\) cannot be interpreted"
    with pytest.raises(CaptureError, match=place), inlined_torchscript(holder):
        export_symbolic(holder, make_inputs((2, 3))[:1])
    assert isinstance(holder.traced, torch.jit.ScriptModule)
    assert torch._C.ScriptFunction.__dict__["__call__"] is call


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden = [torch.jit.script(Block(3))]

    def forward(self, x: Tensor, index: Tensor, structures: Tensor) -> Tensor:
        return self.hidden[0](x)


def test_modules_out_of_reach() -> None:
    hidden, inputs = Hidden(), make_inputs((2, 3))
    expected = hidden(*inputs)
    with inlined_torchscript(hidden), pytest.raises(CaptureError, match=r"'forward' of .*Block.*ModuleList"):
        export_symbolic(hidden, inputs)
    assert torch.equal(hidden(*inputs), expected)
    with (
        pytest.raises(CaptureError, match="'Block' is itself a TorchScript module"),
        inlined_torchscript(hidden.hidden[0]),
    ):
        pass


def test_other_threads_run_torchscript() -> None:
    unit = torch.jit.CompilationUnit("def same(x: Tensor) -> Tensor:\n    return x\n")
    kinds = []

    def run() -> None:
        kinds.append(torch.jit.is_scripting())
        block = torch.jit.script(Block(3))
        kinds.append(block(torch.ones(2, 3, dtype=torch.float64)).shape)
        kinds.append(unit.same(torch.ones(2)).shape)

    with inlined_torchscript(nn.Module()):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert kinds == [False, (2, 3), (2,)]
