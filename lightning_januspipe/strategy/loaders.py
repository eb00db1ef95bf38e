"""Implements the hooks of data: the training loader yields micro-batches, and batches move to this rank's device."""

from __future__ import annotations

from collections.abc import Sized
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from lightning_januspipe.graph import OwnersInLoader
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.replica_balance import balance_replicas
from lightning_januspipe.loader.split import batch_size_of, require_samples, seed_workers, split_batches
from lightning_januspipe.strategy.replica_samplers import discard_results, is_repeated, share_samples
from lightning_januspipe.strategy.shared_state import StrategyState

if TYPE_CHECKING:
    from lightning.pytorch import Trainer


class LoaderHooks(StrategyState):
    """Prepares loaders and moves their batches."""

    def _take_over_samplers(self, trainer: Trainer) -> None:
        """Has the strategy share samples among replicas instead of Lightning, except for prediction."""
        connector: Any = trainer._accelerator_connector
        self._shares_samples = self.is_distributed and connector.use_distributed_sampler
        if self._shares_samples and not trainer.predicting:
            connector.use_distributed_sampler = False

    def _hand_back_samplers(self, trainer: Trainer) -> None:
        """Lets Lightning share samples again."""
        connector: Any = trainer._accelerator_connector
        connector.use_distributed_sampler = True

    def _discard_repeated(self) -> None:
        """Discards this replica's results of the present evaluation batch, if another replica has the same samples."""
        trainer = self._trainer
        loaders = trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders
        if isinstance(loaders, (list, tuple)):
            loaders = loaders[trainer._results.dataloader_idx or 0]
        if self._shares_samples and is_repeated(loaders, self.replica_index):
            discard_results(trainer._results)

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        """Returns a loader of this replica's samples, with workers seeded by replica; training batches are split."""
        trainer = self._trainer
        if self._shares_samples and not trainer.predicting:
            dataloader = share_samples(
                dataloader,
                self.lib,
                self.mesh_shape.data,
                self.replica_index,
                trains=trainer.training,
                may_shuffle=not trainer.overfit_batches,
                may_repeat=self._exchanges_with_replicas,
            )
        if self._shares_samples and trainer.predicting:
            self._require_samples_for_all(dataloader)
        seed_workers(dataloader, self.lib.seed.pl_worker_init_function, self.replica_index)
        if not trainer.training:
            self._eval_loader = dataloader
            return dataloader
        require_samples(dataloader)
        required = self.options.num_microbatches != "auto"
        if required:
            self._warn_of_small_batches(batch_size_of(dataloader))
        split = split_batches(dataloader, self.num_microbatches(), required, self._choose_owners())
        self._train_loader = self._progress.tracked(split)
        if self.mesh_shape.data > 1 and self.options.balance != "microbatches":
            self._balance_replicas(self._train_loader, may_change=self._train_loader is not dataloader)
        return self._train_loader

    def _warn_of_small_batches(self, batch_size: int | None) -> None:
        """Warns if batches have fewer structures than the micro-batches that the user asked for."""
        wanted = self.num_microbatches()
        if batch_size is None or batch_size >= wanted:
            return
        has, found = f"{batch_size} structures", f"is split into {batch_size} micro-batches of one"
        if batch_size == 1:
            has, found = "one structure", "is one micro-batch"
        self.lib.rank_zero.rank_zero_warn(f"num_microbatches={wanted}, but a batch has {has}: it {found}")

    def _choose_owners(self) -> OwnersInLoader | None:
        """Returns what chooses the owners of atoms in the loader's workers, if atoms are sharded over graph ranks."""
        mesh = self._mesh
        if mesh.shape.graph == 1:
            return None
        return OwnersInLoader(mesh.shape.graph, mesh.replica_rank, len(mesh.replica_ranks))

    def _require_samples_for_all(self, dataloader: Any) -> None:
        """Refuses prediction of fewer samples than replicas: Lightning leaves out the loop where none is left.

        Raises:
            ValueError: A replica has no sample, so that the others would wait for it.
        """
        dataset, num_replicas = getattr(dataloader, "dataset", None), self.mesh_shape.data
        if isinstance(dataset, Sized) and len(dataset) < num_replicas:
            raise ValueError(
                f"{len(dataset)} samples to predict for {num_replicas} replicas: each replica needs at least one. Use "
                "fewer processes, or a smaller data_size"
            )

    def _balance_replicas(self, loader: Any, may_change: bool) -> None:
        required = self.options.balance == "replicas"
        why = balance_replicas(
            loader,
            self.num_microbatches(),
            self.mesh_shape.data,
            self.replica_index,
            required=required,
            tell=self.broadcast,
            is_teller=self.global_rank == 0,
            may_change=may_change,
        )
        if why is not None and required:
            raise ValueError(
                f"balance='replicas', but the training loader cannot share its samples among replicas: {why}. Use "
                "balance='auto', which then balances inside each replica."
            )

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Moves a batch, or each of its micro-batches, with the module's own hooks."""
        move = super().batch_to_device
        if isinstance(batch, MicroBatches):
            return replace(batch, batches=[move(b, device, dataloader_idx) for b in batch])
        return move(batch, device, dataloader_idx)

    def _give_batches_to_transfer_hooks(self) -> None:
        """Lets the user's batch transfer hooks get batches, not the container of micro-batches."""
        transfer = self._module._on_before_batch_transfer
        self._module.__dict__["_on_before_batch_transfer"] = lambda batch, dataloader_idx=0: (
            replace(batch, batches=[transfer(b, dataloader_idx) for b in batch])
            if isinstance(batch, MicroBatches)
            else transfer(batch, dataloader_idx)
        )
