"""Names what goes in and out of the phases of a stage, by kind: the contract between the joint graph and the engine."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

from lightning_januspipe.schedule.actions import Phase


class Kind(Enum):
    """Names the kind of an input or output, with its symbol in the equations of the four phases."""

    SIZE = "size"
    VALUE = "θ and x"
    BOUNDARY_IN = "h_in"
    FORCE_SEED = "g_out"
    FORCE_COTANGENT = "u_in"
    DERIVATIVE_COTANGENT = "v"
    BOUNDARY_COTANGENT = "λ_out"
    OBSERVABLE_COTANGENT = "Ē"
    BOUNDARY_OUT = "h_out"
    OBSERVABLE = "y"
    DERIVATIVE = "p"
    BOUNDARY_GRADIENT = "g_in"
    SEED_COTANGENT = "u_out"
    BOUNDARY_IN_COTANGENT = "λ_in"
    PARAMETER_GRADIENT = "θ̄"


class Port(NamedTuple):
    """Names one input or output of a stage's phases by its kind, and by its position among those of the kind."""

    kind: Kind
    position: int


GIVEN = {
    Kind.SIZE: Phase.FE,
    Kind.VALUE: Phase.FE,
    Kind.BOUNDARY_IN: Phase.FE,
    Kind.FORCE_SEED: Phase.FF,
    Kind.FORCE_COTANGENT: Phase.BF,
    Kind.DERIVATIVE_COTANGENT: Phase.BF,
    Kind.BOUNDARY_COTANGENT: Phase.BE,
    Kind.OBSERVABLE_COTANGENT: Phase.BE,
}
"""The phase with which an input arrives."""

WANTED = {
    Kind.BOUNDARY_OUT: Phase.FE,
    Kind.OBSERVABLE: Phase.FE,
    Kind.DERIVATIVE: Phase.FF,
    Kind.BOUNDARY_GRADIENT: Phase.FF,
    Kind.SEED_COTANGENT: Phase.BF,
    Kind.BOUNDARY_IN_COTANGENT: Phase.BE,
}
"""The phase that has to return an output; a parameter gradient is returned as soon as it is complete."""

FREE = (Kind.SIZE, Kind.VALUE)
"""Inputs that are at hand in every phase: parameters, buffers and the batch are held anyway."""
