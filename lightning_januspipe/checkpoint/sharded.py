"""Checkpoints as folders of ``torch.distributed.checkpoint``: each rank writes its own tensors, nothing is gathered.

A folder holds shards and ``meta.pt``, like the folders of Lightning's FSDP strategy. The shards hold

- ``model``: the entry ``state_dict`` of a Lightning checkpoint, by the module's own keys;
- ``optimizer_0`` and so on: the entries of ``optimizer_states``, with parameter names for indices;
- averages of weights, which belong to single stages as the weights do.

``meta.pt`` holds all other entries: loops, callbacks, schedulers, hyper-parameters, random states.
"""

from __future__ import annotations

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner, _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import override

from lightning_januspipe.checkpoint import atomic
from lightning_januspipe.checkpoint.index import INDEX, read_index
from lightning_januspipe.checkpoint.integrity import CHECKSUMS, Checksum, checksum, verify_folder, write_checksums
from lightning_januspipe.checkpoint.parts import Part, restore_shapes

META = "meta.pt"
_AVERAGES = "januspipe_averages"
_SHAPES = "januspipe_shapes"


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder that holds a checkpoint."""
    return (path / META).is_file() and (path / INDEX).is_file()


def split_entries(
    checkpoint: dict[str, Any], is_sharded: Callable[[Tensor], bool]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the entries of a Lightning checkpoint that go into shards, and those that go into ``meta.pt``.

    Args:
        checkpoint: The checkpoint as Lightning makes it.
        is_sharded: Whether a tensor beside module and optimizers belongs to single stages; every rank has to agree.
    """
    rest = dict(checkpoint)
    shards = {"model": rest.pop("state_dict")}
    shards.update({f"optimizer_{i}": s for i, s in enumerate(rest.pop("optimizer_states", []))})
    averages: list[tuple[tuple[Any, ...], Tensor]] = []
    for key in list(rest):
        if isinstance(rest[key], dict) and rest[key] and all(isinstance(v, Tensor) for v in rest[key].values()):
            if any(map(is_sharded, rest[key].values())):
                shards[key] = rest.pop(key)
        else:
            rest[key] = _without_sharded(rest[key], (key,), is_sharded, averages)
    if averages:
        shards[_AVERAGES] = {str(i): tensor for i, (_, tensor) in enumerate(averages)}
        rest[_AVERAGES] = [list(path) for path, _ in averages]
    return shards, rest


def join_entries(shards: dict[str, Any], rest: dict[str, Any]) -> dict[str, Any]:
    """Returns the checkpoint that :func:`split_entries` split."""
    tensors = shards.pop(_AVERAGES, {})
    for i, path in enumerate(rest.pop(_AVERAGES, [])):
        holder: Any = rest
        for key in path[:-1]:
            holder = holder[key]
        holder[path[-1]] = tensors[str(i)]
    checkpoint = {**rest, **shards}
    checkpoint["state_dict"] = checkpoint.pop("model")
    numbered = sorted((k for k in checkpoint if re.fullmatch(r"optimizer_\d+", k)), key=lambda k: int(k[10:]))
    if numbered:
        checkpoint["optimizer_states"] = [checkpoint.pop(k) for k in numbered]
    return checkpoint


def _without_sharded(
    value: Any, path: tuple[Any, ...], is_sharded: Callable[[Tensor], bool], sharded: list[Any]
) -> Any:
    """Returns a value with None in the place of sharded tensors, which are added to ``sharded`` with their paths."""
    if isinstance(value, Tensor) and is_sharded(value):
        sharded.append((path, value))
        return None
    if isinstance(value, dict) and type(value) in (dict, OrderedDict):
        return type(value)((k, _without_sharded(v, (*path, k), is_sharded, sharded)) for k, v in value.items())
    if isinstance(value, (list, tuple)) and any(map(is_sharded, tensors_of(value))):
        return [_without_sharded(v, (*path, i), is_sharded, sharded) for i, v in enumerate(value)]
    return value


