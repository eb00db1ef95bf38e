"""Counts what a GPU does in a training step: kernels, and the bytes that phases move against the memory's bandwidth."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

_PHASES = ("FE", "FF", "BF", "BE")
_COPIED = 1 << 30  # bytes


class GpuCounts:
    """Holds what was counted in one step of a stage without deferred weights.

    Attributes:
        num_kernels: Kernels of the step, without copies between host and device.
        bytes: Bytes that the kernels of each compiled phase read and write, as inductor counts them for the example
            call, in the order of the phases.
        seconds: Time of each phase.
        bandwidth: Bytes per second that a copy on the device reads and writes.
    """

    def __init__(self) -> None:
        self.num_kernels = 0
        self.bytes: list[int] = []
        self.seconds: dict[str, float] = {}
        self.bandwidth = 0.0
        self._profile: Any = None

    def begin(self) -> None:
        """Starts to count the kernels of a step."""
        import torch

        self.bandwidth = copy_bandwidth()
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self._profile.__enter__()

    def end(self) -> None:
        """Ends the step."""
        import torch

        torch.cuda.synchronize()
        self._profile.__exit__(None, None, None)
        names = [e.name for e in self._profile.events() if str(e.device_type).endswith("CUDA")]
        self.num_kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in names)
        self._profile = None

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Times an action of the executor; the GPU has nothing else to do meanwhile."""
        import torch

        torch.cuda.synchronize()
        began = time.perf_counter()
        yield
        torch.cuda.synchronize()
        self.seconds[name.removeprefix("[JanusPipe]").split()[0]] = time.perf_counter() - began

    def describe(self) -> str:
        """Returns the longest phase, and the share of the bandwidth that it reaches; empty without compiled phases."""
        if not self.seconds or len(self.bytes) != len(_PHASES):
            return ""
        phase = max(_PHASES, key=self.seconds.__getitem__)
        share = self.bytes[_PHASES.index(phase)] / self.seconds[phase] / self.bandwidth
        return f"{phase}, {100 * share:.0f} %"


@contextmanager
def phase_bytes(counts: GpuCounts) -> Iterator[None]:
    """Notes the bytes that the kernels of each phase move; phases are compiled inside the block, in this process."""
    from torch._inductor import metrics

    from lightning_januspipe.compiled import compiler
    from lightning_januspipe.compiled.artifacts import ArtifactCache

    compile_graph = compiler.compile_graph

    def counted(graph: Any, mode: Any) -> Any:
        before = metrics.num_bytes_accessed
        compiled = compile_graph(graph, mode)
        counts.bytes.append(metrics.num_bytes_accessed - before)
        return compiled

    no_cache = mock.patch.object(compiler, "artifact_cache", return_value=ArtifactCache(None))
    with mock.patch.object(compiler, "compile_graph", counted), no_cache:
        yield


def copy_bandwidth() -> float:
    """Returns the bytes per second that a copy of a gigabyte on the GPU reads and writes."""
    import torch

    source = torch.empty(_COPIED, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(5):
        target.copy_(source)
    torch.cuda.synchronize()
    return 5 * 2 * _COPIED / (time.perf_counter() - began)
