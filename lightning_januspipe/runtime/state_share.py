"""Predicts what each level of sharded state takes on a rank, in bytes and in messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from lightning_januspipe.schedule.state_actions import ShardLevel

LEVELS: tuple[ShardLevel, ...] = get_args(ShardLevel)

# A level that shares more has to gain more than predictions are off by.
_WORTH_A_LEVEL = 0.01


@dataclass(frozen=True)
class StateShare:
    """Holds the bytes of the state of one stage on one of the ranks that hold it.

    Attributes:
        level: What these ranks share.
        num_ranks: Their number, D·G.
        in_phases: Parameters, gradients and optimizer state while phases run.
        in_reduction: The same, and the copy of the gradients that is sent, after the last phase.
        between: The same while the optimizer steps, without what it needs itself.
        sent: Bytes that the rank sends in a step.
        num_messages: Messages that the rank sends in a step, if collectives pass shards on in a ring.
    """

    level: ShardLevel
    num_ranks: int
    in_phases: float
    in_reduction: float
    between: float
    sent: float
    num_messages: int


def state_share(
    level: ShardLevel, num_ranks: int, parameters: float, state: float, accumulates: bool = False
) -> StateShare:
    """Returns what a level takes on a rank.

    Args:
        level: What the ranks that hold a stage share.
        num_ranks: The number of these ranks.
        parameters: Bytes of the stage's parameters; its gradients are as many.
        state: Bytes of the optimizer state of the whole stage.
        accumulates: Whether an optimizer step has several batches. Their gradients are then in ``.grad``, beside the
            sums of the present batch; those of shards are in these sums.
    """
    part = 1 / num_ranks
    kept = state if level == "none" else state * part
    own = parameters * part if level == "parameters" else 0.0  # the rank's own part, beside the gathered parameters
    gradients = 2 * parameters if accumulates and level == "none" else parameters
    in_phases = parameters + gradients + own + kept
    sent_copy = parameters if num_ranks > 1 else 0.0
    in_reduction = 2 * parameters + own + kept + sent_copy - (parameters if level == "parameters" else 0.0)
    between = own or parameters
    between += parameters if level == "none" else parameters * part
    # An all-reduce is a reduce-scatter and an all-gather; so each level sends the same.
    passes = 2 * (num_ranks - 1)
    return StateShare(level, num_ranks, in_phases, in_reduction, between + kept, passes * parameters * part, passes)


def levels_of(shard: ShardLevel | Literal["auto"], num_ranks: int, has_limit: bool) -> tuple[ShardLevel, ...]:
    """Returns what the ranks that hold a stage may share, the simplest first.

    Args:
        shard: What the user asks for.
        num_ranks: The number of these ranks; a single one shares nothing.
        has_limit: Whether there is a memory limit, within which "auto" chooses.
    """
    if num_ranks == 1:
        return ("none",)
    if shard != "auto":
        return (shard,)
    return LEVELS if has_limit else ("none",)


def fastest_level(seconds: Mapping[ShardLevel, float]) -> ShardLevel:
    """Returns the level with the shortest step; of levels that are about as fast, the one that shares least.

    Args:
        seconds: The step with each level that fits, the one that shares least first.
    """
    shortest = min(seconds.values())
    return next(level for level, time in seconds.items() if time <= shortest * (1 + _WORTH_A_LEVEL))
