"""Changes the weights of the loss at given epochs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from lightning_januspipe.callbacks.lightning_classes import Callback, LightningModule, Trainer


class LossWeightSchedule(Callback):
    """Gives the training loss other weights from given epochs on, such as more weight on energies at the end.

    It sets the weights of a :class:`~lightning_januspipe.models.PotentialModule`. A resumed run has the weights of its
    epoch. The validation loss keeps the weights that the module was made with, so that all of its epochs compare, and
    schedulers and checkpoints that watch it are not misled.

    Args:
        schedule: For each epoch at which weights change, the new weights by quantity: ``energy``, ``forces``,
            ``stress``. Quantities that are not named keep their weight. Epochs are counted from 0.

    Raises:
        ValueError: An epoch or a weight is negative. At the start of ``fit``: the module has no such weights.

    .. code-block:: yaml

        trainer:
          callbacks+:
            - class_path: lightning_januspipe.callbacks.LossWeightSchedule
              init_args:
                schedule: {80: {energy: 100.0, forces: 1.0}}
    """

    def __init__(self, schedule: dict[int, dict[str, float]]) -> None:
        super().__init__()
        self.schedule = {int(epoch): dict(weights) for epoch, weights in schedule.items()}
        weights = [weight for one in self.schedule.values() for weight in one.values()]
        if not schedule or min([*self.schedule, *weights]) < 0:
            raise ValueError(f"schedule={schedule}; expected weights by epoch, and no epoch or weight below 0")
        self.schedule = dict(sorted(self.schedule.items()))
        self._initial: dict[str, float] = {}

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compares the names with those of the module."""
        weights = _weights_of(pl_module)
        unknown = {name for one in self.schedule.values() for name in one} - set(weights)
        if unknown:
            raise ValueError(f"schedule names {sorted(unknown)}; the loss of the module has weights of {list(weights)}")
        self._initial = dict(weights)
        for epoch in self.schedule:
            if not any(self._at(epoch).values()):
                raise ValueError(f"with schedule={self.schedule} all weights are zero from epoch {epoch} on")

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sets the weights of the epoch."""
        _weights_of(pl_module).update(self._at(trainer.current_epoch))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the module its own weights back."""
        _weights_of(pl_module).update(self._initial)

    def _at(self, epoch: int) -> dict[str, float]:
        """Returns the weights of an epoch."""
        found = dict(self._initial)
        for start, weights in self.schedule.items():
            if start <= epoch:
                found.update(weights)
        return found


def _weights_of(module: Any) -> dict[str, float]:
    weights = getattr(module, "weights", None)
    if not isinstance(weights, Mapping):
        raise ValueError(
            f"{type(module).__name__} has no mapping 'weights' of its loss, as PotentialModule has; LossWeightSchedule "
            "cannot change them"
        )
    assert isinstance(weights, dict)
    return weights
