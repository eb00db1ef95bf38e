"""Prints the bytes that each of four ranks holds of a small MatRIS-MoE, with 1, 2 and 4 ranks that share experts."""

from __future__ import annotations

import expert_workers
from pools import pool_of


def main() -> None:
    """Trains for two steps with each number of ranks."""
    with pool_of(4) as pool:
        for size in (1, 2, 4):
            strategy = {"pipeline_size": 1, "data_size": 4, "num_microbatches": 1, "expert_size": size}
            found = pool.run(expert_workers.bytes_of_experts, strategy, world_size=4)
            print(size, *[f"{of_rank['experts']:,} + {of_rank['others']:,}" for of_rank in found], sep=" | ")


if __name__ == "__main__":
    main()
