"""What ranks do in the tests of the engine, the mesh and the clipping: run with ``RankPool.run``."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from toy import CHAINS, FLOAT, LAST, Layout, ToyStage, assert_close, chain, double_backward, loss_gradients, microbatch

from lightning_januspipe.engine.executor import Executor
from lightning_januspipe.engine.gradients import GradientBuffers, reduce_gradients
from lightning_januspipe.engine.p2p import Channel, Links
from lightning_januspipe.engine.route import evaluation_schedule
from lightning_januspipe.engine.specs import LossGradients, MicrobatchInput
from lightning_januspipe.engine.stage import SplitStage, Stage
from lightning_januspipe.errors import PipelineError
from lightning_januspipe.mesh import Mesh, MeshShape, as_world
from lightning_januspipe.schedule import PhaseCosts, Schedule, build_schedule
from lightning_januspipe.strategy.gradient_norm import clip_gradients_by_norm

CPU = torch.device("cpu")
LAYOUTS: dict[str, list[Layout]] = {
    **CHAINS,
    "one stage": [LAST],
    "everything": [
        Layout(species=True, vectors=True, charges=True),
        Layout(species=True, vectors=True, energy=True, trainable=False),
        Layout(species=True, vectors=True, geometry=False, charges=True),
        Layout(species=True, vectors=True, energy=True),
    ],
    "eight stages": [
        *(Layout(charges=i == 2, energy=i == 1, geometry=i != 3, trainable=i != 4) for i in range(6)),
        Layout(shared=True),
        LAST,
    ],
}


def _start() -> int:
    dist.init_process_group("gloo")
    return dist.get_rank()


# -- p2p -------------------------------------------------------------------------------------------------------------


def exchange(messages: list[list[Tensor]], through_host: bool | None = None) -> tuple[list[list[Tensor]], int]:
    """Has rank 0 send all messages and rank 1 send them back; receives are posted before anything is sent."""
    rank = _start()
    there, back = dist.new_group([0, 1]), dist.new_group([0, 1])
    out = Channel(there if rank == 0 else back, 1 - rank, CPU, through_host)
    incoming = Channel(back if rank == 0 else there, 1 - rank, CPU, through_host)
    shapes = [[(tuple(t.shape), t.dtype) for t in m] for m in messages]
    posted = [incoming.receive(s) for s in shapes]
    if rank == 0:
        for message in messages:
            out.send(message)
    received = []
    for receive in posted:
        received.append(receive.wait(timedelta(seconds=20)))
        if rank == 1:
            out.send(received[-1])
    out.flush(timedelta(seconds=20))
    return received, out.bytes_sent


def connect_all() -> list[int]:
    """Connect every pair of ranks both ways, then send one's number to all; returns what came from the others."""
    rank, size = _start(), dist.get_world_size()
    links = Links(rank, range(size), dist.new_group(), dist.new_group(), CPU)  # type: ignore[arg-type]
    others = [r for r in range(size) if r != rank]
    links.connect(sorted(((a, b) for a in range(size) for b in range(size) if a != b), key=lambda p: (rank * p[0], p)))
    for other in others:
        links.to(other).send([torch.tensor(rank)])
    received = [links.from_(other).receive([((), torch.int64)]) for other in others]
    numbers = [int(r.wait(timedelta(seconds=20))[0]) for r in received]
    for _, channel in links.outgoing():
        channel.flush(timedelta(seconds=20))
    return numbers


# -- executor --------------------------------------------------------------------------------------------------------


def make_executor(
    layouts: list[Layout], schedule: Schedule | None = None, timeout: float = 30.0
) -> tuple[Executor, list[ToyStage], GradientBuffers]:
    """This rank's executor (one stage on each rank if no schedule is given), the whole chain, this rank's gradients."""
    rank, size = dist.get_rank(), dist.get_world_size()
    functions, spec = chain(layouts)
    stages = (rank,) if schedule is None else schedule.stages_of(rank)
    assert len(functions) == (size if schedule is None else schedule.num_stages)
    down, up = dist.new_group(), dist.new_group()
    assert down is not None and up is not None
    gradients = GradientBuffers()
    executor = Executor(
        rank,
        {s: (SplitStage if schedule and schedule.is_split(s) else Stage)(functions[s], gradients) for s in stages},
        spec,
        Links(rank, range(size), down, up, CPU),
        timedelta(seconds=timeout),
    )
    return executor, functions, gradients


