"""Prints the bytes that each of four ranks holds of a small MatRIS-MoE between steps, by `shard` and `expert_size`."""

from __future__ import annotations

from itertools import product

import expert_workers
from pools import pool_of


def main() -> None:
    """Trains for two steps with each number of ranks."""
    with pool_of(4) as pool:
        for level, size in product(("none", "optimizer", "parameters"), (1, 2, 4)):
            strategy = {"pipeline_size": 1, "data_size": 4, "num_microbatches": 1, "expert_size": size, "shard": level}
            found = pool.run(expert_workers.bytes_of_experts, strategy, world_size=4)
            print(level, size, *[f"{of_rank['experts']:,} + {of_rank['others']:,}" for of_rank in found], sep=" | ")


if __name__ == "__main__":
    main()
