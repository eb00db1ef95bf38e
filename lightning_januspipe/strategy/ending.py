"""Says, when Ctrl-C or SIGTERM stops a run, how far it was, what is saved, and how to go on."""

from __future__ import annotations

import os
from typing import Any


def newest_checkpoint(trainer: Any, since: float) -> tuple[str, int | None]:
    """Returns the path of the checkpoint that a run has saved last, and its step.

    Args:
        trainer: The Trainer of the run.
        since: When the run began, in seconds since the epoch; older files are of other runs.

    Returns:
        An empty path if there is none; None as the step if it is not known.
    """
    found: list[tuple[float, str, int | None]] = []
    for callback in trainer.checkpoint_callbacks:
        on_exception = getattr(callback, "ckpt_path", "") if hasattr(callback, "filename") else ""
        names = (getattr(callback, "last_model_path", ""), getattr(callback, "best_model_path", ""), on_exception)
        for path in filter(None, map(str, names)):
            if os.path.exists(path) and os.path.getmtime(path) >= since:
                is_now = path == on_exception
                step = trainer.global_step if is_now else getattr(callback, "_last_global_step_saved", None)
                found.append((os.path.getmtime(path), path, step))
    _, path, step = max(found, default=(0.0, "", None))
    return path, step


def describe_interruption(trainer: Any, exception: BaseException, path: str, step: int | None) -> str:
    """Returns what to say when a run was stopped.

    Args:
        trainer: The Trainer of the run.
        exception: What has stopped it.
        path: The newest checkpoint; empty if there is none.
        step: The step of that checkpoint.
    """
    names = {"KeyboardInterrupt": "Ctrl-C", "SIGTERMException": "SIGTERM"}
    what = names.get(type(exception).__name__, type(exception).__name__)
    told = f"Stopped by {what} after step {trainer.global_step}, in epoch {trainer.current_epoch}."
    if not path:
        return (
            f"{told} No checkpoint was saved. ModelCheckpoint(every_n_train_steps=...) saves in training, and "
            "OnExceptionCheckpoint on SIGTERM."
        )
    at = "" if step is None else f", of step {step}"
    return f"{told} The newest checkpoint is {path}{at}; ckpt_path={path!r} goes on from it."
