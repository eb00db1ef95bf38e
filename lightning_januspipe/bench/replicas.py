"""Measures the gain of sharing samples among replicas on structures of very different sizes: simulated and timed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lightning_januspipe.bench.emulate import EmulatedMesh, MeshWork, MicrobatchWork, emulate_mesh
from lightning_januspipe.bench.emulate.schedules import COSTS, suitable_unit
from lightning_januspipe.bench.work import Work
from lightning_januspipe.graph.partition import MAX_IMBALANCE
from lightning_januspipe.loader import packing
from lightning_januspipe.loader.packing import imbalance, pack_samples, plan
from lightning_januspipe.mesh import MeshShape
from lightning_januspipe.schedule import Schedule, build_schedule, simulate
from lightning_januspipe.testing import RankPool, quiet_trainer

if TYPE_CHECKING:
    from ase import Atoms


MESHES = ((8, 2, 2), (4, 2, 4))
"""Pipeline × data × graph ranks of simulation and emulation."""

WAYS = ("in the loader's order", "microbatches", "replicas")

_NUM_STEPS = 8  # simulated
_NUM_GROUPS = 2  # micro-batches of a replica
_CUTOFF = 4.0
_SPECIES = ("H", "C", "N", "O", "Cu", "Ni")

Groups = list[list[int]]


def mixture(num_structures: int, seed: int = 0) -> list[Atoms]:
    """Returns molecules of 5 to 50 atoms, with one in eight a box of water or metal of 192 to 500 atoms.

    They have no labels.

    Args:
        num_structures: Number of structures.
        seed: Seed of all random choices.
    """
    rng = np.random.default_rng(seed)
    makers = (_water, _metal)
    return [
        makers[int(rng.integers(2))](rng) if rng.random() < 1 / 8 else _molecule(rng) for _ in range(num_structures)
    ]


def _molecule(rng: np.random.Generator) -> Atoms:
    """Returns atoms that each lie 1.1 to 1.5 Å from another and at least 1 Å from all."""
    from ase import Atoms

    size = int(rng.integers(5, 51))
    points = np.zeros((1, 3))
    while len(points) < size:
        step = rng.normal(size=3)
        new = points[rng.integers(len(points))] + step / np.linalg.norm(step) * rng.uniform(1.1, 1.5)
        if np.linalg.norm(points - new, axis=1).min() > 1.0:
            points = np.vstack([points, new])
    return Atoms(rng.choice(["H", "C", "N", "O"], size=size), positions=points)


def _water(rng: np.random.Generator) -> Atoms:
    return water_box([(4, 4, 4), (4, 4, 5), (4, 5, 5), (5, 5, 5)][int(rng.integers(4))], rng)


def water_box(shape: tuple[int, int, int], rng: np.random.Generator) -> Atoms:
    """Returns water molecules in random directions on a lattice with the density of the liquid.

    Args:
        shape: Molecules along each axis.
        rng: Generator of the directions.
    """
    from ase import Atoms
    from ase.build import molecule

    box = Atoms(cell=np.array(shape) * 3.1, pbc=True)
    for site in np.ndindex(*shape):
        one = molecule("H2O")
        one.euler_rotate(*rng.uniform(0, 360, size=3))
        one.translate(np.array(site) * 3.1)
        box += one
    return box


def _metal(rng: np.random.Generator) -> Atoms:
    from ase.build import bulk

    box = bulk(str(rng.choice(["Cu", "Ni"])), "fcc", a=3.6, cubic=True)
    box = box.repeat([(3, 4, 4), (4, 4, 4), (4, 4, 5), (4, 5, 5)][int(rng.integers(4))])
    box.rattle(0.1, seed=int(rng.integers(1 << 30)))
    return box


def microbatches_of_replicas(costs: Sequence[float], num_replicas: int, num_groups: int, way: str) -> list[Groups]:
    """Deals the samples of one step to the micro-batches of all replicas.

    Args:
        costs: Costs of the samples, replica after replica, the same number for each.
        num_replicas: Number D of replicas.
        num_groups: Micro-batches of each replica.
        way: One of :data:`WAYS`.
    """
    if way == "replicas":
        return plan(costs, num_replicas, num_groups)
    shares = np.array_split(np.arange(len(costs)), num_replicas)
    if way == "microbatches":
        return [
            [[int(mine[i]) for i in g] for g in pack_samples([costs[s] for s in mine], num_groups)] for mine in shares
        ]
    return [[[int(i) for i in group] for group in np.array_split(mine, num_groups)] for mine in shares]


def _steps(work: Work, num_steps: int, num_ranks: int, num_replicas: int) -> tuple[Schedule, list[list[float]]]:
    """Returns the schedule of a mesh, and the costs of the samples of every step, replica after replica."""
    from lightning_januspipe.data import StructureDataset
    from lightning_januspipe.loader.sample_sizes import sample_costs

    num_groups = 2 * num_ranks
    per_step = num_replicas * num_groups * work.batch_size
    costs = sample_costs(StructureDataset(mixture(per_step * num_steps), cutoff=_CUTOFF))
    assert costs is not None
    return build_schedule("wavek-zb", num_ranks, num_groups, COSTS), costs.reshape(num_steps, per_step).tolist()


def counted(work: Work) -> str:
    """Returns a table of the imbalance of micro-batches and replicas, and of the simulated time of a step.

    Args:
        work: The work; its ``batch_size`` is the number of structures in a micro-batch.
    """
    lines = ["| P, D, G | groups | micro-batches | worst | replicas | worst | step over ideal | throughput |"]
    lines.append("|---" * 8 + "|")
    for num_ranks, num_replicas, num_graph in MESHES:
        schedule, steps = _steps(work, _NUM_STEPS, num_ranks, num_replicas)
        first: list[float] = []
        for way in WAYS:
            micro, across, times, over = [], [], [], []
            for costs in steps:
                dealt = microbatches_of_replicas(costs, num_replicas, schedule.num_microbatches, way)
                micro.append(imbalance(costs, [g for mine in dealt for g in mine]))
                across.append(imbalance(costs, [[i for g in mine for i in g] for mine in dealt]))
                shared = [[shared_by_graph_ranks([costs[i] for i in g], num_graph) for g in mine] for mine in dealt]
                replicas = [[max(one.loads) for one in mine] for mine in shared]
                times.append(max(simulate(schedule, COSTS, weights=mine).makespan for mine in replicas))
                over.append(times[-1] / (sum(costs) / num_graph / num_replicas * COSTS.total))
            first = first or times
            gain = statistics.median(a / b for a, b in zip(first, times, strict=True))
            numbers = (statistics.median(micro), max(micro), statistics.median(across), max(across))
            cells = " | ".join(f"{number:.3f}" for number in (*numbers, statistics.median(over)))
            lines.append(f"| {num_ranks}, {num_replicas}, {num_graph} | {way} | {cells} | {gain:.2f} |")
    return "\n".join(lines)


def shared_by_graph_ranks(costs: Sequence[float], num_ranks: int) -> MicrobatchWork:
    """Returns the work of graph ranks on a micro-batch: whole structures where that balances, else equal shares.

    Args:
        costs: Costs of the structures.
        num_ranks: Number G of graph ranks.
    """
    loads = tuple(sum(cost for cost, _ in dealt) for dealt in packing.deal(costs, num_ranks))
    if num_ranks == 1 or (len(costs) >= num_ranks and max(loads) * num_ranks <= MAX_IMBALANCE * sum(loads)):
        return MicrobatchWork(loads)
    return MicrobatchWork((sum(costs) / num_ranks,) * num_ranks, is_sharded=True)


def emulated(work: Work, runs: int, report: Callable[[str], None] = print, pool: RankPool | None = None) -> str:
    """Returns a table of all ways on emulated meshes, with a process for each rank.

    Args:
        work: The work. Its ``batch_size`` is the number of structures in a micro-batch; its ``steps`` first steps are
            taken out of the steps that :func:`counted` simulates.
        runs: Runs of each step in each way.
        report: Gets a line before each mesh.
        pool: The processes; None starts some for this call.
    """
    lines = [
        "| P, D, G | groups | sharded | simulated (s) | emulated (s) | over simulated | range "
        "| throughput, simulated | throughput, emulated | range |",
        "|---" * 10 + "|",
    ]
    notes = []
    for sizes in MESHES:
        shape = MeshShape(*sizes)
        schedule, steps = _steps(work, work.steps, shape.pipeline, shape.data)
        mean = statistics.mean(map(sum, steps)) / (shape.size // shape.pipeline * schedule.num_microbatches)
        rounds = [_shared(costs, shape, schedule, way, mean) for _ in range(runs) for costs in steps for way in WAYS]
        unit = suitable_unit([schedule], COSTS, shape)
        report(f"P, D, G = {_name(shape)}: {len(rounds)} steps in {shape.size} processes")
        mesh = emulate_mesh(shape, schedule, COSTS, rounds, seconds_per_unit=unit, pool=pool)
        lines += _rows(shape, rounds, mesh)
        notes.append(_runtime(shape, unit, mesh))
    return "\n".join([*lines, "", *notes])


def _name(shape: MeshShape) -> str:
    return f"{shape.pipeline}, {shape.data}, {shape.graph}"


def _shared(costs: Sequence[float], shape: MeshShape, schedule: Schedule, way: str, mean: float) -> MeshWork:
    """Returns all micro-batches of a step, with loads in units of a mean micro-batch's."""
    return [
        [shared_by_graph_ranks([costs[i] / mean for i in group], shape.graph) for group in mine]
        for mine in microbatches_of_replicas(costs, shape.data, schedule.num_microbatches, way)
    ]


