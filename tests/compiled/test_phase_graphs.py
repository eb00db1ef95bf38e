"""The phase graphs of a stage: what they return, keep and compute again; and that faults in them are found."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from capture_models import Batch, Potential, Step, Traced, assert_parity, make_batch
from compiled_models import factory, joint_graphs, kept_values_of, with_zeros
from parity_models import AtomicEnergies, ChargeStep
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.compiled import levels
from lightning_januspipe.compiled import phase_graphs as phases
from lightning_januspipe.compiled.joint import Joint
from lightning_januspipe.compiled.kinds_of_work import KindOfWork, work_of
from lightning_januspipe.compiled.minimum_cut import ACTIVATIONS, Activation
from lightning_januspipe.compiled.phase_graphs import PhaseGraphs, phase_graphs
from lightning_januspipe.compiled.ports import Kind
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.experts import grouped_linear
from lightning_januspipe.schedule import Phase

BATCH = make_batch((2, 5, 3), seed=1)


@pytest.fixture(scope="module")
def traced() -> Traced:
    return Traced(ChargeStep(AtomicEnergies(2)))  # its loss reads all observables


@pytest.fixture(scope="module")
def captured(traced: Traced) -> CapturedPotential:
    return traced.cut(2)


@pytest.fixture(scope="module")
def joints(traced: Traced, captured: CapturedPotential) -> list[Joint]:
    return joint_graphs(traced, captured)


class ReadsNumberOfStructures(Potential):
    """Sums energies into one more structure than the largest index, as SchNetPack's models do."""

    def pool(self, values: torch.Tensor, batch: Batch) -> torch.Tensor:
        num = int(batch["index"].max()) + 1
        return values.new_zeros(num).index_add(0, batch["index"], values)


def test_sizes_that_shapes_compute_with_are_inputs() -> None:
    """A tensor with n + 1 rows gives inductor no value of n."""
    traced = Traced(Step(ReadsNumberOfStructures(1)))
    (joint,) = joint_graphs(traced, traced.cut(1))
    num_computed = 0
    for module in phase_graphs(joint).modules.values():
        values = [n.meta["val"] for n in module.graph.find_nodes(op="placeholder")]
        sizes = {str(v) for v in values if isinstance(v, torch.SymInt)}
        shapes = [s for v in values if isinstance(v, torch.Tensor) for s in v.shape if isinstance(s, torch.SymInt)]
        computed = [s.node.expr for s in shapes if not s.node.expr.is_Symbol]
        assert all({str(symbol) for symbol in size.free_symbols} <= sizes for size in computed)
        num_computed += len(computed)
    assert num_computed


def products(graph: torch.fx.Graph) -> int:
    """Matrix products in a graph."""
    return sum(n.op == "call_function" and "mm" in str(n.target) for n in graph.nodes)


def test_no_product_is_computed_twice(joints: list[Joint]) -> None:
    """Six products for each linear layer, in the phases in which they belong (docs: the four phases)."""
    for joint in joints:
        whole = products(levels.drop_repetitions(joint).graph)
        for defer in (False, True):
            found = {p: products(m.graph) for p, m in phase_graphs(joint, "keep", defer).modules.items()}
            assert sum(found.values()) == whole, (found, whole)
        assert Phase.WF in found and Phase.WE in found


def test_what_is_kept(joints: list[Joint]) -> None:
    for joint in joints:
        found = {a: phase_graphs(joint, a).phases for a in ACTIVATIONS}
        for phase in (Phase.FE, Phase.FF, Phase.BF):
            held = {a: p.held_bytes(phase) for a, p in found.items()}
            assert held["recompute"] < 0.2 * held["pointwise"] < 0.2 * held["keep"]
        assert not found["recompute"].signatures[Phase.FE].kept, "only the boundary is kept"
        assert all(p.held_bytes(Phase.BE) == 0 for p in found.values())
        deferred = {a: phase_graphs(joint, a, defer=True).phases for a in ("pointwise", "recompute")}
        for phase in (Phase.BF, Phase.BE, Phase.WF):
            held = {a: p.held_bytes(phase) for a, p in deferred.items()}
            assert held["recompute"] < 0.3 * held["pointwise"], f"after {phase.value}, for WE"