def num_inflight(executor: Executor) -> int:
    """Returns the micro-batches in flight in any stage of the rank."""
    return sum(stage.num_inflight for stage in executor.stages.values())


def unequal_inputs(num: int) -> list[MicrobatchInput]:
    """Returns micro-batches of different numbers of atoms, edges and structures."""
    return [microbatch(20 + i, num_atoms=4 + 5 * i % 7, num_structures=1 + i % 3) for i in range(num)]


def schedule_of(
    name: str, num_ranks: int, num_stages: int, num_microbatches: int, placement: tuple[int, ...] | None = None
) -> Schedule:
    """Returns a schedule whose stages, and so whose ranks, have unequal costs, as real ones do."""
    costs = [PhaseCosts(1.0 + 0.1 * s, 1.5, 1.3, 1.0 - 0.05 * s, 1.2, 0.9) for s in range(num_stages)]
    return build_schedule(name, num_ranks, num_microbatches, costs, chunks=num_stages // num_ranks, placement=placement)


def train_like_reference(layout: str, name: str, numbers: list[int]) -> tuple[list[float], int]:
    """Runs steps with these numbers of micro-batches.

    Returns:
        The largest gradient of each step, and how many stages of this rank are split.
    """
    rank = _start()
    size, num_stages = dist.get_world_size(), len(LAYOUTS[layout])
    schedules = [schedule_of(name, size, num_stages, numbers[0])]
    placement = schedules[0].placement if name == "wavek-zb" else None  # stages stay where they are
    schedules += [schedule_of(name, size, num_stages, num, placement) for num in numbers[1:]]
    executor, functions, gradients = make_executor(LAYOUTS[layout], schedules[0])
    parameters = list(dict.fromkeys(p for s in executor.stages for p in functions[s].parameters))
    everything = list(dict.fromkeys(p for f in functions for p in f.parameters))
    largest = []
    for num, schedule in zip(numbers, schedules, strict=True):
        assert schedule.placement == schedules[0].placement
        inputs = unequal_inputs(num)
        expected = [double_backward(functions, i.tensors) for i in inputs]
        called: list[int] = []

        def loss(
            index: int,
            observables: list[Tensor],
            derivatives: list[Tensor],
            expected: Any = expected,
            called: Any = called,
        ) -> LossGradients:
            called.append(index)
            for found, wanted in zip(observables, expected[index].observables, strict=True):
                assert_close(found, wanted, f"observable of micro-batch {index}")
            for found, wanted in zip(derivatives, expected[index].derivatives, strict=True):
                assert_close(found, wanted, f"derivative of micro-batch {index}")
            return loss_gradients(observables, derivatives)

        executor.run(schedule, inputs, loss)
        assert sorted(called) == list(range(num)), f"the loss was evaluated for {called}"
        assert num_inflight(executor) == 0
        # Ranks that share a stage have a part of its gradient each.
        for i, parameter in enumerate(everything):
            wanted = torch.stack([e.gradients[parameter] for e in expected]).sum(0)
            found = gradients.get(parameter)
            total = torch.zeros_like(parameter) if found is None else found.clone()
            dist.all_reduce(total)
            assert_close(total, wanted, f"rank {rank}, {num} micro-batches: gradient {i}")
            assert found is None or any(parameter is p for p in parameters), "a gradient of another rank's stage"
        own = [gradients.get(p) for p in parameters]
        largest.append(max([float(g.abs().max()) for g in own if g is not None], default=0.0))
        gradients.clear()
    return largest, sum(map(schedules[0].is_split, schedules[0].stages_of(rank)))


def evaluate_like_reference(layout: str, name: str, num: int) -> int:
    """Evaluates, trains and evaluates again; returns how many micro-batches were compared on this rank."""
    rank = _start()
    size, num_stages = dist.get_world_size(), len(LAYOUTS[layout])
    training = schedule_of(name, size, num_stages, num)
    executor, functions, gradients = make_executor(LAYOUTS[layout], training)
    plan = evaluation_schedule(training.placement, training.force_placement, size, num)
    inputs = unequal_inputs(num)
    compared = 0
    for attempt in range(2):
        results = executor.evaluate(plan, inputs)
        assert len(results) == num and num_inflight(executor) == 0
        for i, result in zip(inputs, results, strict=True):
            assert (result is None) == (rank != training.force_placement[0])
            if result is None:
                continue
            expected = double_backward(functions, i.tensors)
            for found, wanted in zip(result[0], expected.observables, strict=True):
                assert_close(found, wanted, "observable")
            for found, wanted in zip(result[1], expected.derivatives, strict=True):
                assert_close(found, wanted, "derivative")
            compared += 1
        if attempt == 0:
            assert not any(gradients.get(p) is not None for f in functions for p in f.parameters)
            executor.run(training, inputs, lambda _, y, x: loss_gradients(y, x))
    return compared


def step_with_a_dead_rank(dead: int) -> None:
    """Rank ``dead`` ends without a word, in its loss (before BF) of micro-batch 1."""
    rank = _start()
    executor, _, _ = make_executor(LAYOUTS["three stages"], timeout=60.0)

    def loss(index: int, observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        if rank == dead and index == 1:
            os._exit(1)
        return loss_gradients(observables, derivatives)

    plan = build_schedule("gpipe", 3, 3, PhaseCosts(1, 1, 2, 2))
    executor.run(plan, unequal_inputs(3), loss)


def step_with_a_hanging_rank(hanging: int, timeout: float, hang: float) -> tuple[str, float, bool]:
    """Rank ``hanging`` sleeps in its loss of micro-batch 1; returns what this rank noticed, and after how long."""
    rank = _start()
    executor, _, _ = make_executor(LAYOUTS["two stages"], timeout=timeout)
    executor.evaluate(evaluation_schedule((0, 1), (0, 1), 2, 1), unequal_inputs(1))  # all connections are made
    dist.barrier()

    def loss(index: int, observables: list[Tensor], derivatives: list[Tensor]) -> LossGradients:
        if rank == hanging and index == 1:
            time.sleep(hang)
        return loss_gradients(observables, derivatives)

    plan = build_schedule("gpipe", 2, 2, PhaseCosts(1, 1, 2, 2))
    began = time.monotonic()
    try:
        executor.run(plan, unequal_inputs(2), loss)
    except PipelineError as error:
        return str(error), time.monotonic() - began, num_inflight(executor) == 0
    return "", time.monotonic() - began, num_inflight(executor) == 0


def make_executor_alone() -> tuple[Executor, list[ToyStage], GradientBuffers]:
    """Returns an executor of one stage, in one process without process groups."""
    functions, spec = chain(LAYOUTS["one stage"])
    gradients = GradientBuffers()
    return Executor(0, {0: Stage(functions[0], gradients)}, spec), functions, gradients


# -- gradients -------------------------------------------------------------------------------------------------------


def reduce_some(divide_by: int) -> dict[str, Tensor | None]:
    """Reduces gradients that only some ranks have, in two dtypes; rank r has r + 1 in every entry."""
    rank = _start()
    parameters = {
        "everywhere": nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)),
        "first only": nn.Parameter(torch.zeros(4, dtype=torch.float32)),
        "last only": nn.Parameter(torch.zeros((), dtype=torch.float64)),
        "nowhere": nn.Parameter(torch.zeros(5)),
        "frozen": nn.Parameter(torch.zeros(2), requires_grad=False),
        "single": nn.Parameter(torch.zeros(3, dtype=torch.float32)),
        "transposed": nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)),
    }
    holders = {"first only": (0,), "last only": (dist.get_world_size() - 1,), "nowhere": (), "frozen": ()}
    for name, parameter in parameters.items():
        if rank in holders.get(name, range(dist.get_world_size())):
            parameter.grad = torch.full_like(parameter, rank + 1.0)
    parameters["transposed"].grad = (torch.arange(6.0, dtype=torch.float64) * (rank + 1)).view(2, 3).t()
    group = dist.group.WORLD
    assert group is not None
    reduce_gradients(parameters.values(), group, divide_by)
    reduce_gradients([], group)
    return {n: p.grad for n, p in parameters.items()}


