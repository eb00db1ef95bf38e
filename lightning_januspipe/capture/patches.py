"""Changes attributes of objects, levels of loggers and hooks of modules for a while."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from lightning_januspipe.errors import WITHOUT_CAPTURE, CaptureError

_ABSENT = object()


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives an attribute of an object another value inside the block, and restores it afterwards.

    Args:
        owner: a module of the model, such as one whose ``forward`` or ``log`` is replaced, or a Python module.
        name: the attribute.
        value: its value inside the block.
    """
    attributes = vars(owner)
    own = attributes.get(name, _ABSENT)
    attributes[name] = value
    try:
        yield
    finally:
        if own is _ABSENT:
            attributes.pop(name, None)
        else:
            attributes[name] = own


@contextmanager
def patched_package(owner: Any, name: str, value: Any, release: str) -> Iterator[None]:
    """Replaces what a package's Python module is known to define, as :func:`patched` does.

    Args:
        owner: the Python module.
        name: the attribute.
        value: its value inside the block.
        release: the package and its release that define it, such as ``"matgl 4.1"``.

    Raises:
        CaptureError: the module does not define it.
    """
    if not hasattr(owner, name):
        raise CaptureError(
            f"{owner.__name__} has no {name!r}: the adapter is written for {release}. Install {release}, or train "
            f"with {WITHOUT_CAPTURE}."
        )
    with patched(owner, name, value):
        yield


@contextmanager
def quiet_loggers(names: Sequence[str], level: int) -> Iterator[None]:
    """Lets loggers show only what is at least as important as a level.

    Args:
        names: of the loggers.
        level: such as ``logging.ERROR``.
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)


@contextmanager
def module_hooks(enter: Callable[..., None], leave: Callable[..., None]) -> Iterator[None]:
    """Runs functions before and after the forward of every module, inside the block.

    Args:
        enter: gets the module and its positional arguments.
        leave: gets the module, its positional arguments and what it returned.
    """
    before = register_module_forward_pre_hook(enter)
    after = register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
