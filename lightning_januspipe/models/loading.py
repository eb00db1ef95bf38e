"""Loads a trained module, of this package or of another one, from a checkpoint alone."""

import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_januspipe.models.initial_weights import as_buffer, read_checkpoint, weights_only_option
from lightning_januspipe.models.lightning_module import PotentialModule
from lightning_januspipe.models.saved_arguments import ARGUMENTS, CLASS, FACTS

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def load(
    path: str | Path,
    module_class: "str | type[LightningModule]" = PotentialModule,
    *,
    weights_only: bool = True,
    **arguments: Any,
) -> Any:
    """Builds the module that a checkpoint was saved from, with its weights, on the CPU and in evaluation mode.

    Args:
        path: File written by a Trainer, or folder of ``torch.distributed.checkpoint``.
        module_class: The class of the module, or its import path such as ``"schnetpack.task.AtomisticTask"``. A
            checkpoint of :class:`~lightning_januspipe.models.PotentialModule` needs none.
        weights_only: Read tensors and plain values only, so that no code of the file runs. Modules of other packages
            that save objects among their hyper-parameters need False, with files that you trust.
        arguments: Arguments of the module that are to differ from those in the checkpoint, or that it does not hold.

    Returns:
        The module.

    Raises:
        FileNotFoundError: There is no checkpoint.
        TypeError: ``module_class`` has no ``load_from_checkpoint``.
        ValueError: The file holds other objects than tensors and plain values, or does not say which potential it
            belongs to.

    Example:
        ``module = lightning_januspipe.load("lightning_logs/version_0/checkpoints/best.ckpt")``
    """
    cls: Any = pkgutil.resolve_name(module_class) if isinstance(module_class, str) else module_class
    if not callable(getattr(cls, "load_from_checkpoint", None)):
        raise TypeError(f"module_class={module_class!r} has no load_from_checkpoint; expected a LightningModule")
    if issubclass(cls, PotentialModule):
        return cls.load_from_checkpoint(path, map_location="cpu", weights_only=weights_only, **arguments)
    buffer = as_buffer(read_checkpoint(path, weights_only))
    arguments |= weights_only_option(cls.load_from_checkpoint, weights_only)
    return cls.load_from_checkpoint(buffer, map_location="cpu", **arguments).eval()


def describe(path: str | Path) -> dict[str, Any]:
    """Returns what a checkpoint of a :class:`~lightning_januspipe.models.PotentialModule` says of its potential.

    Args:
        path: File or folder; no code of a file runs.

    Returns:
        The class and the arguments of the potential, ``species``, ``cutoff`` in Å, ``energies_of_atoms`` in eV by
        symbol, or by task and symbol with several ``tasks``, ``units``, ``versions``, the number of weights, and the
        ``epoch`` and ``global_step`` of the run; as far as the checkpoint holds them.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The file cannot be read without running code.
    """
    checkpoint = read_checkpoint(path)
    facts: Mapping[str, Any] = checkpoint.get(FACTS, {})
    named = {"class": checkpoint.get(CLASS), "arguments": checkpoint.get(ARGUMENTS)}
    found = {**{name: value for name, value in named.items() if value is not None}, **facts}
    found["num_weights"] = sum(value.numel() for value in checkpoint["state_dict"].values())
    return found | {name: checkpoint[name] for name in ("epoch", "global_step") if name in checkpoint}
