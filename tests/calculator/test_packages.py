"""What adapters of other packages need none of the packages for."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk

from lightning_januspipe.calculator import SkinNeighborList
from lightning_januspipe.calculator.packages.of_matris import paired_line_graph
from lightning_januspipe.calculator.skin import Edges


@pytest.mark.parametrize("missing", [None, 7])
def test_edges_without_their_opposite_are_left_out(missing: int | None) -> None:
    edges = SkinNeighborList(3.0).edges(bulk("Cu", cubic=True))
    kept = np.arange(edges.edge_index.shape[1]) != missing
    found, graph = paired_line_graph(Edges(edges.edge_index[:, kept], *(x[kept] for x in edges[1:])), 4, 3.0)
    assert found.edge_index.shape[1] == 48 - 2 * (missing is not None)
    assert (np.bincount(graph.undirected.numpy()) == 2).all()
