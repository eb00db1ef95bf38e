"""Programs are plain data: they survive pickling, hold nothing superfluous, and build modules."""

from __future__ import annotations

import operator
import pickle
import warnings
from typing import Any

import pytest
import torch
from capture_models import DTYPE, Potential, Step, Traced, make_batch, staged_gradients
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.export import export
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from lightning_januspipe.capture.cut.simplify import simplify
from lightning_januspipe.capture.trace.from_export import program_from_export
from lightning_januspipe.capture.trace.function import PlaceholderValues, build_module
from lightning_januspipe.capture.trace.operators import target_function
from lightning_januspipe.capture.trace.program import SLOT, Node, Program, Ref, refs, replace_refs
from lightning_januspipe.capture.trace.trace import energy_gradient
from lightning_januspipe.engine.specs import TensorSpec


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(Step(Potential(2)))


def reloaded(value: Any) -> Any:
    with warnings.catch_warnings():  # a pytree's spec warns about its own class
        warnings.filterwarnings("ignore", category=FutureWarning)
        return pickle.loads(pickle.dumps(value))


def test_program_names_the_device_of_no_rank() -> None:
    """The rank that traces has another number than the others."""

    class OnFirst(nn.Module):
        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            energy = (x + torch.zeros(3, device=x.device) + torch.arange(3).to(x.device)).sum()
            return energy_gradient([energy], [x])

    with FakeTensorMode(shape_env=ShapeEnv()):
        exported = export(OnFirst(), (torch.empty(3, device="cuda:0"),), strict=False)
    assert "cuda:0" in str(exported.graph)
    nodes = program_from_export(exported, [SLOT], 1, prefix="").nodes
    devices = [x for n in nodes for x in (*n.args, *n.kwargs.values()) if isinstance(x, torch.device)]
    assert set(devices) == {torch.device("cuda"), torch.device("cpu")}


@pytest.mark.parametrize("num_stages", [1, 2])
def test_pickle_round_trip(traced: Traced, num_stages: int) -> None:
    captured = traced.cut(num_stages)
    again = reloaded(captured)
    assert [n.name for n in again.program.nodes] == [n.name for n in captured.program.nodes]
    assert again.cut == captured.cut
    batch = make_batch((3, 1, 2))
    loss, expected = staged_gradients(captured, traced.module, batch)
    loss_again, found = staged_gradients(again, traced.module, batch)
    assert torch.equal(loss, loss_again)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[n], found[n]) for n in expected)


def test_program_holds_no_parameter_values(traced: Traced) -> None:
    """Every rank has the parameters; the program that is sent to it holds names."""
    tensors = [x for n in traced.program.nodes for x in (n.args, n.kwargs) if isinstance(x, torch.Tensor)]
    assert not tensors
    assert all(not isinstance(c, nn.Parameter) for c in traced.program.constants.values())


def test_every_operation_is_used(traced: Traced) -> None:
    program = traced.program
    used = {i for n in program.nodes for i in n.inputs()} | set(program.outputs) | {program.gradient}
    assert [n.name for n in program.nodes if n.op != "placeholder" and n.name not in used] == []


def test_execution_order(traced: Traced) -> None:
    seen: set[str] = set()
    for node in traced.program.nodes:
        assert set(node.inputs()) <= seen
        seen.add(node.name)


SPEC = TensorSpec(("n", 2), DTYPE)


def program_of(*operations: Node, outputs: list[str]) -> Program:
    """A program of one parameter ``w`` and one input ``x``, with a derivative that nothing reads."""
    return Program(
        nodes=[
            Node("w", "placeholder", "w", (), {}, TensorSpec((2,), DTYPE)),
            Node("x", "placeholder", "x", (), {}, SPEC),
            *operations,
        ],
        parameters={"w": "weight"},
        buffers={},
        constants={},
        inputs=["x"],
        energies=["e"],
        coordinates=["x"],
        gradient="g",
        outputs=outputs,
        returned=None,
        symbols={"n": (0, 0)},
    )


def operation(name: str, target: str, *args: Any, spec: TensorSpec | None = SPEC) -> Node:
    return Node(name, "call_function", target, args, {}, spec)


def test_simplify_drops_views_and_dead_operations() -> None:
    program = simplify(
        program_of(
            operation("view", "aten.view.default", Ref("x"), [Ref("x"), 2]),
            operation("whole", "aten.slice.Tensor", Ref("view"), 0, 0, 2**63 - 1),
            operation("part", "aten.slice.Tensor", Ref("whole"), 0, 1, 2**63 - 1, spec=TensorSpec(("n - 1", 2), DTYPE)),
            operation("dead", "aten.neg.default", Ref("part")),
            operation("e", "aten.sum.default", Ref("whole"), spec=TensorSpec((), DTYPE)),
            operation("g", "januspipe.energy_gradient.default", [Ref("e")], [Ref("whole")]),
            outputs=["part", "view"],
        )
    )
    assert [n.name for n in program.nodes] == ["w", "x", "part", "e", "g"]
    assert program.by_name["part"].args[0] == Ref("x")
    assert program.by_name["e"].args == (Ref("x"),)
    assert program.outputs == ["part", "x"]
    assert "dead" not in program.by_name


