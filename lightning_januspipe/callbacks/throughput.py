"""Counts atoms and structures, and logs how many are trained on per second."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.callbacks.lightning_classes import Callback, LightningModule, Trainer
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.sample_fields import POSITIONS, STRUCTURE_INDICES, find_field, named_tensors


class Metered(Callback):
    """Measures the seconds, atoms and structures of training batches over a moving window.

    The time of validations does not count, and neither does the first batch of a run, which may include compilation or
    the capture of a potential.

    Args:
        window: Number of batches in the window.
    """

    def __init__(self, window: int) -> None:
        super().__init__()
        self._batches: deque[tuple[float, int, int]] = deque(maxlen=window)
        self._last_end: float | None = None
        self._is_first = True

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets the measurements of an earlier run."""
        self._batches.clear()
        self._is_first = True

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts a new interval."""
        self._last_end = None

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the time of the validation out."""
        self._last_end = None

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Starts a new interval if there is none."""
        if self._last_end is None and not self._is_first:
            self._last_end = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts this batch."""
        now = time.perf_counter()
        if self._last_end is not None:
            self._batches.append((now - self._last_end, count_atoms(batch), count_structures(batch)))
        self._last_end = now
        self._is_first = False

    def measured(self) -> tuple[float, int, int]:
        """Returns the seconds, atoms and structures of this rank's batches in the window."""
        seconds = sum(interval for interval, _, _ in self._batches)
        return seconds, sum(atoms for _, atoms, _ in self._batches), sum(found for _, _, found in self._batches)


class Throughput(Metered):
    """Logs ``atoms_per_s`` and ``structures_per_s`` of training, over all replicas.

    The values are means over a moving window of batches. The time of validations does not count, and neither does the
    first batch of a run, which may include compilation or the capture of a potential.

    Args:
        window: Number of batches in the window.

    Raises:
        ValueError: ``window`` is below 1.

    .. code-block:: yaml

        trainer:
          callbacks:
            - class_path: lightning_januspipe.callbacks.Throughput
              init_args: {window: 20}
    """

    def __init__(self, window: int = 20) -> None:
        if window < 1:
            raise ValueError(f"window={window}; expected a number of batches, at least 1")
        super().__init__(window)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the throughput up to this batch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        seconds, atoms, structures = self.measured()
        if seconds <= 0:
            return
        # Under JanusPipe the Trainer's world size is the number of replicas.
        for name, total in (("atoms_per_s", atoms), ("structures_per_s", structures)):
            rate = trainer.world_size * total / seconds
            pl_module.log(name, rate, prog_bar=name == "atoms_per_s", on_step=True, on_epoch=False, batch_size=1)


def count_atoms(batch: Any) -> int:
    """Returns N of a batch, summed over its micro-batches; 0 where no positions are found."""
    if isinstance(batch, MicroBatches):
        return sum(count_atoms(part) for part in batch.batches)
    positions = find_field(named_tensors(batch), POSITIONS, dim=2)
    return 0 if positions is None else len(positions)


def count_structures(batch: Any) -> int:
    """Returns B of a batch, summed over its micro-batches; 1 where nothing tells."""
    if isinstance(batch, MicroBatches):
        return sum(batch.num_samples)
    num_graphs = getattr(batch, "num_graphs", None)  # PyG batches
    if num_graphs is not None:
        return int(num_graphs)
    fields = list(named_tensors(batch))
    of_structures = find_field(fields, [keys.CELL], dim=3)
    if of_structures is None:
        of_structures = find_field(fields, [keys.ENERGY], dim=1)
    if of_structures is not None:
        return len(of_structures)
    indices = find_field(fields, STRUCTURE_INDICES, dim=1)
    return 1 if indices is None or not len(indices) else int(indices.max()) + 1
