"""Runs schedules on emulated devices: with the real executor, real messages, and phases that sleep.

A sleeping rank needs no core, so a pipeline of many ranks runs in full length on a machine with a few cores. The rest
of a step beside its phases is the runtime: the executor, the messages, the waiting of one rank for another. So the
emulation measures the runtime, and how true the simulated times of schedules are.

Pipelines run alone (:func:`emulate`) or as a mesh (:func:`emulate_mesh`), where each micro-batch takes a time of its
own, graph ranks meet in its phases, and replicas meet at the end of the step.

Every tensor that a phase makes is labelled with its origin, and every phase checks the labels of its inputs: a message
that reached the wrong action ends the run.
"""

from lightning_januspipe.bench.emulate.emulated_mesh import EmulatedMesh, EmulatedStep, emulate_mesh
from lightning_januspipe.bench.emulate.emulated_stage import EmulatedStage, EmulationError
from lightning_januspipe.bench.emulate.mesh_rank import MeshWork, MicrobatchWork
from lightning_januspipe.bench.emulate.run import EmulatedRun, emulate

__all__ = [
    "EmulatedMesh",
    "EmulatedRun",
    "EmulatedStage",
    "EmulatedStep",
    "EmulationError",
    "MeshWork",
    "MicrobatchWork",
    "emulate",
    "emulate_mesh",
]
