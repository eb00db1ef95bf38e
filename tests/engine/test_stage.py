"""The four phases against the plain double backward: same numbers, and each graph walked once."""

from __future__ import annotations

import pytest
import torch
from stage_walk import Products, Walk
from torch import Tensor
from toy import CHAINS, FLOAT, assert_close, chain, double_backward, loss_gradients, microbatch

from lightning_januspipe.engine.gradients import GradientBuffers
from lightning_januspipe.engine.single_process import run_single_process
from lightning_januspipe.engine.specs import LossGradients
from lightning_januspipe.engine.stage import Stage


@pytest.mark.parametrize("name", CHAINS)
def test_gradients_equal_the_double_backward(name: str) -> None:
    functions, spec = chain(CHAINS[name])
    tensors = microbatch(1).tensors
    expected = double_backward(functions, tensors)
    assert expected.derivatives[1].abs().max() > 1e-3, "the strain has to matter for this test"

    result = run_single_process(functions, spec, tensors, loss_gradients)

    for i, (found, wanted) in enumerate(zip(result.observables, expected.observables, strict=True)):
        assert_close(found, wanted, f"observable {i}")
    for i, (found, wanted) in enumerate(zip(result.derivatives, expected.derivatives, strict=True)):
        assert_close(found, wanted, f"derivative {i}")
    for i, (parameter, wanted) in enumerate(expected.gradients.items()):
        assert wanted.abs().max() > 1e-4, "a gradient of zero proves nothing"
        assert_close(result.gradients.get(parameter), wanted, f"gradient {i}")
    for function in functions:
        for weight in function.weights.values():
            assert weight.requires_grad or result.gradients.get(weight) is None, "a frozen weight got a gradient"


