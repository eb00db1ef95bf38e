"""Emulated devices: schedules run by the real executor with real messages, and phases that sleep.

A sleeping rank needs no core, so a pipeline of many ranks runs in full length on a machine with a few. What is left of
a step beside its phases is the runtime: the executor, the messages, the waiting of one rank for another. So this
measures the runtime, and how true the simulated times of schedules are.

Every tensor that a phase makes says where it comes from, and every phase checks what it gets: a message that reached
the wrong action ends the run.
"""

from lightning_januspipe.emulate.run import EmulatedRun, emulate
from lightning_januspipe.emulate.stage import EmulatedStage, EmulationError

__all__ = ["EmulatedRun", "EmulatedStage", "EmulationError", "emulate"]
