"""Prints the bytes that each of four ranks holds of a small MatRIS-MoE between steps, by `shard` and `expert_size`."""

from __future__ import annotations

from itertools import product
from typing import Any, get_args

import expert_workers
from pools import pool_of

from lightning_januspipe.expert_ranks import bounds_of
from lightning_januspipe.runtime.state_share import state_share
from lightning_januspipe.schedule.state_actions import ShardLevel

REPLICAS = 4
CASES: list[tuple[ShardLevel, int]] = list(product(get_args(ShardLevel), (1, 2, 4)))


def strategy_of(level: ShardLevel, expert_size: int) -> dict[str, Any]:
    """Returns the arguments of the strategy."""
    given = {"pipeline_size": 1, "data_size": REPLICAS, "num_microbatches": 1}
    return {**given, "expert_size": expert_size, "shard": level}


def predicted_bytes(level: ShardLevel, expert_size: int, rank: int, experts: float, others: float) -> dict[str, float]:
    """Returns the bytes of parameters, gradients and Adam's moments of one rank while the optimizer steps.

    Args:
        level: What the ranks share.
        expert_size: Number of ranks that share the experts, 2 or more.
        rank: The rank.
        experts: Bytes of the parameters of all experts.
        others: Bytes of all other parameters.
    """
    bounds = bounds_of(expert_workers.NUM_EXPERTS, expert_size)
    index = rank % expert_size
    own = experts * (bounds[index + 1] - bounds[index]) / expert_workers.NUM_EXPERTS
    owners = REPLICAS // expert_size
    # Owners of the same experts never share their parameters.
    of_experts = state_share("optimizer" if level != "none" and owners > 1 else "none", owners, own, 2 * own)
    of_others = state_share(level, REPLICAS, others, 2 * others)
    found = {"experts": of_experts.between, "others": of_others.between}
    return {**found, "all": sum(found.values())}


def main() -> None:
    """Trains for two steps with each level and number of ranks."""
    with pool_of(REPLICAS) as pool:
        for level, size in CASES:
            found = pool.run(expert_workers.bytes_of_experts, strategy_of(level, size), world_size=REPLICAS)
            others = max(of_rank["others"] for of_rank in found)
            experts = ", ".join(f"{of_rank['experts']:,}" for of_rank in found)
            most = max(of_rank["all"] for of_rank in found)
            print(f'| {size} | `"{level}"` | {experts} | {others:,} | {most:,} |', flush=True)


if __name__ == "__main__":
    main()
