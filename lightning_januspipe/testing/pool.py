"""Processes on this machine that run functions as the ranks of one job."""

from __future__ import annotations

import atexit
import gc
import importlib
import multiprocessing
import os
import pickle
import random
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch


class RankError(AssertionError):
    """Says that a function failed on one or more ranks; the message holds their tracebacks."""


class RankPool:
    """Runs functions as the ranks of one job, in processes of this machine, over gloo on loopback.

    Starting Python and torch takes seconds, so one pool runs many jobs of different sizes.

    Args:
        size: The largest number of ranks of a job.
        preload: Modules that every rank imports first. A server process imports them, too, and the ranks are forked
            from it, which saves seconds whenever ranks are started, also after a failure. All pools of a program share
            that server, which has the modules of the first pool. Importing them must not touch a GPU. None starts
            every rank from nothing.

    Example:
        >>> with RankPool(2) as pool:
        ...     results = pool.run(function, "an argument")  # one result for each rank
    """

    def __init__(self, size: int, preload: Sequence[str] | None = None) -> None:
        self.size = size
        self._preload = preload
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *args: Any, world_size: int | None = None, timeout: float = 300.0
    ) -> list[Any]:
        """Calls ``function(*args)`` on every rank of a job.

        Args:
            function: A function that can be imported by its name. The environment variables of ``torch.distributed``
                are set when it is called, and its process group is destroyed afterwards.
            args: Arguments that can be pickled.
            world_size: The job's ranks, by default all of the pool.
            timeout: Seconds after which the pool's processes are killed.

        Returns:
            The results, by rank.

        Raises:
            ValueError: The pool has fewer processes, or the function or an argument cannot be pickled.
            RankError: A rank raised, died, or took too long.
        """
        num = world_size or self.size
        if not 1 <= num <= self.size:
            raise ValueError(f"world_size={num}, but the pool has {self.size} processes")
        try:
            job = pickle.dumps((function, args))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(
                f"the ranks run in processes of their own, to which this cannot be sent: {error}. Define functions and "
                "classes at the top level of a file that can be imported, not inside a function, and no lambdas"
            ) from error
        self._start(num)
        with reserved_port() as port:
            for rank, pipe in enumerate(self._pipes[:num]):
                pipe.send((job, rank, num, port))
            return self._results(num, timeout)

    def _results(self, num: int, timeout: float) -> list[Any]:
        results: dict[int, tuple[bool, Any]] = {}
        pending = {self._pipes[r]: r for r in range(num)}
        while pending:
            ready = wait(list(pending), timeout)
            if not ready:
                self.close()
                raise RankError(f"ranks {sorted(pending.values())} did not finish within {timeout} s")
            for pipe in [p for p in pending if p in ready]:
                rank = pending.pop(pipe)
                try:
                    # By value: in shared memory, tensors need a server or a file handle each.
                    results[rank] = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    results[rank] = (False, f"rank {rank} died")
        failed = {r: text for r, (ok, text) in sorted(results.items()) if not ok}
        if failed:
            self.close()  # the processes' distributed state is unknown
            raise RankError("\n".join(f"rank {r}: {text}" for r, text in failed.items()))
        return [results[r][1] for r in range(num)]

    def close(self) -> None:
        """Ends the processes; the next job starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        atexit.unregister(self.close)

    def _start(self, num: int) -> None:
        atexit.register(self.close)
        context: Any = multiprocessing.get_context("spawn" if self._preload is None else "forkserver")
        if self._preload is not None:
            context.set_forkserver_preload([__name__, *self._preload])
        while len(self._processes) < num:
            ours, theirs = context.Pipe()
            # Not daemonic: loaders with workers have to be able to start processes of their own.
            # How those start is as in this process, not as the pool's own.
            method = multiprocessing.get_start_method(allow_none=True)
            arguments = (theirs, dict(os.environ), method, tuple(self._preload or ()))
            process = context.Process(target=_serve, args=arguments)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: Connection, environment: dict[str, str], start_method: str | None, modules: Sequence[str]) -> None:
    os.environ.clear()  # a forked process has the environment of the server, not that of the pool's program
    os.environ.update(environment)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_start_method(start_method, force=True)
    for module in modules:
        importlib.import_module(module)
    np.random.seed()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported stays, and makes no later collection longer
    while True:
        try:
            job, rank, num, port = pipe.recv()
        except (EOFError, OSError):
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
            WORLD_SIZE=str(num),
            LOCAL_WORLD_SIZE=str(num),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="januspipe-testing",
        )
        pipe.send_bytes(_answer(job))
        gc.collect()  # groups that a Trainer still refers to have threads, which wake a hundred times in a second


def _answer(job: bytes) -> bytes:
    """Returns in pickled form whether a job's function succeeded, and its result or the traceback."""
    try:
        function, args = pickle.loads(job)
    except Exception as error:
        hint = (
            "The ranks run in processes of their own, which import functions and classes by name: define them in a "
            "file that can be imported from a folder on sys.path"
        )
        return pickle.dumps((False, _told(error) + hint))
    dtype = torch.get_default_dtype()
    try:
        return pickle.dumps((True, function(*args)))
    except BaseException as error:
        return pickle.dumps((False, _told(error)))
    finally:
        torch.set_default_dtype(dtype)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _told(error: BaseException) -> str:
    """Returns the error, and where it was raised."""
    return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


@contextmanager
def reserved_port() -> Iterator[int]:
    """Reserves a free TCP port on loopback for the duration of the block.

    The port is below the ephemeral range. Binding the UDP port of the same number first keeps two processes from
    choosing the same one.
    """
    numbers = random.SystemRandom()
    while True:
        port = numbers.randrange(20_000, 32_000)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guard, socket.socket() as probe:
            try:
                guard.bind(("127.0.0.1", port))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the ranks' store has it
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            probe.close()
            yield port
            return
