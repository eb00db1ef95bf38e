"""Implements the hooks of checkpoints, which the Trainer calls to save, load and remove them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.checkpoint import atomic, sharded
from lightning_januspipe.checkpoint.averages import followers
from lightning_januspipe.checkpoint.io import atomic_checkpoint_io, copy_from_file
from lightning_januspipe.checkpoint.parts import Part, shapes
from lightning_januspipe.distributed import on_every_rank, on_first_rank, portable, waiting
from lightning_januspipe.errors import PipelineError, RankLostError
from lightning_januspipe.loader.resume import KEY, reopen_epoch
from lightning_januspipe.runtime.stage_optimizer import StageOptimizer, indexed_state, named_state_dict
from lightning_januspipe.strategy.contexts import is_fitting
from lightning_januspipe.strategy.initial_value_hooks import InitialValueHooks

_T = TypeVar("_T")


class CheckpointHooks(InitialValueHooks):
    """Saves and loads checkpoints; every rank takes part in saving."""

    @property
    @override
    def checkpoint_io(self) -> Any:
        """Returns the user's plugin for files, by default one that writes a file as a whole or not at all."""
        if self._checkpoint_io is None:
            self._checkpoint_io = atomic_checkpoint_io(self.lib)
        elif isinstance(self._checkpoint_io, self.lib.wrapper._WrappingCheckpointIO):
            self._checkpoint_io.checkpoint_io = atomic_checkpoint_io(self.lib)
        return self._checkpoint_io

    @checkpoint_io.setter
    def checkpoint_io(self, io: Any) -> None:
        self._checkpoint_io = io

    # -- saving ------------------------------------------------------------------------------------------------------

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the module's state: all of it on global rank 0, or for a folder the values that this rank owns."""
        module, runner = self._module, self.runner
        self._require_all_ranks()
        if runner is None:  # after training everything is whole, in memory or in the file of global rank 0
            return {n: self._value_in_file(v) for n, v in module.state_dict(keep_vars=True).items()}
        self._had_own_experts = runner.parameters.make_experts_whole()
        if self.options.save_distributed_checkpoint and self._has_own_tensors():
            if self._hooks_add_to_checkpoints():  # they may read parameters of this rank's stages
                runner.parameters.make_whole()
            runner.parameters.synchronize(self._trainer.callbacks, averages_only=True)
            return runner.parameters.in_parts(module.state_dict(keep_vars=True))
        runner.parameters.make_whole()
        if self._residence is not None and self._residence.is_partial:
            with self._residence.whole_on_first_rank():
                return self._state_to_keep()
        runner.parameters.synchronize(self._trainer.callbacks)
        return self._state_to_keep()

    def _hooks_add_to_checkpoints(self) -> bool:
        """Returns whether the module or a callback has a hook that the Trainer calls while a checkpoint is made."""
        is_overridden, callback = self.lib.helpers.is_overridden, self.lib.callbacks.Callback
        return is_overridden("on_save_checkpoint", self._module) or any(
            is_overridden("on_save_checkpoint", one, parent=callback) for one in self._trainer.callbacks
        )

    def _state_to_keep(self) -> dict[str, Any]:
        """Returns the module's state, which stays valid when parameters are released."""
        assert self.runner is not None
        state: dict[str, Any] = self._module.state_dict()
        if self.is_global_zero:
            shares = self.runner.parameters.shares_memory
            state.update({k: v.clone() for k, v in state.items() if isinstance(v, Tensor) and shares(v)})
        return state

    @override
    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Returns an optimizer's state as plain Lightning saves it, or for a folder this rank's part by names."""
        optimizer = getattr(optimizer, "_optimizer", optimizer)
        stage, waiting = self._stage_optimizers.get(id(optimizer)), self._unloaded.get(id(optimizer))
        if stage is not None and self.options.save_distributed_checkpoint:
            return stage.own_state_dict()
        if stage is not None:
            return stage.full_state_dict(self._mesh)
        if waiting is not None:
            return waiting
        if self.options.save_distributed_checkpoint:
            return named_state_dict(optimizer, _names(self._module))
        return super().optimizer_state(optimizer)

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        """Writes a file or a folder, which appears under its name when all ranks have written their parts."""
        if is_fitting(self._trainer) and "optimizer_states" in checkpoint:
            checkpoint[KEY] = {"replicas": self._replica_progress()}
        try:
            self._write(checkpoint, filepath, storage_options)
        finally:
            if self._had_own_experts and self.runner is not None:
                self.runner.parameters.keep_own_experts()  # hooks may save between the backward pass and the step
            self._had_own_experts = False

    def _write(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None) -> None:
        if self.options.save_distributed_checkpoint:
            if storage_options is not None:
                raise TypeError(
                    f"storage_options={storage_options!r} with save_distributed_checkpoint=True: folders are written "
                    "by torch.distributed.checkpoint, which takes no such options; leave them out"
                )
            self._save_folder(checkpoint, self.broadcast(str(filepath)))
        else:
            io, given = self.checkpoint_io, {} if storage_options is None else {"storage_options": storage_options}
            self._on_first_rank(lambda: io.save_checkpoint(checkpoint, filepath, **given))

    def _save_folder(self, checkpoint: dict[str, Any], filepath: str) -> None:
        if not self.lib.cloud_io._is_local_file_protocol(filepath):
            raise ValueError(
                f"{filepath}: with save_distributed_checkpoint=True every rank writes files of its own, which needs a "
                "local path to a folder that all machines share. Save to such a folder, or to a single file."
            )
        path, mesh = Path(filepath).absolute(), self._mesh
        owners = self._owners()
        is_writer = mesh.data_rank == mesh.graph_rank == 0
        every_rank_writes = any(stage.has_parts for stage in self._stage_optimizers.values())

        def make() -> Path:
            part = atomic.prepare(path)
            with atomic.telling(f"{path} could not be saved"):
                part.mkdir()
            return part

        def writes(key: str, value: Any) -> bool:
            if isinstance(value, Part) or (key.startswith("optimizer_") and ".state." in key):
                return True  # this rank lists only the states that it owns
            rank = owners.get(_storage(value), 0) if isinstance(value, Tensor) else 0
            return is_writer and rank == mesh.pipeline_rank and not (isinstance(value, Tensor) and value.is_meta)

        part = self._on_first_rank(make)
        shards, rest = sharded.split_entries(checkpoint, lambda t: _storage(t) in owners)
        written: dict[str, Any] = {}
        error: Exception | None = None
        try:
            if is_writer or every_rank_writes:
                group = mesh.host_group if every_rank_writes else mesh.control_group
                with (
                    atomic.telling(f"{path} could not be saved"),
                    waiting(f"writing of {path}", group, mixed=True),
                ):
                    written = sharded.write_shards(part, shards, writes, group)
        except RankLostError:
            if self.is_global_zero:
                atomic.discard(part)
            raise
        except Exception as caught:  # raised on every rank
            error = caught
        of_ranks = self._gathered_on_first_rank((written, error and portable(error), shapes(shards)))

        def finish() -> None:
            with atomic.committing(part, path):
                for _, failure, _ in of_ranks:
                    if failure is not None:
                        raise failure
                names = {n: c for found, _, _ in of_ranks for n, c in found.items()}
                sharded.finish_folder(part, rest, names, [shape for _, _, found in of_ranks for shape in found])

        self._on_first_rank(finish)

    def _has_own_tensors(self) -> bool:
        """Returns whether the module's state holds its parameters themselves: a custom ``state_dict`` may hold copies.

        Parameters that are in shards have to be there the first time.
        """
        if self._is_own_state is None:
            assert self.runner is not None
            self._is_own_state = _is_state_of(self._module, self._module.state_dict())
        return self._is_own_state

    def _owners(self) -> dict[Any, int]:
        """Returns the pipeline rank that owns each tensor that only some ranks train, by its storage."""
        runner = self.runner
        if runner is None or not self._has_own_tensors():
            return {}
        parameters = runner.parameters
        owned = {_storage(p): parameters.owner(p) for p in parameters.partly_held()}
        return owned | {_storage(t): parameters.owner(p) for p, t in parameters.averages(self._trainer.callbacks)}

    def _replica_progress(self) -> list[Any]:
        """Returns, on global rank 0, the random states and the loader progress of each replica's first rank."""
        mesh = self._mesh
        mine = self._progress.state() if mesh.pipeline_rank == mesh.graph_rank == 0 else None
        return [state for state in self._gathered_on_first_rank(mine) if state is not None]

    def _gathered_on_first_rank(self, mine: _T) -> list[_T]:
        """Returns an object of every rank on global rank 0, and nothing on the others."""
        mesh = self._mesh
        if mesh.host_group is None:
            return [mine]
        found: list[Any] | None = [None] * mesh.shape.size if mesh.rank == 0 else None
        with waiting("gathering of the parts of a checkpoint", mesh.host_group):
            dist.gather_object(mine, found, 0, group=mesh.host_group)
        return found or []

    def _gathered(self, mine: Any) -> list[Any]:
        """Returns an object of every rank, on every rank."""
        if self.mesh is None or self.mesh.host_group is None:
            return [mine]
        found: list[Any] = [None] * self.mesh.shape.size
        with waiting("reading of a checkpoint", self.mesh.host_group):
            dist.all_gather_object(found, mine, group=self.mesh.host_group)
        return found

    def _on_first_rank(self, write: Callable[[], _T]) -> _T:
        """Writes on global rank 0; its error is raised on every rank."""
        return on_first_rank(write, self.global_rank, self.broadcast)

    def _require_all_ranks(self) -> None:
        """Raises an error if some ranks will not take part in gathering.

        Raises:
            PipelineError: A rank is missing.
        """
        is_alone = self.mesh is not None and self.mesh.aborted
        if not is_alone and self._trainer.interrupted and self._shutdown is not None:
            is_alone = not self._shutdown.are_together()
        if is_alone:
            raise PipelineError(
                "no checkpoint can be gathered after an exception on some ranks only: the others do not take part. "
                "Resume from the last checkpoint that was saved in training."
            )

    @override
    def remove_checkpoint(self, filepath: str | Path) -> None:
        """Deletes a file, a link or a folder."""
        if not self.is_global_zero:
            return
        path = Path(filepath)
        if path.is_symlink() or path.is_dir():
            atomic.remove(path)
        else:
            self.checkpoint_io.remove_checkpoint(filepath)

    # -- loading -----------------------------------------------------------------------------------------------------

    @override
    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads a file or a folder, whichever is there; see :func:`.map_checkpoint` for what a file is read into."""
        torch.cuda.empty_cache()
        path = Path(checkpoint_path)
        self._on_first_rank(lambda: atomic.recover(path))

        def read() -> dict[str, Any]:
            if path.is_dir():
                return sharded.read_folder(path, weights_only)
            given = {} if weights_only is None else {"weights_only": weights_only}
            found: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, **given)
            return found

        checkpoint = on_every_rank(read, self._gathered)
        if is_fitting(self._trainer):
            self._progress.resume(checkpoint, self.replica_index)
            reopen_epoch(checkpoint)
        return checkpoint

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads the states of whole optimizers; each rank takes its part once the stages are known."""
        names = _names(self._module)
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            stage = self._stage_optimizers.get(id(optimizer))
            if stage is not None:
                stage.load(saved)
                continue
            state = indexed_state(saved, optimizer, names)
            if self.mesh_shape.pipeline > 1 or self._residence is not None:
                self._unloaded[id(optimizer)] = state
                state = {"state": {}, "param_groups": state["param_groups"]}
            states.append(state)
        if states:
            super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
            copy_from_file([optimizer.state for optimizer in self.optimizers])

    def _prune_optimizers(self) -> None:
        """Keeps only this rank's part of all optimizers, and of the states that were loaded for them."""
        assert self.runner is not None
        names, mesh = _names(self._module), None
        level = self._shard_level
        if level != "none":
            mesh = self._mesh
        for optimizer in self.optimizers:
            state = self._unloaded.pop(id(optimizer), {}).get("state")
            stage = StageOptimizer(optimizer, self.runner.parameters, names, state, mesh, level)
            self._stage_optimizers[id(optimizer)] = stage
        if level != "none":
            self.lib.rank_zero.rank_zero_info(
                f"januspipe: {self.runner.parameters.describe_shards(level, self._stage_link)}"
            )
        self._is_own_state = None
        if level == "parameters":
            self._has_own_tensors()
        self.runner.share_state(level)
        if level == "parameters":
            self._keep_followed()

    def _keep_followed(self) -> None:
        """Keeps parameters whole between steps if any rank keeps averages of them, which read them then."""
        assert self.runner is not None
        module, every = self._module, self.runner.parameters.shards
        released = {p for shards in every for unit in shards.units if unit.releases for p in unit.parameters}
        # An average may be a submodule, with parameters that are in shards too: one child has those that it follows.
        largest = max(module.children(), key=lambda child: sum(p.numel() for p in child.parameters()), default=module)
        parts = [released & set(part.parameters()) for part in (module, largest)]
        if any(self._gathered(any(followers(module, self._trainer.callbacks, part) for part in parts))):
            self.lib.rank_zero.rank_zero_info(
                "januspipe: parameters are whole between steps, because averages of them are kept"
            )
            for shards in every:
                shards.keeps_whole = True

    def _free_other_stages(self) -> None:
        """Frees the parameters of other stages, if the module is made in ``configure_model``."""
        assert self.runner is not None
        module = self._module
        if self._residence is None:
            return
        if followers(module, self._trainer.callbacks, self.runner.parameters.partly_held()):
            if self._residence.absent:
                raise ValueError(
                    f"averages of the weights of {type(module).__name__} need all parameters on every rank, but it was "
                    "made on the meta device, so that a rank has those of its own stages only. Leave averages out, or "
                    "make the module in host memory."
                )
            self.lib.rank_zero.rank_zero_info(
                "januspipe: every rank keeps all parameters, because averages of them are kept"
            )
            return
        self._residence.release(self.runner.parameters)


def _names(module: nn.Module) -> dict[nn.Parameter, str]:
    return {p: n for n, p in module.named_parameters()}


def _storage(tensor: Tensor) -> Any:
    """Returns equal keys for two views of the same values; tensors without values have their shape as key."""
    if tensor.is_meta or not tensor.numel():
        return ("meta", tuple(tensor.shape))
    return (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tuple(tensor.shape), tensor.stride())


def _is_state_of(module: nn.Module, state: Mapping[str, Any]) -> bool:
    return all(n in state and _storage(state[n]) == _storage(p) for n, p in module.named_parameters())
