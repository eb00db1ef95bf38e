"""Compares the prediction of memory and step time of MatRIS-MoE with training steps of small potentials."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from lightning_januspipe.bench.step_costs import Speeds, measured_speeds
from lightning_januspipe.bench.step_counts import BatchSizes, count_step, line_graph_of
from lightning_januspipe.bench.work import trainer_of
from lightning_januspipe.engine.memory import StorageCounter
from lightning_januspipe.testing import RankPool

_SPECIES = ("Cu", "Ni", "Al")
_WARM_UP = 2


@dataclass(frozen=True)
class SmallPotential:
    """Describes a small MatRIS-MoE and its batch.

    Attributes:
        num_blocks: Number of blocks.
        num_features: Width of the features.
        num_experts: Experts of each mixture.
        top_k: Experts of each element.
        expert_features: Width of the experts.
        num_structures: Structures of a batch, metal alloys of 32 atoms.
    """

    num_blocks: int
    num_features: int
    num_experts: int
    top_k: int
    expert_features: int
    num_structures: int

    @property
    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of the potential."""
        names = ("num_blocks", "num_features", "num_experts", "top_k", "expert_features")
        return {"species": _SPECIES, **{name: getattr(self, name) for name in names}}


_POTENTIALS = (
    SmallPotential(2, 32, 8, 4, 112, num_structures=2),
    SmallPotential(2, 64, 8, 2, 520, num_structures=2),
    SmallPotential(2, 128, 12, 4, 264, num_structures=1),
    SmallPotential(1, 128, 8, 2, 2000, num_structures=1),
)


@dataclass(frozen=True)
class MeasuredSteps:
    """Holds what training steps took, and the speeds of the process that trained.

    Attributes:
        sizes: Sizes of the batch.
        speeds: Measured speeds.
        seconds: Processor time of each step.
        kept: Bytes that are alive between the force and the backward pass, without parameters and batch.
    """

    sizes: BatchSizes
    speeds: Speeds
    seconds: tuple[float, ...]
    kept: int


def checked_prediction(steps: int = 3) -> str:
    """Predicts steps of small MatRIS-MoEs from speeds measured on this CPU, trains them, and compares both.

    One process with one thread trains with the strategy, in float32. Times are the process's own, so that other
    programs change them less.

    Args:
        steps: Training steps that are timed, after two that warm up and before one whose bytes are counted.
    """
    lines = [
        "| blocks | features | experts | top-k | width | atoms | edges | angles | of products in a second | "
        "B in a second | by index in a second | s for each operation | predicted, s | measured, s | ratio | "
        "predicted, MB kept | measured, MB kept | ratio |",
        "|---" * 18 + "|",
    ]
    ratios = []
    for small in _POTENTIALS:
        with RankPool(1) as pool:
            (found,) = pool.run(trained_steps, small, steps, timeout=1800)
        seconds, kept = predicted_step(small, found.sizes, found.speeds)
        measured = statistics.median(found.seconds)
        print(f"measured: {found}", flush=True)
        ratios.append((seconds / measured, kept / found.kept))
        sizes, speeds = found.sizes, found.speeds
        shape = (small.num_blocks, small.num_features, small.num_experts, small.top_k, small.expert_features)
        counted = (*shape, sizes.atoms, sizes.edges, sizes.angles)
        words = [str(n) for n in counted]
        words += [f"{x:.2g}" for x in (speeds.products, speeds.bandwidth, speeds.indexed, speeds.launch)]
        words += [f"{seconds:.3f}", f"{measured:.3f}", f"{ratios[-1][0]:.2f}"]
        words += [f"{kept / 1e6:.1f}", f"{found.kept / 1e6:.1f}", f"{ratios[-1][1]:.3f}"]
        lines.append(f"| {' | '.join(words)} |")
    medians = [statistics.median(column) for column in zip(*ratios, strict=True)]
    return "\n".join(
        [*lines, "", f"medians of predicted / measured: {medians[0]:.2f} of time, {medians[1]:.3f} of bytes"]
    )


def predicted_step(small: SmallPotential, sizes: BatchSizes, speeds: Speeds) -> tuple[float, float]:
    """Returns the predicted seconds of a step in one process, and the predicted bytes kept before its backward pass."""
    counts = count_step(sizes, **small.arguments)
    work = counts.rows + counts.matrices + counts.others
    seconds = speeds.seconds(work + counts.optimizer, counts.num_operations + counts.num_updates)
    return sum(seconds), work.kept


def trained_steps(small: SmallPotential, steps: int) -> MeasuredSteps:
    """Measures this process, and trains in it for some steps.

    Args:
        small: The potential and its batch.
        steps: Number of steps that are timed.
    """
    import lightning

    from lightning_januspipe.data import StructureDataset, collate_structures, emt_structures
    from lightning_januspipe.models import MatRISMoE, PotentialModule

    torch.set_num_threads(1)
    torch.manual_seed(0)
    spent, kept, began = list[float](), list[int](), list[float]()

    class Module(PotentialModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx < _WARM_UP + steps:
                return super().training_step(batch, batch_idx)
            with StorageCounter() as counter:
                loss = super().training_step(batch, batch_idx)
                kept.append(counter.alive())
            return loss

    class Clock(lightning.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            began.append(time.process_time())

        def on_train_batch_end(self, *_: Any) -> None:
            spent.append(time.process_time() - began[-1])

    structures = emt_structures(small.num_structures, sizes=(32,), vacancy_probability=0.0, species=_SPECIES, seed=0)
    potential = MatRISMoE.from_size("tiny", **small.arguments)
    dataset = StructureDataset(structures, cutoff=potential.cutoff, dtype=torch.float32, species=_SPECIES)
    batch = collate_structures([dataset[i] for i in range(len(dataset))])
    angles = line_graph_of(potential, batch).edge.shape[0]
    atoms, edges = batch["positions"].shape[0], batch["edge_index"].shape[1]
    num_features, width = small.num_features, small.expert_features
    speeds = measured_speeds(torch.device("cpu"), edges, 3 * num_features, width)
    batches: Any = [batch] * (_WARM_UP + steps + 1)
    loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer_of({}, len(batches), Clock()).fit(Module(potential, stress_weight=1.0), loader)
    return MeasuredSteps(BatchSizes(atoms, edges, angles, len(dataset)), speeds, tuple(spent[_WARM_UP:-1]), kept[0])