def test_parameter_gradients_are_returned_as_soon_as_they_are_complete(joints: list[Joint]) -> None:
    """What BF finds of a parameter's gradient does not wait for what BE finds."""
    for joint in joints:
        graphs = phase_graphs(joint, "keep")
        returned = {
            phase: {r.position for r in signature.results if r.kind is Kind.PARAMETER_GRADIENT}
            for phase, signature in graphs.phases.signatures.items()
        }
        assert returned[Phase.BF] & returned[Phase.BE], "no gradient is returned in two summands"
        nodes = {n.name: n for n in graphs.modules[Phase.BE].graph.nodes}
        kept = [tuple(nodes[name].meta["val"].shape) for name in graphs.phases.signatures[Phase.BF].kept]
        assert kept and all(isinstance(shape[0], torch.SymInt) for shape in kept), "one has a parameter's shape"


def test_graphs_are_the_same_in_every_trace(traced: Traced, captured: CapturedPotential, joints: list[Joint]) -> None:
    """Caches are of use only if they are."""
    again = joint_graphs(traced, captured)
    for first, second in zip(joints, again, strict=True):
        one, two = (phase_graphs(j, "pointwise", True) for j in (first, second))
        assert one.phases == two.phases
        assert [m.code for m in one.modules.values()] == [m.code for m in two.modules.values()]


def test_a_gradient_exists_if_the_loss_reads_what_leads_to_it(joints: list[Joint]) -> None:
    """The charges' weights have a gradient only where the loss reads charges."""
    signatures = phase_graphs(joints[-1]).phases.signatures
    seeds = [s for sig in signatures.values() for r, s in zip(sig.results, sig.seeds, strict=True)
             if r.kind is Kind.PARAMETER_GRADIENT]  # fmt: skip
    assert None in seeds, "forces lead to most parameters"
    deciding = [s for s in seeds if s is not None]
    assert deciding and {port.kind for ports in deciding for port in ports} == {Kind.OBSERVABLE_COTANGENT}


def _parity(traced: Traced, captured: CapturedPotential, graphs: list[PhaseGraphs], defer: bool = False) -> None:
    assert_parity(captured, traced.module, BATCH, make_stage=factory(graphs), defer=defer)


def test_products_of_experts_are_no_exchanges() -> None:
    graph = make_fx(grouped_linear)(torch.ones(3, 2), torch.ones(2, 2, 2), torch.tensor([0, 1, 1])).graph
    assert [work_of(n) for n in graph.nodes if "grouped" in str(n.target)] == [KindOfWork.SUM]


class _Largest(Potential):
    """Takes the two largest features of each atom; what follows of the energy reads no index of them."""

    def features(self, batch: Batch, vectors: torch.Tensor) -> torch.Tensor:
        h = super().features(batch, vectors)
        return h + h.topk(2, dim=1).values.sum(1, keepdim=True)


def test_results_of_one_operation_are_taken_in_its_phase() -> None:
    """Derivatives read indices of which the energy reads the values only: one by one they can be kept."""
    traced = Traced(Step(_Largest(1)))
    captured = traced.cut(1)
    (joint,) = joint_graphs(traced, captured)
    graphs = phase_graphs(joint)
    found = {p: [n for n in m.graph.nodes if "topk" in str(n.target)] for p, m in graphs.modules.items()}
    assert [p for p, nodes in found.items() if nodes] == [Phase.FE]
    assert {n.args[1] for n in found[Phase.FE][0].users} == {0, 1}
    _parity(traced, captured, [graphs])