# -- mesh ------------------------------------------------------------------------------------------------------------


def inspect_mesh(pipeline: int, data: int) -> dict[str, Any]:
    """Returns what a rank sees of its mesh: its place, and the members of its groups by all-reduce."""
    rank = _start()
    mesh = Mesh(MeshShape(pipeline, data), rank, CPU, timedelta(seconds=30))

    def members(group: Any) -> list[int]:
        seen = torch.zeros(pipeline * data)
        seen[rank] = 1
        dist.all_reduce(seen, group=group)
        return seen.nonzero().flatten().tolist()

    groups = {n: getattr(mesh, f"{n}_group") for n in ("pipeline", "data", "down", "up", "control", "alone")}
    found: dict[str, Any] = {n: members(g) for n, g in groups.items()}
    found["indices"] = (mesh.pipeline_rank, mesh.data_rank, mesh.graph_rank)
    found["pipeline_ranks"] = mesh.pipeline_ranks
    return found


def use_groups_as_world() -> dict[str, Any]:
    """Returns the results of collectives that name no group, inside and outside of ``as_world``, on 2 × 2 ranks."""
    rank = _start()
    mesh = Mesh(MeshShape(2, 2), rank, CPU)

    def world() -> tuple[int, float]:
        total = torch.tensor(float(10**rank))
        dist.all_reduce(total)
        return dist.get_world_size(), total.item()

    found: dict[str, Any] = {"before": world()}
    with as_world(mesh.data_group):
        found["data"] = world()
        with as_world(mesh.alone_group):
            found["alone"] = world()
        found["data again"] = world()
    found["after"] = world()
    try:
        with as_world(mesh.data_group):
            raise KeyError("in the user's step")
    except KeyError as error:
        found["error"] = error.args
    found["after an error"] = world()
    with as_world(None):
        found["none"] = world()
    return found


