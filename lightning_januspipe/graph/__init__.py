"""Atoms of one micro-batch on several ranks: who owns which rows, and exchanges that can be differentiated twice."""

from lightning_januspipe.graph.axis import GraphAxis, GraphGroup, Replica, division_of
from lightning_januspipe.graph.collectives import (
    Exchange,
    collect_rows,
    count_once,
    gather_halo,
    replicate,
    sum_halo,
    sum_over_ranks,
)
from lightning_januspipe.graph.explicit import with_halo
from lightning_januspipe.graph.insert_exchanges import Localized, localize
from lightning_januspipe.graph.owners_in_loader import OwnersAhead
from lightning_januspipe.graph.partition import halo_size, partition_atoms
from lightning_januspipe.graph.shards import Shard, make_shards, rows_read, whole
from lightning_januspipe.graph.verify_captured import call_tensors, prove_division
from lightning_januspipe.graph.verify_explicit import prove_together

__all__ = [
    "Exchange",
    "GraphAxis",
    "GraphGroup",
    "Localized",
    "OwnersAhead",
    "Replica",
    "Shard",
    "call_tensors",
    "collect_rows",
    "count_once",
    "division_of",
    "gather_halo",
    "halo_size",
    "localize",
    "make_shards",
    "partition_atoms",
    "prove_division",
    "prove_together",
    "replicate",
    "rows_read",
    "sum_halo",
    "sum_over_ranks",
    "whole",
    "with_halo",
]