@pytest.mark.parametrize("defer", [False, True])
@pytest.mark.parametrize(("activation", "least"), [("keep", 60), ("pointwise", 18), ("recompute", 2)])
def test_every_kept_value_matters(
    traced: Traced, captured: CapturedPotential, joints: list[Joint], activation: Activation, least: int, defer: bool
) -> None:
    """Zeros in the place of any of them are found by the parity check."""
    graphs = [phase_graphs(j, activation, defer) for j in joints]
    _parity(traced, captured, graphs, defer)
    kept = kept_values_of(graphs)
    assert len(kept) >= least
    for stage, phase, name in kept:
        broken = list(graphs)
        broken[stage] = with_zeros(graphs[stage], phase, name)
        with pytest.raises((AssertionError, FloatingPointError)):
            _parity(traced, captured, broken, defer)


@pytest.mark.parametrize(
    ("kind", "phase"),
    [(Kind.BOUNDARY_COTANGENT, Phase.BF), (Kind.OBSERVABLE_COTANGENT, Phase.BF), (Kind.DERIVATIVE_COTANGENT, Phase.FF)],
)
def test_a_wrong_level_is_found(joints: list[Joint], monkeypatch: pytest.MonkeyPatch, kind: Kind, phase: Phase) -> None:
    """An operation that runs before its inputs are there."""
    monkeypatch.setattr(levels, "GIVEN", {**levels.GIVEN, kind: phase})
    with pytest.raises(AssertionError, match="reads .* which no earlier phase keeps"):
        for joint in joints:
            phase_graphs(joint, "keep")


def test_what_waits_for_energies_alone_is_not_in_BF(
    traced: Traced, captured: CapturedPotential, joints: list[Joint], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results of BE that BF returned instead would not be in time, or not be there."""
    monkeypatch.setattr(phases, "returned_in", lambda joint, levels: [
        Phase.BF if p is Phase.BE else p for p in _returned_in(joint, levels)])  # fmt: skip
    with pytest.raises((AssertionError, KeyError)):
        _parity(traced, captured, [phase_graphs(j, "keep") for j in joints])


_returned_in = levels.returned_in


def test_kinds_of_work(joints: list[Joint]) -> None:
    found = {work_of(n) for joint in joints for n in joint.graph.nodes if n.op == "call_function"}
    assert found - {KindOfWork.SIZE} == {
        KindOfWork.VIEW,
        KindOfWork.MAKE,
        KindOfWork.POINTWISE,
        KindOfWork.GATHER,
        KindOfWork.SUM,
    }


def test_no_operation_writes_to_its_input(joints: list[Joint]) -> None:
    """The formula of SiLU's second derivative does, in what autograd records of it."""
    writing = [n for joint in joints for n in joint.graph.nodes if writes(n)]
    assert writing, "the joint graphs have nothing to change"
    assert not [n for joint in joints for n in levels.without_mutations(joint).graph.nodes if writes(n)]


def writes(node: torch.fx.Node) -> bool:
    """Whether an operation writes to one of its inputs."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def test_an_operation_may_write_to_what_was_read_before(joints: list[Joint]) -> None:
    """The gradient of a norm is filled with zeros in place, where the norm is zero."""

    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        made = x.sin()
        read = made * 2
        return made.copy_(x), read

    x = torch.randn(3)
    graph = make_fx(function)(x).graph
    assert any(writes(node) for node in graph.nodes)
    changed = levels.without_mutations(replace(joints[0], graph=graph)).graph
    assert not any(writes(node) for node in changed.nodes)
    for found, expected in zip(torch.fx.GraphModule({}, changed)(x), (x, 2 * x.sin()), strict=True):
        torch.testing.assert_close(found, expected)


def test_an_operation_that_writes_to_what_others_read_is_refused(joints: list[Joint]) -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(torch.ops.aten.sin.default, (x,))
    changed = graph.call_function(torch.ops.aten.add_.Tensor, (made, x))
    graph.output((changed, made))
    with pytest.raises(CaptureError, match=r"aten.add_.Tensor writes to a tensor that other operations may read"):
        levels.without_mutations(replace(joints[0], graph=graph))
