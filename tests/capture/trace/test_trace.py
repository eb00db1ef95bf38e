"""Traced potentials keep their sizes symbolic, are functional, and what cannot be traced is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from capture_models import DTYPE, OTHER, TRACED, Batch, Layer, Potential, Step, Traced, assert_parity, make_batch
from torch import Tensor, nn

from lightning_januspipe.capture.trace.operators import is_random
from lightning_januspipe.capture.validate.against_eager import run_staged, validate_stages
from lightning_januspipe.errors import CaptureError

BATCHES = [(4,), (1,), (1, 1), (3, 1), (2, 5, 1, 3, 4, 2, 6)]


class InPlaceLayer(Layer):
    """Every kind of mutation that models use."""

    def aggregate(self, h: Tensor, target: Tensor, messages: Tensor) -> Tensor:
        half = h.shape[1] // 2
        out = torch.zeros_like(h)
        out.index_add_(0, target, messages)
        scattered = torch.zeros_like(h)
        scattered.scatter_add_(0, target[:, None].expand_as(messages), messages * messages)
        joined = torch.empty_like(h)
        joined[:, :half] = out[:, half:]
        joined[:, half:].copy_(scattered[:, :half])
        joined.mul_(0.7).add_(out)
        return joined


class InPlace(Potential):
    layer = InPlaceLayer


class DetachedGate(Potential):
    """A detach inside, as in a softmax, takes no part in any derivative."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        return h * torch.sigmoid(h.sum(-1, keepdim=True).detach())


class DetachedInPlace(DetachedGate):
    layer = InPlaceLayer


class Averaged(Potential):
    """Sizes take part in the arithmetic, and a tensor is made in the forward."""

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        num_structures, num_atoms = batch["cell"].shape[0], values.shape[0]
        shift = torch.tensor([0.25], dtype=DTYPE)
        return super().pool(values, batch) * num_structures / num_atoms + shift


@pytest.fixture(scope="module", params=[Potential, InPlace, DetachedGate, DetachedInPlace, Averaged])
def traced(request: pytest.FixtureRequest) -> Traced:
    return Traced(Step(request.param(2)))


@pytest.mark.parametrize("sizes", BATCHES, ids=str)
def test_other_sizes_give_the_same_loss_and_gradients(traced: Traced, sizes: tuple[int, ...]) -> None:
    assert_parity(traced.cut(2), traced.module, make_batch(sizes, seed=5))


def test_operations_are_functional(traced: Traced) -> None:
    targets = [n.target for n in traced.program.nodes if n.op != "placeholder" and isinstance(n.target, str)]
    assert len(targets) > 20
    names = [t.split(".")[1] for t in targets if t.count(".") == 2]
    assert not [n for n in names if n.endswith("_")]


def test_sizes_are_symbols(traced: Traced) -> None:
    symbols = traced.program.bind(traced.format.bind("potential", *self_call(traced, (2, 1, 4, 1))))
    spec = {n: traced.program.by_name[n].spec for n in traced.program.outputs}
    shapes = [s.sizes(symbols) for s in spec.values() if s is not None]
    assert shapes == [(4,), (8, 3), (4, 3, 3), (8,)]  # energy, forces, stress, charges


