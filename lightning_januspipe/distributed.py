"""Does what all ranks do together: they wait for one another, get what one rank found, and start with one module.

Every collective stands in a block of :func:`waiting`. If a rank has died or hangs, the others get the backend's error
when their connection to it closes, or when the timeout of their group has passed. The block makes of it an error that
names both ranks and the wait. Which of several ranks is missing no backend tells: each rank that waits in vain leaves
a note in the store that all ranks share, and those without a note are the ones that are waited for.
"""

from __future__ import annotations

import json
import pickle
import re
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.errors import RankLostError

NOTES_TIME = 3.0
"""Seconds that a rank which waited in vain looks for the notes of the others."""

_COPY = "_januspipe_copy"  # the attribute of errors that another rank has raised first

_Result = TypeVar("_Result")


@contextmanager
def waiting(what: str, group: dist.ProcessGroup | None = None, mixed: bool = False) -> Iterator[None]:
    """Names this rank, the wait and the ranks that did not come, if a collective in the block fails.

    Args:
        what: What the ranks do together, as a noun.
        group: The ranks that take part; None for the default group.
        mixed: Whether the block holds more than collectives, so that not every error in it is about other ranks.

    Raises:
        RankLostError: A rank has ended or hangs.
    """
    began = time.monotonic()
    try:
        yield
    except (RankLostError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        if mixed and not _is_of_backend(error):
            raise
        ranks = dist.get_process_group_ranks(group)
        me = ranks[dist.get_rank(group)]
        # Without the frames of torch, which refer to the group: this rank's connections have to close in turn.
        raise rank_lost(error, what, me, [r for r in ranks if r != me], began) from error.with_traceback(None)


def rank_lost(error: BaseException, what: str, rank: int, others: Sequence[int], began: float) -> RankLostError:
    """Returns the error of a rank that waited in vain, after it has looked which rank did not come.

    Args:
        error: The backend's error.
        what: What this rank waited in, as a noun.
        rank: This global rank.
        others: The global ranks that it waited for.
        began: When it began to wait, by ``time.monotonic``.
    """
    waited = time.monotonic() - began
    notes = _Notes(rank, what)
    missing, is_certain = notes.missing(others)
    cause = re.sub(r"^(\[[^\]]*\] *)+", "", str(error).strip()).split("\n")[0].split(". ")[0].rstrip(".")
    said = f"global rank {rank} waited {waited:.1f} s for "
    if missing:
        one = "" if is_certain or len(missing) == 1 else "one of "
        return RankLostError(
            f"{said}{one}{_ranks(missing)}, which did not come ({what}): {cause}. That rank has ended or hangs; its "
            "own output has the cause."
        )
    elsewhere = "; ".join(f"global rank {r} in {w}" for r, w in sorted(notes.waits.items()))
    return RankLostError(
        f"{said}{_ranks(others)} ({what}), but all of them wait, too: {elsewhere} ({cause}). The ranks do not take the "
        "same steps: look for conditions on the rank, or on data that differ by rank."
    )


class _Notes:
    """Exchanges notes through the store about which rank waits in vain for which.

    The store may be held by the very rank that hangs, and then never answers: a thread asks it.
    """

    def __init__(self, rank: int, what: str) -> None:
        self._rank, self._what = rank, what
        self._waits_for: dict[int, list[int]] = {}
        self._has_answered = False
        self.waits: dict[int, str] = {}

    def missing(self, others: Sequence[int]) -> tuple[list[int], bool]:
        """Returns the ranks that are waited for in the end, and whether the store has told so."""
        thread = threading.Thread(target=self._ask, args=(list(others),), daemon=True)
        thread.start()
        thread.join(NOTES_TIME + 1)
        if not self._has_answered:
            return list(others), False
        return sorted(r for r in self._reached(others) if r not in self.waits), True

    def _reached(self, others: Sequence[int]) -> list[int]:
        """Returns the ranks that this one waits for, the ranks that those wait for, and so on."""
        found = [r for r in others if r != self._rank]
        for rank in found:
            found += [r for r in self._waits_for.get(rank, ()) if r != self._rank and r not in found]
        return found

    def _ask(self, others: list[int]) -> None:
        try:
            store = _shared_store().clone()
            store.set(_note_of(self._rank), json.dumps([self._what, others]))
            end = time.monotonic() + NOTES_TIME
            while time.monotonic() < end:
                silent = [r for r in self._reached(others) if r not in self.waits]
                for rank in silent:
                    self._read(store, rank)
                self._has_answered = True
                if not silent:
                    return
                time.sleep(0.1)
        except RuntimeError:  # the rank that holds the store has ended
            return

    def _read(self, store: Any, rank: int) -> None:
        note = json.loads(store.get(_note_of(rank))) if store.check([_note_of(rank)]) else None
        if note is not None:
            self._waits_for[rank] = note[1]
            self.waits[rank] = note[0]


class PatientStore:
    """Asks the store of all ranks and waits a few seconds for each answer: the rank that holds it may hang.

    Args:
        store: The store.
        patience: Seconds; the first question that is not answered in them makes all further ones fail at once.

    Raises:
        RuntimeError: By every method: the store does not answer, or is gone.
    """

    def __init__(self, store: Any, patience: float = NOTES_TIME) -> None:
        self._store, self._patience, self._is_silent = store, patience, False

    def check(self, keys: list[str]) -> bool:
        """Tells whether all keys have values."""
        return bool(self._ask("check", keys))

    def get(self, key: str) -> bytes:
        """Returns the value of a key that has one."""
        return bytes(self._ask("get", key))

    def set(self, key: str, value: str) -> None:
        """Gives a key a value."""
        self._ask("set", key, value)

    def add(self, key: str, amount: int) -> int:
        """Adds to a number, and returns the sum."""
        return int(self._ask("add", key, amount))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Gives a key a value if it has the expected one, nothing for none; returns the value that it has then."""
        return bytes(self._ask("compare_set", key, expected, desired))

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Waits until all keys have values; raises an error after the timeout."""
        self._ask("wait", keys, timeout, patience=self._patience + timeout.total_seconds())

    def _ask(self, method: str, *arguments: Any, patience: float | None = None) -> Any:
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(getattr(self._store, method)(*arguments))
            except RuntimeError as error:
                answers.append(error)

        if not self._is_silent:
            thread = threading.Thread(target=ask, daemon=True)
            thread.start()
            thread.join(patience or self._patience)
            self._is_silent = not answers
        if not answers:
            raise RuntimeError("the store of torch.distributed does not answer: the rank that holds it hangs")
        if isinstance(answers[0], RuntimeError):
            raise answers[0]
        return answers[0]


def forget_notes(rank: int) -> None:
    """Deletes this rank's note of an earlier run; called when process groups are made."""
    _shared_store().set(_note_of(rank), "null")


def set_timeout(timeout: timedelta, groups: Sequence[dist.ProcessGroup | None]) -> None:
    """Sets how long collectives of process groups wait, as far as their backends have such a limit.

    Args:
        timeout: The limit.
        groups: The groups; None is the default group.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Set timeout is now only supported")
        for group in groups:
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def _note_of(rank: int) -> str:
    return f"januspipe/waits/{rank}"


def _shared_store() -> Any:
    """Returns the store of all ranks, also where a smaller group is the default one."""
    store: Any = dist.distributed_c10d._get_default_store()
    return getattr(store, "_underlying_non_prefix_store", store)


def _is_of_backend(error: RuntimeError) -> bool:
    """Returns whether an error is of a collective: of torch.distributed, or of gloo, which raises plain errors."""
    if isinstance(error, dist.DistError) or "/gloo/" in str(error):
        return True
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_globals.get("__name__", "").startswith("torch.distributed"):
            return True
        frame = frame.tb_next
    return False


def _ranks(ranks: Sequence[int]) -> str:
    listed = [str(r) for r in ranks]
    if len(listed) == 1:
        return f"global rank {listed[0]}"
    return f"global ranks {', '.join(listed[:-1])} and {listed[-1]}"


def on_first_rank(function: Callable[[], _Result], rank: int, broadcast: Callable[[Any], Any]) -> _Result:
    """Calls a function on rank 0; returns its result, or raises its error, on every rank.

    Args:
        function: Called on rank 0.
        rank: This rank.
        broadcast: Returns an object of rank 0 on all ranks.

    Raises:
        ValueError: The result cannot be pickled.
    """
    result: Any = None
    content = b""
    if rank == 0:
        try:
            result = function()
            content = _pickled(result)
        except Exception as error:  # raised again on every rank, and here with the lines that it comes from
            result = portable(error).with_traceback(error.__traceback__)
            content = pickle.dumps(result)
    content = broadcast(content)
    if rank != 0:
        with warnings.catch_warnings():  # unpickling a pytree's spec warns about its own class
            warnings.filterwarnings("ignore", category=FutureWarning)
            result = pickle.loads(content)
        if isinstance(result, Exception):
            vars(result)[_COPY] = True
    if isinstance(result, Exception):
        raise result
    return result


def is_copy(error: BaseException) -> bool:
    """Returns whether an error was raised here because another rank has it, which has its traceback too."""
    return bool(vars(error).get(_COPY, False))


def on_every_rank(function: Callable[[], _Result], gathered: Callable[[Any], list[Any]]) -> _Result:
    """Calls a function on every rank and returns its result; if it fails on one rank, there is an error on all.

    Args:
        function: Called on every rank; it must not wait for other ranks.
        gathered: Returns an object of every rank on all ranks.
    """
    result: Any = None
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    failed = [e for e in gathered(error and portable(error)) if e is not None]
    if failed:
        if error is None:
            vars(failed[0])[_COPY] = True
        raise error or failed[0]
    return result


def _pickled(result: Any) -> bytes:
    """Pickles a result; if it failed in broadcasting instead, the other ranks would wait for this one."""
    try:
        return pickle.dumps(result)
    except Exception as error:  # objects may refuse in any way
        raise ValueError(
            f"what the first rank found cannot be sent to the others: {type(error).__name__}: {error}. Objects that a "
            "potential is called with or returns have to be such that pickle takes them: define their classes and "
            "functions at module level, or give it tensors instead."
        ) from error


def portable(error: Exception) -> Exception:
    """Returns an error that survives pickling: of an error of a foreign type only the message does."""
    known = type(error).__module__.split(".")[0] in ("builtins", "lightning_januspipe")
    return error if known and len(error.args) == 1 else RuntimeError(f"{type(error).__name__}: {error}")


_CHUNK = 2**26
"""Bytes that are broadcast at once."""


def broadcast_module(module: nn.Module, device: torch.device, absent: Collection[Tensor] = ()) -> None:
    """Gives every rank the parameters and buffers of global rank 0, as data-parallel training does at its start.

    Args:
        module: The module; its tensors may be on the CPU.
        device: This rank's device, for the messages.
        absent: Parameters that stay as they are, because some ranks have no memory for them.
    """
    left_out = set(absent)
    tensors = [t for t in (*module.parameters(), *module.buffers()) if t.numel() and t not in left_out]
    for same in _chunks(tensors):
        flat = torch.cat([t.detach().reshape(-1).to(device) for t in same])
        with waiting("the copying of the module from global rank 0"):
            dist.broadcast(flat, 0)
        for tensor, values in zip(same, flat.split([t.numel() for t in same]), strict=True):
            tensor.data.copy_(values.view_as(tensor))


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    for dtype in dict.fromkeys(t.dtype for t in tensors):
        chunk: list[Tensor] = []
        for tensor in (t for t in tensors if t.dtype == dtype):
            chunk.append(tensor)
            if sum(t.numel() * t.element_size() for t in chunk) >= _CHUNK:
                yield chunk
                chunk = []
        if chunk:
            yield chunk
