"""Starts and ends a process that compiles stages while this one trains."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from lightning_januspipe.compiled.artifacts import StageSource
from lightning_januspipe.compiled.compile_process import OUTPUT, REQUEST, RESULT, CompileRequest, CompileResult
from lightning_januspipe.compiled.torch_internals import inductor_cache

NICENESS = 5
"""Training has the cores first. On a core that training uses all of, compiling has a quarter of the time."""

_START = (
    "import sys; sys.path[:] = sys.argv[2:]; from lightning_januspipe.compiled.compile_process import main; "
    "main(sys.argv[1])"
)


class BackgroundCompile:
    """Compiles stages in another process, which ends when this one does.

    Args:
        sources: what the stages are made from, by key.
        artifacts: the folder for what is compiled.
        inductor: the folder in which inductor keeps what it compiles; None for its own.
        num_workers: processes that may compile side by side.
        imports: modules that define operators of the sources.
        niceness: how much lower its priority is than that of this process, as ``os.nice`` has it.
    """

    def __init__(
        self,
        sources: Mapping[str, StageSource],
        artifacts: Path,
        inductor: Path | None,
        num_workers: int = 1,
        imports: tuple[str, ...] = (),
        niceness: int = NICENESS,
    ) -> None:
        self._keys = tuple(sources)
        self._folder = Path(tempfile.mkdtemp(prefix="januspipe-compile-"))
        packed = {key: pickle.dumps(source) for key, source in sources.items()}
        request = CompileRequest(packed, imports, artifacts, num_workers, niceness)
        (self._folder / REQUEST).write_bytes(pickle.dumps(request))
        paths = [path or os.getcwd() for path in sys.path]
        with inductor_cache(inductor), open(self._folder / OUTPUT, "wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(self._folder), *paths],
                stdin=subprocess.PIPE,  # it ends when this process does
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # signals of a terminal are this process's; its own group can be ended as one
            )
        self._end = weakref.finalize(self, _end, self._process, self._folder, os.getpid())

    def has_ended(self) -> bool:
        """Tells whether there is nothing more to wait for."""
        return not self._end.alive or self._process.poll() is not None

    def result(self) -> CompileResult:
        """Returns how compiling went, once it has ended."""
        try:
            found = pickle.loads((self._folder / RESULT).read_bytes())
            assert isinstance(found, CompileResult)
            return found
        except OSError:
            reason = f"the process that compiled it has ended with the exit code {self._process.poll()}"
            with suppress(OSError):
                lines = (self._folder / OUTPUT).read_text(encoding="utf-8", errors="replace").split("\n")
                reason = ": ".join([reason, *[line for line in lines if line.strip()][-1:]])
            return CompileResult(dict.fromkeys(self._keys, reason))

    def end(self) -> None:
        """Ends the process, if it still runs, with all that it has started, and removes its files."""
        self._end()


def _end(process: subprocess.Popen[bytes], folder: Path, owner: int) -> None:
    if os.getpid() != owner:  # a copy in a process that was forked, such as a worker of a loader
        return
    if process.poll() is None:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)
