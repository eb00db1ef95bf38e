"""Reads trained weights from a checkpoint, verifies that they belong to the model, and freezes some of them."""

import math
import pickle
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENTS = ("species", "cutoff", "avg_num_neighbors")
"""Attributes of a potential without which its weights have no meaning."""

KEY = "potential_arguments"
"""Key of the checkpoint entry that holds the :data:`ARGUMENTS` of the potential."""


def arguments_of(potential: nn.Module) -> dict[str, Any]:
    """Return the :data:`ARGUMENTS` that a potential has as attributes, in types that ``torch.load`` reads safely."""
    found = {name: getattr(potential, name) for name in ARGUMENTS if hasattr(potential, name)}
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in found.items()}


def load_weights(module: nn.Module, potential: nn.Module, path: str | Path) -> None:
    """Load all parameters and buffers from a checkpoint, and nothing else.

    Args:
        module: Receives the weights, which the checkpoint holds under the same names.
        potential: The submodule whose :data:`ARGUMENTS` are compared with those in the checkpoint.
        path: File written by a Trainer, or folder of ``torch.distributed.checkpoint``.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint belongs to another model: other arguments, names or shapes.
    """
    checkpoint = read_checkpoint(Path(path))
    _check_arguments(arguments_of(potential), checkpoint.get(KEY, {}), path)
    weights: Mapping[str, Tensor] = checkpoint["state_dict"]
    own = module.state_dict()
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


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint into CPU memory.

    Files are read without running code; the index of a folder is a pickle.

    Returns:
        The checkpoint, with an entry ``state_dict``.

    Raises:
        FileNotFoundError: There is no such file, or the folder is no checkpoint.
        ValueError: The file holds objects other than tensors and plain values, or no weights.
    """
    from lightning_januspipe.checkpoint.sharded import read_folder

    if not path.exists():
        raise FileNotFoundError(f"initial_weights: there is no {path}; expected a checkpoint of an earlier run")
    try:
        checkpoint = read_folder(path, True) if path.is_dir() else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values: {error}. If you trust the other "
            "objects in it, save it again with its entry 'state_dict' alone"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"{path} has no entry 'state_dict'; expected a checkpoint that a Trainer has saved")
    return checkpoint


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude parameters from training.

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


def check_data(potential: nn.Module, data: Any) -> None:
    """Refuse data whose species indices differ from those of the potential.

    Args:
        potential: A module; its attribute ``species``, if there is one, lists chemical symbols by species index.
        data: A data module; its attribute ``species``, if there is one, does the same.

    Raises:
        ValueError: The species of the data are not the first species of the potential.
    """
    own, given = getattr(potential, "species", None), getattr(data, "species", None)
    if own is None or given is None or list(own)[: len(given)] == list(given):
        return
    raise ValueError(
        f"the data has the species {list(given)} and the potential {list(own)}: a species must have the same index "
        f"in both. Give the data species={list(own)}, or train a potential for those of the data"
    )


def _check_arguments(own: Mapping[str, Any], saved: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint of a potential with other :data:`ARGUMENTS`, as far as both are known."""
    for name in own.keys() & saved.keys():
        here, there = own[name], saved[name]
        is_same = math.isclose(here, there, rel_tol=1e-6) if isinstance(here, float) else here == there
        if not is_same:
            raise ValueError(
                f"{path} was trained with {name}={there}, and this potential has {name}={here}, with which the same "
                f"weights are another potential. Give it {name}={there}, such as with --config and the config.yaml of "
                "that run"
            )


def _shortened(names: Sequence[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
