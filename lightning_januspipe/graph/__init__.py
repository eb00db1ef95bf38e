"""Shards the atoms of one micro-batch over several ranks, with exchanges that can be differentiated twice."""

from lightning_januspipe.graph.axis import GraphAxis, GraphGroup, Replica
from lightning_januspipe.graph.collectives import (
    collect_rows,
    count_once,
    gather_halo,
    replicate,
    sum_halo,
    sum_over_ranks,
)
from lightning_januspipe.graph.exchange import Exchange
from lightning_januspipe.graph.insert_exchanges import shard_captured
from lightning_januspipe.graph.owners_in_loader import OwnersInLoader
from lightning_januspipe.graph.partition import halo_size, partition_atoms
from lightning_januspipe.graph.shard_explicit import with_halo
from lightning_januspipe.graph.sharded_potential import ShardedPotential
from lightning_januspipe.graph.sharding import call_tensors, shard_potential, verify_sharding
from lightning_januspipe.graph.shards import Shard, make_shards, rows_read, whole
from lightning_januspipe.graph.verify_explicit import verify_explicit_sharding

__all__ = [
    "Exchange",
    "GraphAxis",
    "GraphGroup",
    "OwnersInLoader",
    "Replica",
    "Shard",
    "ShardedPotential",
    "call_tensors",
    "collect_rows",
    "count_once",
    "gather_halo",
    "halo_size",
    "make_shards",
    "partition_atoms",
    "replicate",
    "rows_read",
    "shard_captured",
    "shard_potential",
    "sum_halo",
    "sum_over_ranks",
    "verify_explicit_sharding",
    "verify_sharding",
    "whole",
    "with_halo",
]
