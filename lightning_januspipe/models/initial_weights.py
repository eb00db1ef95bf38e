"""Reads trained weights from a checkpoint, verifies that they belong to the model, and freezes some of them."""

import inspect
import pickle
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.models.saved_arguments import ARGUMENTS, arguments_of, compare_arguments


def load_weights(module: nn.Module, potential: nn.Module, path: str | Path) -> list[str]:
    """Loads all parameters and buffers from a checkpoint, and nothing else.

    A potential of several tasks takes the weights of one that was trained on one task: each task begins with its
    readout, and keeps its own scale and shift.

    Args:
        module: Receives the weights, which the checkpoint holds under the same names.
        potential: The submodule whose arguments are compared with those in the checkpoint.
        path: File written by a Trainer, or folder of ``torch.distributed.checkpoint``.

    Returns:
        A message for each argument of the potential whose value the weights replace.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint belongs to another model: other arguments, names or shapes.
    """
    checkpoint = read_checkpoint(path)
    own = module.state_dict()
    weights: Mapping[str, Tensor] = checkpoint["state_dict"]
    checkpoint, weights = _for_tasks(potential, checkpoint, weights, own)
    replaced = compare_arguments(potential, checkpoint, str(path))
    problems = [
        ("missing in the checkpoint", sorted(own.keys() - weights.keys())),
        ("missing in the model", sorted(weights.keys() - own.keys())),
        (
            "other shapes",
            [
                f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
                for name, value in own.items()
                if name in weights and weights[name].shape != value.shape
            ],
        ),
    ]
    found = [f"{problem}: {_shortened(names)}" for problem, names in problems if names]
    if found:
        raise ValueError(
            f"{path} holds the weights of another model. {'; '.join(found)}. Give the model the arguments that it had "
            "when it was saved, for instance with --config and the config.yaml of that run"
        )
    module.load_state_dict(weights)
    return replaced


def _for_tasks(
    potential: nn.Module, checkpoint: dict[str, Any], weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Returns a checkpoint of one task, and its weights, as one of the several tasks of a potential with readouts.

    Each task begins with the readout of the checkpoint. Scale and shift stay those of the potential, which has the
    energies of atoms of each task. Everything else is returned as it is.
    """
    arguments = checkpoint.get(ARGUMENTS, {})
    tasks = arguments_of(potential).get("tasks", [])
    widens = len(tasks) > 1 and len(arguments.get("tasks", [None])) == 1
    if not widens or not any(".readouts." in name for name in own):
        return checkpoint, weights
    found = dict(weights)
    for name in weights:
        if ".readout." in name:
            before, _, after = name.rpartition(".readout.")
            value = found.pop(name)
            found |= {f"{before}.readouts.{task}.{after}": value for task in range(len(tasks))}
        elif name.endswith((".scale", ".shift")) and name in own:
            found[name] = own[name]
    kept = {"tasks", "per_species_scale", "per_species_shift"}
    return {**checkpoint, ARGUMENTS: {n: value for n, value in arguments.items() if n not in kept}}, found


def read_checkpoint(path: str | Path, weights_only: bool = True) -> dict[str, Any]:
    """Reads a checkpoint into CPU memory.

    Args:
        path: File written by a Trainer, or folder of ``torch.distributed.checkpoint``.
        weights_only: Read tensors and plain values only, which runs no code of the file. False reads all objects: use
            it with files that you trust.

    Returns:
        The checkpoint, with an entry ``state_dict``.

    Raises:
        FileNotFoundError: There is no such file, or the folder is no checkpoint.
        CheckpointError: The file or folder is damaged.
        ValueError: The file holds objects other than tensors and plain values, or no weights.
    """
    from lightning_januspipe.checkpoint.integrity import verify_file
    from lightning_januspipe.checkpoint.sharded import read_folder

    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no checkpoint {path} (looked in {path.absolute().parent}); check the path")
    if path.is_file():
        verify_file(path)
    try:
        checkpoint = (
            read_folder(path, weights_only) if path.is_dir() else torch.load(path, "cpu", weights_only=weights_only)
        )
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values: {error}. If you trust the other "
            "objects in it, read it with weights_only=False, or save it again with its entry 'state_dict' alone"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"{path} has no entry 'state_dict'; expected a checkpoint that a Trainer has saved")
    return checkpoint


def as_buffer(checkpoint: Mapping[str, Any]) -> BytesIO:
    """Returns a file in memory that holds a checkpoint, for ``LightningModule.load_from_checkpoint``."""
    buffer = BytesIO()
    torch.save(checkpoint, buffer)
    buffer.seek(0)
    return buffer


def weights_only_option(load_from_checkpoint: Callable[..., Any], weights_only: bool) -> dict[str, bool]:
    """Returns the option ``weights_only`` for a ``load_from_checkpoint``, where it has one."""
    accepted = inspect.signature(load_from_checkpoint).parameters
    return {"weights_only": weights_only} if "weights_only" in accepted else {}


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Excludes parameters from training.

    Args:
        module: The module that is frozen in part.
        patterns: Dotted parts of parameter names, such as ``"embedding"``, ``"layers.0"`` or ``"layers.[0-2]"``, with
            the wildcards of :mod:`fnmatch`. They match whole parts: ``"layers.1"`` is not ``layers.10``.

    Raises:
        ValueError: A pattern matches no parameter, or no parameter is left to train.
    """
    if isinstance(patterns, str):
        raise ValueError(f"frozen={patterns!r}; expected a list of parts of parameter names, such as [{patterns!r}]")
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        chosen = [value for name, value in parameters.items() if fnmatchcase(f".{name}.", f"*.{pattern}.*")]
        if not chosen:
            raise ValueError(
                f"frozen: {pattern!r} matches no parameter; expected a part of a name such as "
                f"{_shortened(list(parameters), 100)}"
            )
        for parameter in chosen:
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"frozen={list(patterns)} leaves no parameter to train; freeze less")


def describe_frozen(module: nn.Module, patterns: Sequence[str]) -> str:
    """Returns one line about the parameters that :func:`freeze` has excluded from training."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in module.parameters()]
    frozen = sum(size for size, is_trained in sizes if not is_trained)
    return f"frozen: {', '.join(patterns)} ({frozen:,} of {sum(size for size, _ in sizes):,} parameters)"


def _shortened(names: Sequence[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
