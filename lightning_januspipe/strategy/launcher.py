"""Starts the other ranks of a machine as scripts for the Trainer, watches them, and leaves none behind."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from torch._C._distributed_c10d import TCPStore
from torch.distributed.distributed_c10d import PrefixStore, Store, default_pg_timeout

import __main__
from lightning_januspipe.strategy.environment import check_script, listen

LOOPBACK = "127.0.0.1"

GRACE = 15.0
"""Seconds that rank 0 has to end by itself when another rank has failed, as ranks try to save a checkpoint first."""

LEAVE = 8.0
"""Seconds that the other ranks have to end by themselves when rank 0 has failed."""


class RankProcesses:
    """Starts the further ranks of a machine. The class that a Trainer gets also derives from Lightning's launcher.

    The store of ranks on one machine listens on loopback only, on a port that is bound before any process is started.

    Attributes:
        store_listener: The file descriptor on which the store listens; None where the store binds its port itself.
        has_joined: Whether this rank has met the others.
    """

    cluster_environment: Any
    num_processes: int
    num_nodes: int
    procs: list[subprocess.Popen[bytes]]
    _call_children_scripts: Callable[[], None]

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)  # Lightning's: the cluster environment, the processes of a machine, the machines
        self.store_listener: int | None = None
        self._store: Store | None = None
        self.has_joined = False
        self._has_failed = False

    def launch(self, function: Callable[..., Any], *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        """Starts the other ranks, once, then calls a function.

        Raises:
            ValueError: The script cannot be run again, or the port is in use.
        """
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            check_script(__main__, sys.argv)
            self._reserve_port()
            self._call_children_scripts()
            atexit.register(self.end_all)
            threading.Thread(target=self._watch, daemon=True, name="januspipe-ranks").start()
        try:
            return function(*args, **kwargs)
        except BaseException:
            self._has_failed = True
            raise

    def _reserve_port(self) -> None:
        is_plain = type(self.cluster_environment).__name__ == "LightningEnvironment"
        port = int(os.environ.get("MASTER_PORT") or os.environ.get("STANDALONE_PORT") or 0)
        if self.num_nodes == 1 and is_plain:
            listener = listen(LOOPBACK, port)
            os.environ.update(MASTER_ADDR=LOOPBACK, MASTER_PORT=str(listener.getsockname()[1]))
            self.store_listener = listener.detach()
        elif port and self.cluster_environment.node_rank() == 0:
            listen("", port).close()

    def store(self, world_size: int) -> Store:
        """Returns the store in which the ranks of this machine meet; this rank serves it, as long as it runs."""
        if self._store is None:
            assert self.store_listener is not None
            server = TCPStore(
                LOOPBACK,
                int(os.environ["MASTER_PORT"]),
                world_size,
                is_master=True,
                timeout=default_pg_timeout,
                multi_tenant=True,  # as that of torch, which a later Trainer of this script asks for
                master_listen_fd=self.store_listener,
            )
            self._store = PrefixStore("default_pg", server)  # as the other ranks have it
        return self._store

    # -- the end -----------------------------------------------------------------------------------------------------

    def failed(self) -> list[str]:
        """Returns what ended the ranks that a signal has ended, else those with an exit status other than 0."""
        first = self.cluster_environment.node_rank() * self.num_processes + 1
        ends = [(rank, process.pid, process.poll() or 0) for rank, process in enumerate(self.procs, first)]
        has_signal = any(code < 0 for _, _, code in ends)  # then the others have ended because of that
        return [end_of(*end) for end in ends if (end[2] < 0 if has_signal else end[2] > 0)]

    def wait(self, seconds: float) -> None:
        """Waits for the other ranks of this machine to end, for some seconds at most."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(process.poll() is None for process in self.procs):
            time.sleep(0.05)

    def end_all(self) -> None:
        """Ends the other ranks of this machine if this one has failed; called when Python exits."""
        if self._has_failed:
            self.wait(LEAVE)
            self._kill()

    def _watch(self) -> None:
        """Ends all if a rank has failed and rank 0 does not notice, because it waits for that rank without an end."""
        while not self.failed():
            if all(process.returncode == 0 for process in self.procs):
                return
            time.sleep(0.2)
        time.sleep(GRACE if self.has_joined else 2.0)
        if not self._has_failed:
            print(*self.failed(), sep="\n", file=sys.stderr, flush=True)
            self._kill()
            sys.stdout.flush()
            os._exit(1)  # the main thread waits for ever, and would not see an exception

    def _kill(self) -> None:
        for process in self.procs:
            if process.poll() is None:
                process.kill()


def end_of(rank: int, pid: int, code: int) -> str:
    """Returns in words how the process of a rank has ended.

    Args:
        rank: The global rank.
        pid: The process.
        code: Its exit status, or minus the signal that has ended it.
    """
    if code > 0:
        return f"Rank {rank} (process {pid}) ended with exit status {code}; its own output has the cause."
    name = signal.Signals(-code).name if -code in list(signal.Signals) else "unknown"
    guess = ": out of memory?" if -code == signal.SIGKILL else "."
    return f"Rank {rank} (process {pid}) was ended by signal {-code}, {name}{guess}"


def script_launcher(lib: Any) -> type[RankProcesses]:
    """Returns the launcher for one Lightning."""
    base = lib.launcher._SubprocessScriptLauncher
    return type("ScriptLauncher", (RankProcesses, base), {"__doc__": RankProcesses.__doc__})
