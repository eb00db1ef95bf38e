"""Starting from trained weights: read them from a checkpoint, see that they fit, and freeze some of them."""

import math
import pickle
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ARGUMENTS = ("species", "cutoff", "avg_num_neighbors")
"""What weights of a potential mean nothing without, beside their names and shapes."""

KEY = "potential_arguments"
"""The entry of a checkpoint that holds :data:`ARGUMENTS`, for potentials that have them as attributes."""


def arguments_of(potential: nn.Module) -> dict[str, Any]:
    """Those of :data:`ARGUMENTS` that a potential has as attributes, in types that ``torch.load`` reads safely."""
    found = {name: getattr(potential, name) for name in ARGUMENTS if hasattr(potential, name)}
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in found.items()}


def load_weights(module: nn.Module, potential: nn.Module, path: str | Path) -> None:
    """Load all parameters and buffers from a checkpoint, and nothing else.

    Args:
        module: Is given the weights, which the checkpoint holds under the same names.
        potential: The part of it whose :data:`ARGUMENTS` have to be those of the checkpoint.
        path: File of a Trainer, or folder of ``torch.distributed.checkpoint``.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: It belongs to another model: to other species, or with other names or shapes.
    """
    checkpoint = read_checkpoint(Path(path))
    _check_arguments(arguments_of(potential), checkpoint.get(KEY, {}), path)
    weights: Mapping[str, Tensor] = checkpoint["state_dict"]
    own = module.state_dict()
    problems = [
        ("not in the checkpoint", sorted(own.keys() - weights.keys())),
        ("not in the model", sorted(weights.keys() - own.keys())),
        (
            "of other shapes",
            [
                f"{name} {tuple(weights[name].shape)} instead of {tuple(value.shape)}"
                for name, value in own.items()
                if name in weights and weights[name].shape != value.shape
            ],
        ),
    ]
    found = [f"{what}: {_shortened(names)}" for what, names in problems if names]
    if found:
        raise ValueError(
            f"{path} holds the weights of another model. {'; '.join(found)}. Give the model the arguments that it had "
            "when it was saved, such as with --config and the config.yaml of that run"
        )
    module.load_state_dict(weights)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint in CPU memory, with the entry ``state_dict``. No code is run but what the index of a folder holds.

    Raises:
        FileNotFoundError: There is nothing, or a folder that is no checkpoint.
        ValueError: It holds objects that are not read, or no weights.
    """
    from lightning_januspipe.checkpoint.sharded import read_folder

    if not path.exists():
        raise FileNotFoundError(f"initial_weights: there is no {path}; expected a checkpoint of an earlier run")
    try:
        checkpoint = read_folder(path, True) if path.is_dir() else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint of tensors and plain values: {error}. Where it holds other objects "
            "and you trust it, save it again with its entry 'state_dict' alone"
        ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise ValueError(f"{path} has no entry 'state_dict'; expected a checkpoint that a Trainer has saved")
    return checkpoint


def freeze(module: nn.Module, patterns: Sequence[str]) -> None:
    """Exclude parameters from training.

    Args:
        module: Whose parameters.
        patterns: Dotted parts of parameter names, such as ``"embedding"``, ``"layers.0"`` or ``"layers.[0-2]"``, with
            the wildcards of :mod:`fnmatch`. They match whole parts: ``"layers.1"`` is not ``layers.10``.

    Raises:
        ValueError: A pattern matches nothing, or nothing is left to train.
    """
    if isinstance(patterns, str):
        raise ValueError(f"frozen={patterns!r}; expected a list of parts of parameter names, such as [{patterns!r}]")
    parameters = dict(module.named_parameters())
    for pattern in patterns:
        chosen = [value for name, value in parameters.items() if fnmatchcase(f".{name}.", f"*.{pattern}.*")]
        if not chosen:
            raise ValueError(f"frozen: {pattern!r} matches no parameter; there are {_shortened(list(parameters), 100)}")
        for parameter in chosen:
            parameter.requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"frozen={list(patterns)} leaves no parameter to train; freeze less")


def check_species(potential: nn.Module, data: Any) -> None:
    """Refuse data that counts the species otherwise than the potential does.

    Args:
        potential: Its ``species``, if it has any, are chemical symbols in the order of their index.
        data: Data module, with ``species`` in the order of their index or without.

    Raises:
        ValueError: The species of the data are not the first ones of the potential.
    """
    own, given = getattr(potential, "species", None), getattr(data, "species", None)
    if own is None or given is None or list(own)[: len(given)] == list(given):
        return
    raise ValueError(
        f"the data has the species {list(given)} and the potential {list(own)}: a species must have the same place in "
        f"both. Give the data species={list(own)}, or train a potential for those of the data"
    )


def _check_arguments(own: Mapping[str, Any], saved: Mapping[str, Any], path: str | Path) -> None:
    """Refuse a checkpoint of a potential with other :data:`ARGUMENTS`, where both are known."""
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
