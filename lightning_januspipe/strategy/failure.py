"""Prints why a run failed: other ranks say one line each, then comes the cause, once and last.

Ranks meet in the store of the run: the first one with an error of its own writes down what failed, and prints it when
the others have said their line. What a rank says only because another has ended is never the cause.
"""

from __future__ import annotations

import os
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from lightning_januspipe.distributed import is_copy
from lightning_januspipe.errors import RankLostError
from lightning_januspipe.strategy.launcher import RankProcesses

DEBUG = "JANUSPIPE_DEBUG"
"""The environment variable with which whole tracebacks are printed, by every rank."""

WAIT = 12.0
"""Seconds that the rank with the cause waits for the others to say their line, and rank 0 for others to end."""

_LOST = (
    "Connection closed",
    "Connection reset",
    "Connection refused",
    "Broken pipe",
    "connection was closed",
    "aborted",
)
"""Parts of what torch's errors say when another rank has ended."""

_LIBRARIES = ("lightning_januspipe", "lightning", "pytorch_lightning", "lightning_fabric", "torch", "jsonargparse")
"""Packages whose frames say nothing to users about an error of their own code; Python's own are left out too."""

_OF_DATACLASS = ("<string>", "__init__")
"""File and function of a constructor that Python has made."""

_Hook = Callable[[type[BaseException], BaseException, TracebackType | None], Any]


class FailureReport:
    """Prints the error that ends this rank, in the order that the module's docstring describes.

    Args:
        rank: This rank.
        world_size: The number of ranks.
        store: The store of the run.
        launcher: What has started the other ranks of this machine; None if that was not this process.
        run: How many runs this process has started, which is the same on all ranks.
        hook: ``sys.excepthook`` as it was before torch.distributed wrapped it.
    """

    def __init__(self, rank: int, world_size: int, store: Any, launcher: Any, run: int, hook: _Hook) -> None:
        self._rank, self._world_size, self._store = rank, world_size, store
        self._launcher = launcher if isinstance(launcher, RankProcesses) else None
        self._keys = f"januspipe/failure/{run}"
        self._error: BaseException | None = None
        self._rank_of_cause, self._cause = "", ""
        earlier = getattr(hook, "__self__", None)  # that of an earlier run of this process
        self._before: _Hook = earlier._before if isinstance(earlier, FailureReport) else hook
        if DEBUG not in os.environ:
            sys.excepthook = self._hook

    def note(self, error: BaseException) -> None:
        """Writes down the error of this rank, before its connections are closed; the first error is the cause."""
        self._error = error
        if not is_echo(error) and not is_copy(error):
            with suppress(RuntimeError):  # the rank that serves the store has ended
                self._store.compare_set(f"{self._keys}/cause", "", f"{self._rank}\n{_last_line(error)}")

    def _look_up_cause(self) -> None:
        key, cause = f"{self._keys}/cause", b""
        with suppress(RuntimeError):  # see above
            if self._store.check([key]):
                cause = self._store.get(key)
        has_own = self._error is not None and not is_echo(self._error) and not is_copy(self._error)
        if not cause and self._error is not None and has_own:
            cause = f"{self._rank}\n{_last_line(self._error)}".encode()
        self._rank_of_cause, _, self._cause = cause.decode().partition("\n")

    def _hook(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if error is not self._error:
            self._before(kind, error, trace)
            return
        sys.stdout.flush()
        self._look_up_cause()
        is_cause = self._rank_of_cause == str(self._rank)
        is_same = self._cause == _last_line(error) or is_copy(error)  # then another rank prints it
        if is_cause:
            if not self._await_others():
                self._say("failed, and the other ranks have ended:")
            self._print(kind, error, trace)
        elif not is_same:
            self._say(self._why(error))
        with suppress(RuntimeError):
            self._store.set(f"{self._keys}/said/{self._rank}", "same" if is_same else "other")
        if self._launcher is not None and not is_cause:
            self._launcher.wait(WAIT)
            if not self._cause:
                print(*self._launcher.failed(), sep="\n", file=sys.stderr, flush=True)

    def _why(self, error: BaseException) -> str:
        if not self._cause:
            return str(error)
        own = "" if is_echo(error) else f", after {_short(_last_line(error))}"
        return f"ended because rank {self._rank_of_cause} has failed{own}"

    def _say(self, text: str) -> None:
        print(f"[rank {self._rank}] {text}", file=sys.stderr, flush=True)

    def _await_others(self) -> bool:
        """Waits until all others have said their line, for some seconds at most; returns whether all failed alike."""
        until = time.monotonic() + WAIT
        waiting = {f"{self._keys}/said/{rank}" for rank in range(self._world_size) if rank != self._rank}
        are_alike = True
        with suppress(RuntimeError):  # the rank that serves the store has ended, after saying its line
            while waiting and time.monotonic() < until:
                for key in [key for key in waiting if self._store.check([key])]:
                    are_alike = are_alike and self._store.get(key) == b"same"
                    waiting.remove(key)
                time.sleep(0.05)
        return are_alike and not waiting

    def _print(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if self._before is sys.__excepthook__:
            print(*short_traceback(error), sep="\n", file=sys.stderr, flush=True)
        else:
            self._before(kind, error, trace)


def is_echo(error: BaseException) -> bool:
    """Returns whether an error says only that another rank has ended, or did not answer."""
    lost = isinstance(error, RuntimeError) and any(part in str(error) for part in _LOST)
    return lost or isinstance(error, RankLostError)


def shorten_tracebacks() -> None:
    """Makes Python end with :func:`short_traceback` where a traceback would lead through this package."""
    if sys.excepthook is sys.__excepthook__ and DEBUG not in os.environ:
        sys.excepthook = _print_short


def _print_short(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    own = _folders_of(_LIBRARIES[:1])
    if any(frame.f_code.co_filename.startswith(own) for frame, _ in traceback.walk_tb(trace)):
        print(*short_traceback(error), sep="\n", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


def short_traceback(error: BaseException) -> Iterator[str]:
    """Yields the lines of a traceback without the frames of Lightning, torch and this package, the error last."""
    frames = traceback.extract_tb(error.__traceback__)
    shown = [f for f in frames if not _is_of_library(f.filename) and (f.filename, f.name) != _OF_DATACLASS]
    if len(shown) < len(frames):
        yield f"(calls inside libraries are left out; {DEBUG}=1 prints all)"
    yield from "".join(traceback.StackSummary.from_list(shown).format()).splitlines()
    if isinstance(error.__cause__, Exception):
        yield f"caused by {_last_line(error.__cause__)}"
    yield from "".join(traceback.format_exception_only(error)).splitlines()


def _is_of_library(file: str) -> bool:
    is_pythons = file.startswith((sysconfig.get_path("stdlib"), "<frozen")) and "-packages" not in file
    return is_pythons or file.startswith(_folders_of(_LIBRARIES))


def _folders_of(packages: Sequence[str]) -> tuple[str, ...]:
    modules = (sys.modules.get(name) for name in packages)
    return tuple(os.path.dirname(m.__file__) + os.sep for m in modules if m is not None and m.__file__)


def _last_line(error: BaseException) -> str:
    return " ".join("".join(traceback.format_exception_only(error)).split())


def _short(text: str, most: int = 160) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
