"""The Lightning hooks of data: the training loader yields micro-batches, and batches move to this rank's device."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from typing_extensions import override

from lightning_januspipe.graph import OwnersInLoader
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.replica_balance import balance_replicas
from lightning_januspipe.loader.split import require_samples, seed_workers, split_batches
from lightning_januspipe.strategy.base import StrategyState


class LoaderHooks(StrategyState):
    """Prepares loaders and moves their batches."""

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        """Returns a loader that splits training batches into micro-batches, with workers seeded by replica."""
        seed_workers(dataloader, self.lib.seed.pl_worker_init_function, self.replica_index)
        if not self._trainer.training:
            self._eval_loader = dataloader
            return dataloader
        require_samples(dataloader)
        required = self.options.num_microbatches != "auto"
        split = split_batches(dataloader, self.num_microbatches(), required, self._owners_ahead())
        self._train_loader = self._progress.tracked(split)
        if self.mesh_shape.data > 1 and self.options.balance != "microbatches":
            self._balance_replicas(self._train_loader, may_change=self._train_loader is not dataloader)
        return self._train_loader

    def _owners_ahead(self) -> OwnersInLoader | None:
        """Returns what chooses the owners of atoms in the loader's workers, if atoms are sharded over graph ranks."""
        mesh = self._mesh
        if mesh.shape.graph == 1:
            return None
        return OwnersInLoader(mesh.shape.graph, mesh.replica_rank, len(mesh.replica_ranks))

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