def _rows(shape: MeshShape, rounds: Sequence[MeshWork], mesh: EmulatedMesh) -> list[str]:
    """Returns one row for each way; gains compare steps on the same samples."""
    lines, num = [], len(WAYS)
    for index, way in enumerate(WAYS):
        works, steps = rounds[index::num], mesh.steps[index::num]
        sharded = [one.is_sharded for work in works for mine in work for one in mine]
        over = [100 * (step.makespan / step.simulated - 1) for step in steps]
        pairs = list(zip(mesh.steps[::num], steps, strict=True))
        gains = [first.makespan / step.makespan for first, step in pairs]
        lines.append(
            f"| {_name(shape)} | {way} | {statistics.mean(sharded):.0%} "
            f"| {statistics.median(step.simulated for step in steps):.3f} "
            f"| {statistics.median(step.makespan for step in steps):.3f} "
            f"| {statistics.median(over):+.1f} % | {min(over):+.1f} to {max(over):+.1f} % "
            f"| {statistics.median(first.simulated / step.simulated for first, step in pairs):.2f} "
            f"| {statistics.median(gains):.2f} | {min(gains):.2f} to {max(gains):.2f} |"
        )
    return lines


def _runtime(shape: MeshShape, unit: float, mesh: EmulatedMesh) -> str:
    def ms(seconds: float) -> str:
        return f"{1e3 * seconds:.2f} ms"

    return (
        f"{_name(shape)}: a rank works {unit * COSTS.total:.3f} s on a mean micro-batch. An action that waited for "
        f"another rank's began {ms(mesh.handover)} after that had ended, one that waited for nothing "
        f"{ms(mesh.turnaround)} after the one before it; phases took {ms(mesh.oversleep)} longer than asked for, "
        f"exchanges of graph ranks {ms(mesh.exchange)} and reductions of gradients {ms(mesh.reduction)} from when the "
        f"last one had come. The busiest process used {mesh.cpu:.0%} of a core; ranks ran "
        f"{'before' if mesh.urgent else 'among'} other programs."
    )


