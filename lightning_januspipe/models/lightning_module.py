"""Defines the LightningModule that trains a conservative potential on energies, forces and stresses."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.models.data_checks import check_data, check_labels, describe_unused_labels
from lightning_januspipe.models.initial_weights import (
    as_buffer,
    describe_frozen,
    freeze,
    load_weights,
    read_checkpoint,
    weights_only_option,
)
from lightning_januspipe.models.losses import MaskedError, MaskedLoss, masked_loss
from lightning_januspipe.models.monitored import check_monitors
from lightning_januspipe.models.saved_arguments import compare_arguments, rebuild_potential, save_arguments

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule
else:
    try:
        from lightning.pytorch import LightningModule
    except ModuleNotFoundError:
        from pytorch_lightning import LightningModule

Batch = dict[str, Tensor]


class PotentialModule(LightningModule):
    """Trains, validates and tests a potential, and predicts with it.

    It logs ``{train,val,test}_loss`` and, for each of ``energy`` (eV/atom), ``forces`` (eV/Å) and ``stress`` (eV/Å³),
    ``…_mae`` and ``…_rmse``. Losses and metrics leave out labels that are NaN. Batches with ``weight`` (B,) have losses
    in which the squared errors of each structure have its weight; metrics have none.

    Args:
        potential: A module that maps a batch (see :mod:`lightning_januspipe.keys`) to a dict with ``energy`` (B,) in
            eV, ``forces`` (N, 3) in eV/Å and ``stress`` (B, 3, 3) in eV/Å³.
        energy_weight: Weight of the loss of energies per atom.
        force_weight: Weight of the loss of force components.
        stress_weight: Weight of the loss of stress components; with 0 batches need no stress labels.
        loss: ``"mse"`` for the mean squared error, ``"huber"`` for the Huber loss.
        huber_delta: Error at which the Huber loss turns linear, in the unit of each quantity.
        optimizer: ``"adam"`` or ``"adamw"``.
        learning_rate: Initial learning rate.
        weight_decay: Weight decay of the optimizer.
        lr_scheduler: ``"plateau"`` lowers the rate on a plateau of ``monitor``, ``"cosine"`` lowers it to zero over the
            fit, None keeps it.
        monitor: Logged value that the plateau scheduler watches.
        plateau_factor: Factor on the rate at a plateau.
        plateau_patience: Epochs without improvement before the rate is lowered.
        initial_weights: Checkpoint of an earlier run to start from, a file or a folder of torch.distributed.checkpoint.
            Only its weights are loaded, when a Trainer first sets the module up; a checkpoint that the Trainer itself
            resumes from replaces them.
        frozen: Parameters that are not trained, as dotted parts of their names: ``"embedding"``, ``"layers.0"``,
            ``"layers.[0-2]"``.

    Raises:
        ValueError: A name is unknown, a weight is negative, all weights are zero, or ``frozen`` matches nothing.
            In ``setup``: the initial weights belong to another model, or the data has other species indices than the
            potential.

    Example:
        >>> from lightning_januspipe.models import EquivariantPotential
        >>> potential = EquivariantPotential(species=["Cu"], cutoff=5.0, num_layers=2, num_features=8)
        >>> module = PotentialModule(potential, force_weight=10.0, lr_scheduler="plateau")

    In a recipe::

        model:
          class_path: lightning_januspipe.models.PotentialModule
          init_args: {learning_rate: 0.005, force_weight: 10.0, stress_weight: 100.0, lr_scheduler: plateau}
    """

    def __init__(
        self,
        potential: nn.Module,
        *,
        energy_weight: float = 1.0,
        force_weight: float = 1.0,
        stress_weight: float = 0.0,
        loss: Literal["mse", "huber"] = "mse",
        huber_delta: float = 0.01,
        optimizer: Literal["adam", "adamw"] = "adam",
        learning_rate: float = 5e-3,
        weight_decay: float = 0.0,
        lr_scheduler: Literal["plateau", "cosine"] | None = None,
        monitor: str = "val_loss",
        plateau_factor: float = 0.5,
        plateau_patience: int = 25,
        initial_weights: str | None = None,
        frozen: Sequence[str] = (),
    ) -> None:
        super().__init__()
        for name, value, choices in (
            ("loss", loss, ("mse", "huber")),
            ("optimizer", optimizer, ("adam", "adamw")),
            ("lr_scheduler", lr_scheduler, ("plateau", "cosine", None)),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}; expected one of {choices}")
        weights = {keys.ENERGY: energy_weight, keys.FORCES: force_weight, keys.STRESS: stress_weight}
        if min(weights.values()) < 0 or not any(weights.values()):
            raise ValueError(f"loss weights {weights}; expected none to be negative and at least one to be positive")
        self.save_hyperparameters(ignore=["potential", "initial_weights"])
        self.potential = potential
        freeze(potential, frozen)
        self._initial_weights = initial_weights
        self._checked: set[int] = set()
        self.weights = weights
        self.huber_delta = huber_delta if loss == "huber" else None
        used = {name: weight for name, weight in weights.items() if weight}
        self.losses = nn.ModuleDict({stage: MaskedLoss(used, self.huber_delta) for stage in ("val", "test")})
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{quantity}_{name}": MaskedError(squared=name == "rmse")
                for stage in ("train", "val", "test")
                for quantity in weights
                for name in ("mae", "rmse")
            }
        )

    @property
    def initial_weights(self) -> str | None:
        """Returns the checkpoint whose weights are still to be loaded; None if there is none."""
        return self._initial_weights

    @override
    def forward(self, batch: Batch) -> Batch:
        """Predicts energy (B,) in eV, forces (N, 3) in eV/Å and stress (B, 3, 3) in eV/Å³."""
        if keys.WEIGHT in batch:  # of the loss, and no input of the potential
            batch = {name: value for name, value in batch.items() if name != keys.WEIGHT}
        return self.potential(batch)

    def loss(self, prediction: Batch, batch: Batch) -> Tensor:
        """Returns the weighted sum of the losses of energies per atom, forces and stresses.

        Raises:
            ValueError: A label with a positive weight is missing from the batch.
        """
        pairs = self._pairs(prediction, batch)
        if missing := [name for name, weight in self.weights.items() if weight and name not in pairs]:
            raise ValueError(
                f"the batch has no label {missing}, only {sorted(batch)}; add it (NaN where a structure has none), "
                "or give its loss the weight 0"
            )
        factors = _factors(batch)
        losses = [
            weight * masked_loss(*pairs[name], self.huber_delta, factors.get(name))
            for name, weight in self.weights.items()
            if weight
        ]
        return torch.stack(losses).sum()

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the loss of one batch."""
        return self._evaluate(batch, "train")[0]

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Logs the loss and errors of one validation batch."""
        with gradients_enabled(batch) as batch:
            self._evaluate(batch, "val")

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Logs the loss and errors of one test batch, and return its predictions as :meth:`predict_step` does."""
        batch, index = _without_index(batch)
        with gradients_enabled(batch) as batch:
            return self._detached(self._evaluate(batch, "test")[1], index)

    @override
    def predict_step(self, batch: Batch, batch_idx: int) -> Batch:
        """Returns the detached predictions of one batch, with its ``sample_index`` where it has one."""
        batch, index = _without_index(batch)
        with gradients_enabled(batch) as batch:
            return self._detached(self(batch), index)

    @override
    def setup(self, stage: str) -> None:
        """Loads the initial weights once, says so, and compares the data with the potential and the loss.

        Raises:
            ValueError: The initial weights are of another model, the data has other species or a smaller cutoff, no
                training structure has a label that the loss needs, or a callback monitors a value that is never logged.
        """
        trainer: Any = self.trainer
        data = trainer.datamodule
        check_data(self.potential, data)
        if stage == "fit" and callable(getattr(data, "dataset", None)):
            self._check_dataset(data.dataset("train"), "training")
        if stage == "fit" and type(self) is PotentialModule:
            scheduler = [("lr_scheduler", self.hparams["monitor"])] if self.hparams["lr_scheduler"] == "plateau" else []
            check_monitors(trainer.callbacks, self.logged_names(), scheduler)
        if self._initial_weights is not None:
            self._warn(load_weights(self, self.potential, self._initial_weights))
            rank_zero_info(f"weights of {self._initial_weights} loaded")
            self._initial_weights = None
        if stage == "fit" and self.hparams["frozen"]:
            rank_zero_info(describe_frozen(self.potential, self.hparams["frozen"]))

    def logged_names(self) -> list[str]:
        """Returns the names of the values that a fit logs, which callbacks can monitor."""
        errors = [name for name in self.metrics if not name.startswith("test_")]
        return ["train_loss", "val_loss", *errors]

    @override
    def on_train_start(self) -> None:
        """Compares the training data with the potential and the loss."""
        self._check_loaders(self.trainer.train_dataloader, "training")

    @override
    def on_validation_start(self) -> None:
        """Compares the validation data with the potential and the loss."""
        self._check_loaders(self.trainer.val_dataloaders, "validation")

    @override
    def on_test_start(self) -> None:
        """Compares the test data with the potential and the loss."""
        self._check_loaders(self.trainer.test_dataloaders, "test")

    @override
    def on_predict_start(self) -> None:
        """Compares the prediction data with the potential."""
        self._check_loaders(self.trainer.predict_dataloaders, "prediction")

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the class and the arguments of the potential, without which its weights have no meaning."""
        save_arguments(self.potential, checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses the checkpoint of another potential; its weights go before the initial weights.

        Raises:
            ValueError: The potential in the checkpoint has other arguments.
        """
        path = getattr(self._trainer, "ckpt_path", None) or "the checkpoint"
        self._warn(compare_arguments(self.potential, checkpoint, str(path)))
        self._initial_weights = None

    @override
    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "PotentialModule":
        """Builds the module that a checkpoint was saved from, with its weights, in evaluation mode.

        Args:
            checkpoint_path: File written by a Trainer, or folder of torch.distributed.checkpoint.
            args: Further arguments of ``LightningModule.load_from_checkpoint``.
            kwargs: Further arguments, of which ``weights_only`` is True unless it is given, so that no code of the
                file runs; and those of the module that are to differ. A ``potential`` is needed only if it
                is not one of :mod:`lightning_januspipe.models`, and if its class or arguments are not in the file, as
                in files of version 0.1.

        Raises:
            FileNotFoundError: There is no checkpoint.
            ValueError: The potential is of another package, or the given one has other arguments.
        """
        weights_only = kwargs.pop("weights_only", True)
        if isinstance(checkpoint_path, (str, Path)):
            checkpoint = read_checkpoint(checkpoint_path, weights_only)
            if "potential" not in kwargs:
                kwargs["potential"] = rebuild_potential(checkpoint, str(checkpoint_path))
            checkpoint_path = as_buffer(checkpoint)
        kwargs.update(weights_only_option(super().load_from_checkpoint, weights_only))
        return super().load_from_checkpoint(checkpoint_path, *args, **kwargs).eval()

    def _check_loaders(self, loaders: Any, what: str) -> None:
        for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            self._check_dataset(getattr(loader, "dataset", None), what)

    def _check_dataset(self, dataset: Any, what: str) -> None:
        if id(dataset) in self._checked:
            return
        self._checked.add(id(dataset))
        check_data(self.potential, dataset)
        if what != "prediction":
            self._warn(check_labels(self.weights, dataset, what, required=what == "training"))
        for line in describe_unused_labels(self.weights, dataset) if what == "training" else ():
            rank_zero_info(line)

    def _warn(self, messages: Sequence[str]) -> None:
        for message in messages if self.global_rank == 0 else ():
            warnings.warn(message, stacklevel=3)

    @override
    def configure_optimizers(self) -> Any:
        """Returns the optimizer of the trained parameters and, if asked for, its learning rate scheduler."""
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[self.hparams["optimizer"]]
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = kind(trained, lr=self.hparams["learning_rate"], weight_decay=self.hparams["weight_decay"])
        if self.hparams["lr_scheduler"] is None:
            return optimizer
        scheduler: Any
        if self.hparams["lr_scheduler"] == "cosine":
            steps = int(self.trainer.estimated_stepping_batches)
            scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, factor=self.hparams["plateau_factor"], patience=self.hparams["plateau_patience"]
        )
        config = {"scheduler": scheduler, "interval": "epoch", "monitor": self.hparams["monitor"]}
        return {"optimizer": optimizer, "lr_scheduler": config}

    def _pairs(self, prediction: Batch, batch: Batch) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns prediction and label of each quantity that the batch has labels for; energies per atom."""
        pairs = {name: (prediction[name], batch[name]) for name in self.weights if name in batch}
        if keys.ENERGY in pairs:
            energy, label = pairs[keys.ENERGY]
            structure = batch[keys.BATCH]
            num_atoms = torch.zeros_like(label).index_add(0, structure, torch.ones_like(structure, dtype=label.dtype))
            num_atoms = num_atoms.clamp(min=1)
            # The difference of large energies is taken with all their digits, and only then rounded.
            is_known = ~label.isnan()
            difference = (energy - torch.where(is_known, label, energy.detach())) / num_atoms
            rounded = difference.to(batch[keys.POSITIONS].dtype)
            pairs[keys.ENERGY] = (rounded, torch.where(is_known, torch.zeros_like(rounded), torch.nan))
        return pairs

    @staticmethod
    def _detached(prediction: Batch, index: Batch) -> Batch:
        return {name: value.detach() for name, value in prediction.items()} | index

    def _evaluate(self, batch: Batch, stage: str) -> tuple[Tensor, Batch]:
        """Returns the loss of a batch and its predictions; logs the loss and the errors under ``stage``."""
        prediction = self(batch)
        loss = self.loss(prediction, batch)
        pairs = self._pairs(prediction, batch)
        num_structures = batch[keys.CELL].shape[0]
        if stage != "train" and type(self).loss is PotentialModule.loss:
            self._log_metric(f"{stage}_loss", self.losses[stage], num_structures, pairs, _factors(batch), prog_bar=True)
        else:
            self.log(
                f"{stage}_loss",
                loss.detach(),
                batch_size=num_structures,
                prog_bar=True,
                on_step=stage == "train",
                on_epoch=stage != "train",
                sync_dist=stage != "train",
            )
        for quantity, pair in pairs.items():
            for name in ("mae", "rmse"):
                key = f"{stage}_{quantity}_{name}"
                self._log_metric(key, self.metrics[key], num_structures, *pair)
        return loss, prediction

    def _log_metric(self, name: str, metric: Any, num_structures: int, *values: Any, prog_bar: bool = False) -> None:
        with torch.no_grad():
            metric.update(*values)
        self.log(name, metric, batch_size=num_structures, prog_bar=prog_bar, on_step=False, on_epoch=True)


def _factors(batch: Batch) -> dict[str, Tensor]:
    """Returns the factors of the errors of each quantity, from the weights of the structures; none without these."""
    if keys.WEIGHT not in batch:
        return {}
    weight = batch[keys.WEIGHT]
    return {keys.ENERGY: weight, keys.FORCES: weight[batch[keys.BATCH]], keys.STRESS: weight}


def _without_index(batch: Batch) -> tuple[Batch, Batch]:
    """Returns a batch without its ``sample_index``, which is no input of a potential, and the index by itself."""
    index = {name: batch[name] for name in batch if name == keys.SAMPLE_INDEX}
    return {name: batch[name] for name in batch if name not in index}, index


@contextmanager
def gradients_enabled(batch: Batch) -> Iterator[Batch]:
    """Enables gradients inside evaluation, where Lightning disables them or enters inference mode.

    Tensors made in inference mode cannot be differentiated, so the batch is cloned.
    """
    with torch.inference_mode(False), torch.enable_grad():
        yield {name: value.clone() if value.is_inference() else value for name, value in batch.items()}