# -- clipping --------------------------------------------------------------------------------------------------------


class _Owns:
    shards: tuple[()] = ()
    experts = None

    def __init__(self, owned: set[nn.Parameter]) -> None:
        self._owned = owned

    def owns(self, parameter: nn.Parameter) -> bool:
        """Returns whether this rank counts the parameter."""
        return parameter in self._owned

    def is_spread(self, parameter: nn.Parameter) -> bool:
        """Returns whether the parameter is one of experts on several ranks."""
        return False


def clip_in_pipeline(max_norm: float) -> tuple[float, dict[str, Tensor | None]]:
    """Parameters 0 and 1 are held by the ranks of the same number, 2 (owned by rank 0) by both, 3 has no gradient."""
    rank = _start()
    mesh = Mesh(MeshShape(2, 1), rank, CPU)
    parameters = clip_parameters()
    held = [parameters[rank], parameters[2], parameters[3]]
    owned = {parameters[rank], parameters[3]} | ({parameters[2]} if rank == 0 else set())
    norm = clip_gradients_by_norm(held, max_norm, _Owns(owned), mesh)  # type: ignore[arg-type]
    return float(norm), {str(i): p.grad for i, p in enumerate(parameters) if any(p is h for h in held)}


def clip_parameters() -> list[nn.Parameter]:
    """Returns the same parameters and gradients on every rank; the last has no gradient."""
    generator = torch.Generator().manual_seed(3)
    parameters = [nn.Parameter(torch.zeros(n, dtype=FLOAT)) for n in (4, 6, 3, 2)]
    for parameter in parameters[:3]:
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=FLOAT)
    return parameters