def write_shards(
    folder: Path, entries: dict[str, Any], writes: Callable[[str, Any], bool], group: dist.ProcessGroup | None
) -> dict[str, Checksum]:
    """Writes the entries of a checkpoint from all ranks of a group; all of them have to call it.

    Args:
        folder: An empty folder.
        entries: Nested dicts and lists, with the same structure on every rank but for optimizer states and parts.
        writes: Whether this rank writes a value, given its dotted key and the value; one rank has to.
        group: The ranks that write, with a backend for the CPU; None in one process.

    Returns:
        Size and checksum of each shard of this rank, by the name of its file.

    Raises:
        OSError: The system refused to write, on this rank or on another.
    """
    planner = _OwnedPlanner(writes)
    writer = PartWriter(folder, sync_files=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed.checkpoint")
        warnings.filterwarnings("ignore", category=FutureWarning)
        with _own_errors():
            save(entries, storage_writer=writer, planner=planner, process_group=group, no_dist=group is None)
    rank = 0 if group is None else dist.get_rank(group)
    return {file.name: checksum(file) for file in folder.glob(f"__{rank}_*")}


def finish_folder(
    folder: Path,
    rest: dict[str, Any],
    shards: dict[str, Checksum],
    shapes: Sequence[tuple[list[str], list[int]]] = (),
) -> None:
    """Writes what a folder holds beside its shards and their index; one rank calls this after all shards are written.

    Args:
        folder: The folder that the ranks have written their shards to.
        rest: The entries of ``meta.pt``.
        shards: Size and checksum of each shard, of all ranks.
        shapes: The shapes of tensors that were written in parts, of all ranks; see :func:`.parts.shapes`.
    """
    atomic.write({**rest, _SHAPES: list(shapes)} if shapes else rest, folder / META)
    write_checksums(folder, shards, (META, INDEX))


def read_folder(folder: Path, weights_only: bool | None = None) -> dict[str, Any]:
    """Returns the whole checkpoint in CPU memory, as a single file would, but with optimizer states by parameter names.

    Args:
        folder: A folder that :func:`write_shards` wrote, with ``meta.pt``.
        weights_only: How ``meta.pt`` and the values in shards that are no tensors are read; see ``torch.load``. The
            index of the shards is always read as plain data.

    Raises:
        FileNotFoundError: The folder holds no checkpoint.
        CheckpointError: A file in the folder is missing or damaged.
    """
    if not is_folder(folder):
        if (folder / CHECKSUMS).exists():
            verify_folder(folder)  # says which of the two is missing
        raise FileNotFoundError(f"{folder} is no checkpoint folder: it has no {META} and no {INDEX}")
    verify_folder(folder)
    index = read_index(folder / INDEX)
    shards: dict[str, Any] = {}
    reader, planner = _Reader(folder, index), _Planner(weights_only)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        with _own_errors():
            _load_state_dict(shards, storage_reader=reader, planner=planner, no_dist=True)
    rest = torch.load(folder / META, map_location="cpu", weights_only=weights_only)
    restore_shapes(shards, rest.pop(_SHAPES, []))
    return join_entries(shards, rest)


def consolidate(folder: str | Path, file: str | Path, weights_only: bool = False) -> None:
    """Turns a checkpoint folder into a single file, which plain Lightning loads.

    Args:
        folder: A checkpoint that was saved with ``save_distributed_checkpoint=True``. Without ``weights_only`` read it
            only if you trust its source.
        file: The file to write; it is replaced if it exists.
        weights_only: How ``meta.pt`` and the values in shards that are no tensors are read; see ``torch.load``.

    Raises:
        FileNotFoundError: The folder holds no checkpoint.
        CheckpointError: A file in the folder is missing or damaged, or the new file cannot be written.
    """
    checkpoint = read_folder(Path(folder), weights_only)
    checkpoint["optimizer_states"] = [by_index(s) for s in checkpoint.get("optimizer_states", [])]
    if not checkpoint["optimizer_states"]:
        del checkpoint["optimizer_states"]
    with atomic.replacing(Path(file).absolute()) as part:
        atomic.write(checkpoint, part)


def by_index(state: dict[str, Any]) -> dict[str, Any]:
    """Returns an optimizer's state by parameter index, as torch saves it, whether its keys are names or indices."""
    order = [key for group in state["param_groups"] for key in group["params"]]
    index = {key: i for i, key in enumerate(order)}
    groups = [{**g, "params": [index[key] for key in g["params"]]} for g in state["param_groups"]]
    found = {index[key]: s for key, s in state.get("state", {}).items()}
    return {"state": dict(sorted(found.items())), "param_groups": groups}


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raises the error of the first rank that failed, instead of torch's collection of them, which is no Exception."""
    try:
        yield
    except CheckpointException as error:
        _, (cause, _) = min(error.failures.items())
        raise cause from None


class PartWriter(FileSystemWriter):
    """Writes shards, and says why the system refuses to: torch's own error is about positions in a file."""

    @override
    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            raise atomic.system_error(error) or error from error


class _Reader(FileSystemReader):
    """Reads shards by an index that was read before."""

    def __init__(self, folder: Path, index: Metadata) -> None:
        super().__init__(folder)
        self._index = index

    @override
    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._index


class _Planner(_EmptyStateDictLoadPlanner):
    """Reads all entries, those that are no tensors as ``weights_only`` allows."""

    def __init__(self, weights_only: bool | None) -> None:
        super().__init__()
        self._weights_only = weights_only

    @override
    def load_bytes(self, read_item: Any, value: Any) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=self._weights_only))


class _OwnedPlanner(DefaultSavePlanner):
    """Plans a save in which all ranks have the same entries, and each writes some of them."""

    def __init__(self, writes: Callable[[str, Any], bool]) -> None:
        super().__init__()
        self._writes = writes

    def set_up_planner(self, state_dict: Any, *args: Any, **kwargs: Any) -> None:
        super().set_up_planner(state_dict, *args, **kwargs)
        self.state_dict = {key: value for key, value in self.state_dict.items() if self._writes(key, value)}

    def lookup_object(self, index: MetadataIndex) -> Any:
        value = self.state_dict[index.fqn]
        return value.values if isinstance(value, Part) else super().lookup_object(index)


def tensors_of(value: Any) -> list[Tensor]:
    """Returns all tensors in nested dicts, lists and tuples."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [t for v in value for t in tensors_of(v)] if isinstance(value, (list, tuple)) else []