def self_call(traced: Traced, sizes: tuple[int, ...]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    call = traced.call_on(make_batch(sizes))
    return call.args, call.kwargs


def test_parameters_keep_their_names(traced: Traced) -> None:
    assert set(traced.program.parameters.values()) == {n for n, _ in traced.potential.named_parameters()}


def test_module_is_left_as_it_is() -> None:
    module = Step(Potential(1))
    module.potential.layers[0].filter.eval()
    before = {k: v.clone() for k, v in module.state_dict().items()}
    modes = [m.training for m in module.modules()]
    Traced(module)
    assert [m.training for m in module.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert all(p.grad is None for p in module.parameters())
    assert "forward" not in module.potential.__dict__


class BatchNormLayer(Layer):
    def __init__(self, width: int, filter_network: nn.Module | None = None) -> None:
        super().__init__(width, filter_network)
        self.norm = nn.BatchNorm1d(width, dtype=DTYPE)

    def aggregate(self, h: Tensor, target: Tensor, messages: Tensor) -> Tensor:
        return self.norm(super().aggregate(h, target, messages))


class BatchNorm(Potential):
    layer = BatchNormLayer


class Counting(Potential):
    def __init__(self, num_layers: int) -> None:
        super().__init__(num_layers)
        self.register_buffer("calls", torch.zeros((), dtype=DTYPE))

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        self.calls += 1
        return super().features(batch, vectors)


@pytest.mark.parametrize(("potential", "buffer"), [(BatchNorm, "running_mean"), (Counting, "calls")])
def test_buffers_updated_in_forward(potential: type[Potential], buffer: str) -> None:
    with pytest.raises(CaptureError, match=rf"updates buffers in its forward \(.*{buffer}.*outside forward, or freeze"):
        Traced(Step(potential(1)))


def test_frozen_batch_norm_is_allowed() -> None:
    module = Step(BatchNorm(2))
    for layer in module.potential.layers:
        layer.norm.eval()
    traced = Traced(module)
    assert_parity(traced.cut(2), module, make_batch((2, 3)))


class Dropout(Potential):
    probability = 0.1

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        return nn.functional.dropout(super().features(batch, vectors), self.probability, self.training)


class DropoutOff(Dropout):
    probability = 0.0


class Noise(Potential):
    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        return super().features(batch, vectors + 0.01 * torch.randn_like(vectors))


class RandomRoll(Potential):
    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        return super().features(batch, vectors.roll(1, 0) * torch.rand(1, dtype=DTYPE))


@pytest.mark.parametrize(("potential", "kind"), [(Dropout, "dropout"), (Noise, "randn"), (RandomRoll, "rand")])
def test_random_numbers(potential: type[Potential], kind: str) -> None:
    """They become inputs, which are drawn for each micro-batch; no operation of the program draws any."""
    program = Traced(Step(potential(1))).program
    assert [draw.kind for draw in program.draws] == [kind]
    assert not any(is_random(node) for node in program.operations)


def test_dropout_that_is_switched_off() -> None:
    traced = Traced(Step(DropoutOff(1)))
    assert "aten.dropout.default" in [n.target for n in traced.program.nodes]
    assert_parity(traced.cut(1), traced.module, make_batch(OTHER))


class BranchOnValue(Potential):
    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        return h * 2 if h.sum() > 0 else h


class SizeFromValue(Potential):
    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        return values.new_zeros(int(batch["index"].max()) + 1).index_add(0, batch["index"], values)


def test_values_that_steer_the_forward(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        CaptureError, match=r"reads the value False from a tensor that depends on param.*test_trace\.py:\d+"
    ):
        Traced(Step(BranchOnValue(1)))
    assert "def forward" not in "".join(capfd.readouterr())  # the graph, hundreds of lines


def test_loggers_are_restored() -> None:
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    before = logger.level
    with pytest.raises(CaptureError):
        Traced(Step(BranchOnValue(1)))
    assert logger.level == before


class UpTo(Potential):
    """A Python branch on the number of structures."""

    limit = 4

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        energies = super().pool(values, batch)
        return 2 * energies if batch["cell"].shape[0] > self.limit else energies


class MoreThanTwo(UpTo):
    limit = 2


class Length(Potential):
    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        return super().pool(values, batch) / len(batch["cell"])


class Loop(Potential):
    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        return torch.stack([values[batch["index"] == i].sum() for i in range(batch["cell"].shape[0])])


@pytest.mark.parametrize(
    ("potential", "words"),
    [(MoreThanTwo, "size at least 3"), (Loop, "size 3")],
)
def test_sizes_made_constant(potential: type[Potential], words: str) -> None:
    traced = Traced(Step(potential(1)))
    captured = traced.cut(1)
    validate_stages(captured, traced.potential, traced.call)
    with pytest.raises(CaptureError, match=rf"{words} of dimension 0 of .*'cell'.*\(2, 3, 3\).*tensor\.shape"):
        validate_stages(captured, traced.potential, traced.call_on(make_batch(OTHER)))


class SizeFromItem(Potential):
    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        num_structures = batch["index"][-1].item() + 1
        return values.new_zeros(num_structures).index_add(0, batch["index"], values)  # type: ignore[call-overload]


@pytest.mark.parametrize("potential", [SizeFromValue, SizeFromItem, Length])
@pytest.mark.parametrize("num_stages", [1, 2])
def test_sizes_from_data_stay_symbolic(potential: type[Potential], num_stages: int) -> None:
    traced = Traced(Step(potential(2)))
    captured = traced.cut(num_stages)
    for sizes in (OTHER, (2,), (3, 1, 2, 5)):
        assert_parity(captured, traced.module, make_batch(sizes))
    assert "int" not in globals() and "len" not in globals()


class Squeezed(Potential):
    """The energy of one structure has no dimension."""

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        return super().pool(values[:, None].sum(-1), batch)[:, None].squeeze()


@pytest.mark.parametrize("num_stages", [1, 2])
def test_one_structure_keeps_its_dimension(num_stages: int) -> None:
    traced = Traced(Step(Squeezed(2)))
    captured = traced.cut(num_stages)
    for sizes in (OTHER, (4,)):
        call = traced.call_on(make_batch(sizes))
        validate_stages(captured, traced.potential, call)
        assert run_staged(captured, traced.potential, call)[0].outputs[0].shape == (len(sizes),)
        assert_parity(captured, traced.module, make_batch(sizes))


def scripted_sum(values: Tensor, index: Tensor, cell: Tensor) -> Tensor:
    size: int = cell.size(0)
    return torch.zeros([size], dtype=values.dtype).index_add(0, index, values)


def scripted_sum_of_int(values: Tensor, index: Tensor, cell: Tensor) -> Tensor:
    size = int(cell.size(0))
    return torch.zeros([size], dtype=values.dtype).index_add(0, index, values)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("function", [scripted_sum, scripted_sum_of_int])
def test_torchscript_is_right_or_refused(function: Any) -> None:
    class Scripted(Potential):
        scripted = staticmethod(torch.jit.script(function))

        def pool(self, values: Tensor, batch: Batch) -> Tensor:
            return self.scripted(values, batch["index"], batch["cell"])

    traced = Traced(Step(Scripted(1)))
    captured = traced.cut(1)
    for sizes in ((4,), (2, 1), (3, 2, 4), (2, 5, 1, 3, 4)):
        try:
            validate_stages(captured, traced.potential, traced.call_on(make_batch(sizes)))
        except CaptureError as error:
            assert "size 3 of dimension 0" in str(error)
        else:
            assert_parity(captured, traced.module, make_batch(sizes))


def test_branch_that_validation_does_not_reach() -> None:
    traced = Traced(Step(UpTo(1)))
    captured = traced.cut(1)
    validate_stages(captured, traced.potential, traced.call_on(make_batch(OTHER)))
    assert_parity(captured, traced.module, make_batch((3, 2, 4, 2)))
    with pytest.raises(CaptureError, match=r"size at most 4 of dimension 0.*\(5, 3, 3\)"):
        assert_parity(captured, traced.module, make_batch((3, 2, 4, 2, 2)))


class Crowded(Potential):
    """A Python branch on how many edges there are for an atom; its sums write to a tensor."""

    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        energies = values.new_zeros(batch["cell"].shape[0]).index_add_(0, batch["index"], values)
        return 2 * energies if batch["edges"].shape[1] > 2 * batch["positions"].shape[0] else energies


class UnlessFive(Potential):
    def pool(self, values: Tensor, batch: Batch) -> Tensor:
        energies = super().pool(values, batch)
        return 2 * energies if batch["cell"].shape[0] == 5 else energies


@pytest.mark.parametrize(
    ("potential", "right", "wrong", "words"),
    [
        (Crowded, (4, 4), (3, 2), r"> 2\*s\d+, but .* = 8 \(dimension 1 of its input \S*'edges'\]\)"),
        (UnlessFive, (2, 2), (2, 3, 2, 3, 2), r"Ne\(s\d+, 5\), but .* = 5 \(dimension 0 of its input \S*'cell'\]\)"),
    ],
)
def test_branches_on_relations_between_sizes(
    potential: type[Potential], right: tuple[int, ...], wrong: tuple[int, ...], words: str
) -> None:
    traced = Traced(Step(potential(1)))
    captured = traced.cut(1)
    assert_parity(captured, traced.module, make_batch(right))
    with pytest.raises(CaptureError, match=words):
        assert_parity(captured, traced.module, make_batch(wrong))


def test_unused_labels_may_have_any_size() -> None:
    traced = Traced(Step(Potential(1)), {**make_batch(TRACED), "notes": torch.zeros(0, 1)})
    for notes in (torch.zeros(0, 1), torch.zeros(5, 3)):
        batch = {**make_batch(OTHER), "notes": notes}
        assert traced.cut(1).bind_sizes(traced.format.bind("potential", (batch,), {}))
        assert_parity(traced.cut(1), traced.module, batch)


class NoGradGeometry(Potential):
    """Harmless: nothing differentiable is made under no_grad."""

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        with torch.no_grad():
            neighbours = torch.zeros_like(vectors[:, 0]).index_add(0, batch["edges"][1] * 0, vectors[:, 0] * 0 + 1)
        return super().features(batch, vectors * (1 + 0 * neighbours[:, None]))


class NoGradGate(Potential):
    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        with torch.no_grad():
            gate = torch.sigmoid(h.sum(-1, keepdim=True))
        return h * gate


class SetGradEnabled(Potential):
    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        h = super().features(batch, vectors)
        with torch.set_grad_enabled(False):
            gate = torch.sigmoid(h.sum(-1, keepdim=True))
        with torch.enable_grad():
            return h * gate


def test_harmless_no_grad() -> None:
    traced = Traced(Step(NoGradGeometry(1)))
    assert_parity(traced.cut(1), traced.module, make_batch(OTHER))


@pytest.mark.parametrize("potential", [NoGradGate, SetGradEnabled])
def test_no_grad_on_the_way_is_refused(potential: type[Potential]) -> None:
    traced = Traced(Step(potential(1)))
    with pytest.raises(CaptureError, match=r"differs from the module itself.*torch\.no_grad\(\) in the forward"):
        validate_stages(traced.cut(1), traced.potential, traced.call_on(make_batch(OTHER)))