def timed(work: Work, runs: int) -> str:
    """Returns a table of two replicas on this machine, with one thread each.

    Args:
        work: The work, as in :func:`counted`.
        runs: Runs of each of the two ways, in turn.
    """
    found: dict[str, list[list[tuple[float, float]]]] = {way: [] for way in WAYS[1:]}
    with RankPool(2) as pool:
        for run in range(runs + 1):  # the first warms up
            for way, steps in found.items():
                ranks = pool.run(_fit, work, way, timeout=1800)
                if run:
                    steps.append([(max(wall), max(cpu)) for wall, cpu in map(_transposed, _transposed(ranks))])
    lines = [
        "| balance | all steps (s) | range over runs | throughput | busier process (s) | throughput | by costs |",
        "|---" * 7 + "|",
    ]
    by_costs = {way: _busiest(work, way) for way in found}
    first: tuple[float, ...] = ()
    for way, of in found.items():
        sums = tuple(
            sum(statistics.median(times) for times in _transposed([[step[kind] for step in run] for run in of]))
            for kind in range(2)
        )
        first = first or sums
        walls = [sum(wall for wall, _ in run) for run in of]
        lines.append(
            f"| {way} | {sums[0]:.2f} | {min(walls):.2f} to {max(walls):.2f} | {first[0] / sums[0]:.2f} "
            f"| {sums[1]:.2f} | {first[1] / sums[1]:.2f} | {by_costs['microbatches'] / by_costs[way]:.2f} |"
        )
    return "\n".join(lines)


