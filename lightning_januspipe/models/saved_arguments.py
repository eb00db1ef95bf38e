"""Compares the arguments of a potential with those in a checkpoint and with the data, and rebuilds a potential."""

import math
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe import __version__, keys

ARGUMENTS = "potential_arguments"
"""Key of the checkpoint entry with the arguments of the potential, by name."""

CLASS = "potential_class"
"""Key of the checkpoint entry with the class of the potential, as a dotted path."""

FACTS = "potential_facts"
"""Key of the checkpoint entry with what a user of the potential needs to know; see :func:`facts_of`."""

UNITS = {"length": "Å", keys.ENERGY: "eV", keys.FORCES: "eV/Å", keys.STRESS: "eV/Å³"}
"""Units of what a potential takes and returns."""

_ATTRIBUTES = ("species", "cutoff", "avg_num_neighbors")
"""Attributes that are saved of a potential without ``arguments``: its weights have no meaning without them."""

_IN_WEIGHTS = ("per_species_scale", "per_species_shift")
"""Arguments whose values are among the weights, so that loading a checkpoint replaces them."""

_OF_TRAINING = ("trainable_bessel", "trainable_scale_shift")
"""Arguments that choose what is trained, and do not change a prediction."""


def arguments_of(potential: nn.Module) -> dict[str, Any]:
    """Returns what is known of the arguments of a potential, in types that ``torch.load`` reads safely.

    Args:
        potential: Its attribute ``arguments``, a mapping, is returned if there is one; otherwise its attributes
            ``species``, ``cutoff`` and ``avg_num_neighbors``, as far as they exist.
    """
    found = getattr(potential, "arguments", None)
    if not isinstance(found, Mapping):
        found = {name: getattr(potential, name) for name in _ATTRIBUTES if hasattr(potential, name)}
    return {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in found.items()}


def facts_of(potential: nn.Module) -> dict[str, Any]:
    """Returns what a user of a potential needs to know, in types that ``torch.load`` reads safely.

    Args:
        potential: The potential; what it has no attributes for is left out.

    Returns:
        ``species``, the chemical symbols by species index; ``cutoff`` in Å; ``energies_of_atoms``, the energy in eV
        that each atom adds, by symbol, as trained, and by task where there are several; ``tasks``, the names of these;
        ``units``; and ``versions`` of Python and of the packages.
    """
    facts: dict[str, Any] = {}
    species, cutoff = getattr(potential, "species", None), getattr(potential, "cutoff", None)
    tasks = list(getattr(potential, "tasks", ()))
    shift = getattr(getattr(potential, "energy_model", None), "shift", None)
    if isinstance(species, (list, tuple)):
        facts["species"] = list(species)
        if isinstance(shift, Tensor) and not shift.is_meta and shift.shape[:1] == (len(species),):
            energies = shift.detach().double().cpu()
            of_tasks = energies.T.tolist() if shift.dim() == 2 else [energies.tolist()]
            tables = [dict(zip(species, values, strict=True)) for values in of_tasks]
            facts["energies_of_atoms"] = dict(zip(tasks, tables, strict=True)) if shift.dim() == 2 else tables[0]
    if len(tasks) > 1:
        facts["tasks"] = tasks
    if isinstance(cutoff, (int, float, Tensor)):
        facts["cutoff"] = float(cutoff)
    versions = {"lightning_januspipe": __version__, "python": platform.python_version()}
    for name in ("torch", "lightning", "pytorch-lightning", "e3nn"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {**facts, "units": dict(UNITS), "versions": versions}


def save_arguments(potential: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Adds the class, the known arguments and the facts of a potential to a checkpoint."""
    checkpoint[FACTS] = facts_of(potential)
    if arguments := arguments_of(potential):
        checkpoint[ARGUMENTS] = arguments
        checkpoint[CLASS] = f"{type(potential).__module__}.{type(potential).__qualname__}"


def compare_arguments(potential: nn.Module, checkpoint: Mapping[str, Any], source: str) -> list[str]:
    """Refuses a checkpoint whose weights would be another potential with the arguments of this one.

    Args:
        potential: The potential that receives the weights.
        checkpoint: The checkpoint; without the entry of :data:`ARGUMENTS` nothing is compared.
        source: Name of the checkpoint in messages, such as its path.

    Returns:
        A message for each argument of the potential whose value the weights replace.

    Raises:
        ValueError: An argument that is known of both has another value in the checkpoint, such as other species,
            another order of species, or another cutoff.
    """
    own, saved, replaced = arguments_of(potential), checkpoint.get(ARGUMENTS, {}), []
    for name in [name for name in own if name in saved and name not in _OF_TRAINING]:
        if _is_same(own[name], saved[name]):
            continue
        if name in _IN_WEIGHTS:
            replaced.append(f"{name}={own[name]} is replaced by the weights in {source}, saved with {saved[name]}")
            continue
        raise ValueError(
            f"{source} was trained with {name}={saved[name]}, and this potential has {name}={own[name]}, with which "
            f"the same weights are another potential. Give it {name}={saved[name]}, for instance with --config and "
            "the config.yaml of that run"
        )
    return replaced


def rebuild_potential(checkpoint: Mapping[str, Any], source: str) -> nn.Module:
    """Builds a reference potential with the arguments that a checkpoint names; its weights are not loaded.

    Only classes of :mod:`lightning_januspipe.models` are built, because a checkpoint may name any other code.

    Args:
        checkpoint: The checkpoint. The potential has the dtype of its weights, if that is float32 or float64.
        source: Name of the checkpoint in messages, such as its path.

    Raises:
        ValueError: The checkpoint does not tell the class and arguments, or the class is not one of this package.
    """
    from lightning_januspipe import models

    name, arguments = checkpoint.get(CLASS), checkpoint.get(ARGUMENTS)
    module, _, kind = str(name).rpartition(".")
    is_own = module.rpartition(".")[0] == models.__name__ and kind in models.__all__
    built: Any = getattr(models, kind) if is_own else None
    if not (isinstance(built, type) and issubclass(built, models.ConservativePotential)):
        what = "does not say which potential it belongs to" if name is None else f"belongs to a potential {name}"
        raise ValueError(
            f"{source} {what}, which cannot be built from the file alone; build it and pass it on, as in "
            "PotentialModule.load_from_checkpoint(path, potential=potential)"
        )
    dtypes = {value.dtype for value in checkpoint["state_dict"].values() if value.is_floating_point()}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if dtypes == {torch.float64} else torch.float32)
    try:
        return built(**arguments or {})
    finally:
        torch.set_default_dtype(before)


def _is_same(here: Any, there: Any) -> bool:
    if isinstance(here, (list, tuple)) and isinstance(there, (list, tuple)):
        return len(here) == len(there) and all(map(_is_same, here, there))
    if isinstance(here, Mapping) and isinstance(there, Mapping):
        return here.keys() == there.keys() and all(_is_same(here[name], there[name]) for name in here)
    if isinstance(here, (int, float)) and isinstance(there, (int, float)):
        return math.isclose(here, there, rel_tol=1e-6)
    return here == there