@pytest.mark.parametrize("reads", ["energies", "forces"])
def test_loss_of_energies_or_forces_alone(reads: str) -> None:
    functions, spec = chain(CHAINS["three stages"])
    tensors = microbatch(2).tensors

    def loss(observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        if reads == "energies":
            return LossGradients([2 * y for y in observables], [torch.zeros_like(d) for d in derivatives])
        return LossGradients([None for _ in observables], [2 * d for d in derivatives])

    result = run_single_process(functions, spec, tensors, loss)

    coordinates = [tensors[0].clone().requires_grad_(), tensors[4].clone().requires_grad_()]
    boundary: list[Tensor] = []
    for function in functions:
        out = function.forward(coordinates, tensors, boundary)
        boundary = out.boundary
    derivatives = torch.autograd.grad(out.energies[0], coordinates, create_graph=True)
    value = sum(v.square().sum() for v in (out.observables if reads == "energies" else derivatives))
    parameters = [p for f in functions for p in f.parameters]
    for parameter, wanted in zip(parameters, torch.autograd.grad(value, parameters), strict=True):
        assert_close(result.gradients.get(parameter), wanted, "gradient")


def test_messages_have_the_shape_and_dtype_of_the_boundary() -> None:
    functions, _ = chain(CHAINS["integers in the boundary"])
    tensors = microbatch(3).tensors
    gradients = GradientBuffers()
    stages = [Stage(f, gradients) for f in functions]
    boundaries: list[list[Tensor]] = [[]]
    for stage in stages:
        boundaries.append(stage.forward_energy(0, tensors, boundaries[-1])[0])

    def same_form(message: list[Tensor], boundary: list[Tensor]) -> None:
        assert [(t.shape, t.dtype, t.requires_grad) for t in message] == [(t.shape, t.dtype, False) for t in boundary]

    message: list[Tensor] = []
    for i, stage in reversed(list(enumerate(stages))):
        message, derivatives = stage.forward_force(0, message)
        same_form(message, boundaries[i])
    message = []
    for i, stage in enumerate(stages):
        message, _ = stage.backward_force(0, message, [torch.ones_like(d) for d in derivatives])
        same_form(message, boundaries[i + 1])
    message = []
    for i, stage in reversed(list(enumerate(stages))):
        message = stage.backward_energy(
            0, message, [torch.ones_like(tensors[4][:, 0, 0])] * len(stage.function.observables)
        )
        same_form(message, boundaries[i])


def test_evaluation_keeps_nothing_and_gives_the_same_derivatives() -> None:
    functions, _ = chain(CHAINS["energies in several stages"])
    tensors = microbatch(4).tensors
    stages = [Stage(f, GradientBuffers()) for f in functions]
    boundary: list[Tensor] = []
    for stage in stages:
        boundary, _ = stage.forward_energy(7, tensors, boundary)
    total, message = [torch.zeros_like(tensors[0]), torch.zeros_like(tensors[4])], []
    for stage in reversed(stages):
        message, parts = stage.forward_force(7, message, create_graph=False)
        total = [a + b for a, b in zip(total, parts, strict=True)]
        assert stage.num_inflight == 0
    for found, wanted in zip(total, double_backward(functions, tensors).derivatives, strict=True):
        assert_close(found, wanted, "derivative")


def test_six_products_for_each_linear_layer() -> None:
    functions, _ = chain(CHAINS["three stages"])
    tensors = microbatch(5).tensors
    stages = [Stage(f, GradientBuffers()) for f in functions]
    counted = {}  # of the middle stage, which has two linear layers whose inputs depend on the coordinates
    boundary, sent = [], []
    for stage in stages:
        with Products() as products:
            boundary, _ = stage.forward_energy(0, tensors, boundary)
        counted.update({"FE": products.count} if stage is stages[1] else {})
    for stage in reversed(stages):
        with Products() as products:
            sent, derivatives = stage.forward_force(0, sent)
        counted.update({"FF": products.count} if stage is stages[1] else {})
    sent = []
    for stage in stages:
        with Products() as products:
            sent, _ = stage.backward_force(0, sent, [torch.ones_like(d) for d in derivatives])
        counted.update({"BF": products.count} if stage is stages[1] else {})
    sent = []
    for stage in reversed(stages):
        with Products() as products:
            sent = stage.backward_energy(0, sent, [torch.ones(2, dtype=FLOAT)] * len(stage.function.observables))
        counted.update({"BE": products.count} if stage is stages[1] else {})
    assert counted == {"FE": 2 * 1, "FF": 2 * 1, "BF": 2 * 2, "BE": 2 * 2}


def test_deferred_phases_do_one_product_for_each_linear_layer() -> None:
    functions, _ = chain(CHAINS["three stages"])
    walk = Walk([Stage(f, GradientBuffers()) for f in functions], 0, microbatch(5).tensors, defer=True)
    middle = {phase: walk.run(phase)[1] for phase in ("FE", "FF", "BF", "BE", "WF", "WE")}
    assert middle == dict.fromkeys(("FE", "FF", "BF", "BE", "WF", "WE"), 2)


def test_the_first_stage_defers_all_of_its_backward_energy_phase() -> None:
    functions, _ = chain(CHAINS["three stages"])
    stages = [Stage(f, GradientBuffers()) for f in functions]
    walk = Walk(stages, 0, microbatch(5).tensors, defer=True)
    for phase in ("FE", "FF", "BF"):
        walk.run(phase)
    assert walk.run("BE")[0] == 0
    walk.run("WF")
    # "message" (input, weight) and "update" (input, weight), but for the input of the first, the embedding's gradient
    assert walk.run("WE")[0] == 4


@pytest.mark.parametrize("name", CHAINS)
def test_deferral_costs_no_product(name: str) -> None:
    functions, spec = chain(CHAINS[name])
    tensors = microbatch(6).tensors
    with Products() as at_once:
        run_single_process(functions, spec, tensors, loss_gradients)
    with Products() as deferred:
        run_single_process(functions, spec, tensors, loss_gradients, defer=True)
    assert deferred.count == at_once.count > 0


@pytest.mark.parametrize("name", CHAINS)
def test_deferred_phases_add_gradients_in_wf_and_we_only(name: str) -> None:
    functions, _ = chain(CHAINS[name])
    buffers = [GradientBuffers() for _ in functions]
    walk = Walk([Stage(f, b) for f, b in zip(functions, buffers, strict=True)], 0, microbatch(6).tensors, defer=True)
    for phase in ("FE", "FF", "BF", "BE"):
        walk.run(phase)
    assert all(b.get(p) is None for f, b in zip(functions, buffers, strict=True) for p in f.parameters)
    walk.run("WF")
    walk.run("WE")
    assert all(b.get(p) is not None for f, b in zip(functions, buffers, strict=True) for p in f.parameters)


@pytest.mark.parametrize("name", ["two stages", "four stages", "energies in several stages", "shared weights"])
def test_as_many_products_as_the_plain_double_backward(name: str) -> None:
    functions, spec = chain(CHAINS[name])
    tensors = microbatch(6).tensors
    with Products() as reference:
        double_backward(functions, tensors)
    with Products() as split:
        run_single_process(functions, spec, tensors, loss_gradients)
    assert split.count == reference.count > 0


def test_no_hook_is_left_on_the_graph_of_the_forward_pass() -> None:
    stage, derivatives = _after_forward_force()
    state = stage._inflight[0]
    stage.backward_force(0, [], [torch.ones_like(d) for d in derivatives])
    weight = stage.function.parameters[0]
    (gradient,) = torch.autograd.grad(state.observables[0].sum(), weight, retain_graph=True)
    assert gradient.abs().max() > 0, "a hook still stops the gradient"


def test_clear_forgets_what_is_in_flight() -> None:
    stage, _ = _after_forward_force()
    assert stage.num_inflight == 1
    stage.clear()
    assert stage.num_inflight == 0


def _after_forward_force() -> tuple[Stage, list[Tensor]]:
    functions, _ = chain([CHAINS["two stages"][1]])
    stage = Stage(functions[0], GradientBuffers())
    stage.forward_energy(0, microbatch(7).tensors, [])
    return stage, stage.forward_force(0, [])[1]


@pytest.mark.parametrize(
    "order",
    [
        "FE0 FE1 FF0 FF1 BF0 BF1 BE0 BE1",
        "FE0 FE1 FF1 FF0 BF0 BF1 BE1 BE0",
        "FE0 FF0 FE1 BF0 FF1 BF1 BE1 BE0",
        "FE0 FF0 BF0 FE1 FF1 BE0 BF1 BE1",
        "FE0 FF0 BF0 BE0 WF0 WE0 FE1 FF1 BF1 WF1 BE1 WE1",
        "FE0 FE1 FF0 FF1 BF0 BF1 WF1 BE0 BE1 WF0 WE1 WE0",
        "FE0 FF0 FE1 BF0 FF1 BF1 BE1 WF0 WF1 WE1 BE0 WE0",
    ],
)
def test_micro_batches_in_flight_do_not_disturb_one_another(order: str) -> None:
    functions, _ = chain(CHAINS["three stages"])
    gradients = GradientBuffers()
    stages = [Stage(f, gradients) for f in functions]
    batches = [microbatch(9, num_atoms=6).tensors, microbatch(10, num_atoms=11, num_structures=3).tensors]
    walks = [Walk(stages, i, t, defer="WF" in order) for i, t in enumerate(batches)]
    for action in order.split():
        walks[int(action[2])].run(action[:2])
    assert [s.num_inflight for s in stages] == [0, 0, 0]
    first, second = (double_backward(functions, t).gradients for t in batches)
    for parameter, gradient in first.items():
        assert_close(gradients.get(parameter), gradient + second[parameter], "summed gradient")


@pytest.mark.parametrize("defer", ["BF", "BE"])
def test_one_of_the_two_backward_phases_may_be_deferred_alone(defer: str) -> None:
    functions, _ = chain([CHAINS["two stages"][1]])
    gradients = GradientBuffers()
    stage = Stage(functions[0], gradients)
    tensors = microbatch(11).tensors
    _, observables = stage.forward_energy(0, tensors, [])
    _, derivatives = stage.forward_force(0, [])
    seeds = loss_gradients(observables, derivatives)
    stage.backward_force(0, [], seeds.derivatives, defer=defer == "BF")
    if defer == "BF":
        stage.weight_force(0)
    stage.backward_energy(0, [], seeds.observables, defer=defer == "BE")
    if defer == "BE":
        stage.weight_energy(0)
    assert stage.num_inflight == 0
    for parameter, gradient in double_backward(functions, tensors).gradients.items():
        assert_close(gradients.get(parameter), gradient, "gradient")


def test_deferred_phases_in_a_wrong_order_are_refused() -> None:
    stage, derivatives = _after_forward_force()
    with pytest.raises(AssertionError, match="BF did not defer"):
        stage.weight_force(0)
    stage.backward_force(0, [], derivatives, defer=True)
    with pytest.raises(AssertionError, match="WF finds"):
        stage.backward_energy(0, [], [None])
    stage.backward_energy(0, [], [None], defer=True)
    with pytest.raises(AssertionError, match="WF finds"):
        stage.weight_energy(0)