def _transposed(rows: Any) -> list[tuple[Any, ...]]:
    return list(zip(*rows, strict=True))


def _timed_structures(work: Work) -> list[Atoms]:
    return mixture((work.steps + 1) * 2 * _NUM_GROUPS * work.batch_size, seed=1)


def _busiest(work: Work, way: str) -> float:
    """Returns the work of the replica with the most to do, summed over the timed steps."""
    from lightning_januspipe.data import StructureDataset
    from lightning_januspipe.loader.sample_sizes import sample_costs

    costs = sample_costs(StructureDataset(_timed_structures(work), cutoff=_CUTOFF))
    assert costs is not None
    total = 0.0
    for step in costs.reshape(work.steps + 1, -1)[1:]:
        of_replicas = np.concatenate([step[0::2], step[1::2]]).tolist()  # as the sampler deals them out
        dealt = microbatches_of_replicas(of_replicas, 2, _NUM_GROUPS, way)
        total += max(sum(of_replicas[i] for group in mine for i in group) for mine in dealt)
    return total


def _fit(work: Work, balance: str) -> list[tuple[float, float]]:
    """Returns the seconds of each step but the first: until all replicas have ended, and of this process's work."""
    import lightning
    from ase.calculators.singlepoint import SinglePointCalculator
    from torch.utils.data import DataLoader, DistributedSampler

    from lightning_januspipe.data import StructureDataset, collate_structures
    from lightning_januspipe.models import EquivariantPotential, PotentialModule

    torch.set_num_threads(1)
    torch.manual_seed(0)
    structures = _timed_structures(work)
    for atoms in structures:
        atoms.calc = SinglePointCalculator(atoms, energy=0.0, forces=np.zeros((len(atoms), 3)))
    dataset = StructureDataset(structures, cutoff=_CUTOFF, species=_SPECIES, dtype="float32", precompute=True)
    potential = EquivariantPotential(
        list(_SPECIES), _CUTOFF, num_layers=3, num_features=32, l_max=1, avg_num_neighbors=20.0
    )
    times: list[tuple[float, float]] = []

    class Clock(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            trainer.strategy.barrier()
            self._began = time.perf_counter(), time.process_time()

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            used = time.process_time() - self._began[1]
            trainer.strategy.barrier()
            times.append((time.perf_counter() - self._began[0], used))

    strategy = {"pipeline_size": 1, "data_size": 2, "num_microbatches": _NUM_GROUPS, "balance": balance}
    trainer = quiet_trainer(strategy, max_epochs=1, callbacks=[Clock()])
    shape = trainer.strategy.mesh_shape
    sampler: Any = DistributedSampler(dataset, shape.data, shape.coordinates(trainer.global_rank)[1], shuffle=False)
    loader: Any = DataLoader(dataset, _NUM_GROUPS * work.batch_size, sampler=sampler, collate_fn=collate_structures)
    trainer.fit(PotentialModule(potential), loader)
    return times[1:]


def unequal_structures(work: Work, runs: int | None = None, emulate: bool = False) -> str:
    """Shows what sharing samples among replicas gains on structures of very different sizes.

    Micro-batches are made of each replica's own samples, or of the samples of all replicas.
    """
    if emulate:
        return f"Emulated:\n\n{emulated(work, runs or 1)}"
    return f"Simulated:\n\n{counted(work)}\n\nTwo replicas on this machine:\n\n{timed(work, runs or 5)}"