@pytest.mark.parametrize(
    ("target", "arguments", "left"),
    [
        ("aten.squeeze.default", (), ["aten.squeeze.dims"]),
        ("aten.squeeze.dim", (-1,), ["aten.squeeze.dims"]),
        ("aten.squeeze.dims", ([0, 2],), ["aten.squeeze.dims"]),
        ("aten.squeeze.dim", (0,), []),
        ("aten.squeeze.dims", ([0, 1],), []),
    ],
)
def test_simplify_keeps_dimensions_that_the_trace_kept(target: str, arguments: Any, left: list[str]) -> None:
    column, row = TensorSpec(("n", 2, 1), DTYPE), TensorSpec(("n", 2), DTYPE)
    program = simplify(
        program_of(
            operation("column", "aten.unsqueeze.default", Ref("x"), -1, spec=column),
            operation("squeezed", target, Ref("column"), *arguments, spec=row if left else column),
            operation("e", "aten.sum.default", Ref("squeezed"), spec=TensorSpec((), DTYPE)),
            operation("g", "januspipe.energy_gradient.default", [Ref("e")], [Ref("x")]),
            outputs=["squeezed"],
        )
    )
    assert [n.target for n in program.nodes if n.target.startswith("aten.squeeze")] == left
    assert [n.args[1] for n in program.nodes if n.target.startswith("aten.squeeze")] == [[2] for _ in left]


def test_simplify_gives_the_sizes_of_views() -> None:
    """A graph rank that has no rows could not infer them."""
    program = simplify(
        program_of(
            operation("flat", "aten.view.default", Ref("x"), [Ref("x"), 1, -1], spec=TensorSpec(("n", 1, 2), DTYPE)),
            operation("rows", "aten.view.default", Ref("flat"), [-1, 1], spec=TensorSpec(("2*n", 1), DTYPE)),
            operation("e", "aten.sum.default", Ref("rows"), spec=TensorSpec((), DTYPE)),
            operation("g", "januspipe.energy_gradient.default", [Ref("e")], [Ref("x")]),
            outputs=["rows"],
        )
    )
    assert program.by_name["flat"].args[1] == [Ref("x"), 1, 2]
    assert program.by_name["rows"].args[1] == [-1, 1], "follows from the number of rows"


def test_build_module_uses_what_it_needs() -> None:
    program = program_of(
        operation("a", "aten.mul.Tensor", Ref("x"), Ref("w")),
        operation("b", "aten.exp.default", Ref("x")),
        operation("c", "aten.add.Tensor", Ref("a"), Ref("b")),
        outputs=["c"],
    )
    x, w = torch.randn(3, 2, dtype=DTYPE), torch.randn(2, dtype=DTYPE)
    module = build_module(program, ["a", "b", "c"], ["x", "w"], ["c", "a"])
    torch.testing.assert_close(module(x, w), (x * w + x.exp(), x * w))
    assert len(list(build_module(program, ["a", "b"], ["x", "w"], ["a"]).graph.nodes)) == 4  # x, w, a and the output
    given = build_module(program, ["c", "b"], ["a", "x"], ["c"])
    torch.testing.assert_close(given(w, x)[0], w + x.exp())
    with pytest.raises(AssertionError, match="a is needed, but not among the operations that may be used"):
        build_module(program, ["b", "c"], ["x", "w"], ["c"])


def test_build_module_makes_leaves() -> None:
    program = program_of(
        operation("a", "aten.mul.Tensor", Ref("x"), Ref("x")),
        operation("b", "aten.mul.Tensor", Ref("a"), Ref("a")),
        outputs=["b"],
    )
    x = torch.randn(3, 2, dtype=DTYPE, requires_grad=True)
    b, a = build_module(program, ["a", "b"], ["x"], ["b", "a"], leaves=["a"])(x)
    assert a.is_leaf and a.requires_grad
    torch.testing.assert_close(torch.autograd.grad(b.sum(), a)[0], 2 * a.detach())


def test_placeholders_follow_the_live_module() -> None:
    module = nn.Linear(2, 1, bias=False, dtype=DTYPE)
    values = PlaceholderValues(program_of(outputs=[]), module, ["x", "w"])
    x = torch.randn(3, 2, dtype=DTYPE, requires_grad=True)
    first, weight = values.values([x])
    assert weight is module.weight
    assert not first.requires_grad and first.data_ptr() == x.data_ptr()
    module.weight = nn.Parameter(torch.zeros(1, 2, dtype=DTYPE))
    assert values.values([x])[1] is module.weight


def test_refs_in_nested_arguments() -> None:
    tree = [Ref("a"), (1, {"k": Ref("b")}), slice(None, Ref("c"), 2)]
    assert [r.name for r in refs(tree)] == ["a", "b", "c"]
    assert replace_refs(tree, str.upper) == ["A", (1, {"k": "B"}), slice(None, "C", 2)]


def test_targets() -> None:
    assert target_function("aten.add.Tensor") is torch.ops.aten.add.Tensor
    assert target_function(operator.getitem) is operator.getitem
    source, value = torch.zeros(2, 3, dtype=DTYPE), torch.ones(3, requires_grad=True)
    copied = target_function("aten.copy.default")(source, value)
    torch.testing.assert_close(copied, torch.ones(2, 3, dtype=DTYPE))
    torch.testing.assert_close(torch.autograd.grad(copied.sum(), value)[0], torch.full((3,), 2.0))
