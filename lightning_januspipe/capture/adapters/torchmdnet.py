"""Helps TorchMD-Net's models through capture: lengths and vectors of edges are computed by operations of torch.

``OptimizedDistance`` finds edges, their vectors and their lengths in one operation of the package, which a graph rank
cannot run for its own rows. The adapter keeps the pairs of atoms that it finds, and computes the rest from positions.
The gated output of the equivariant transformer branches on features, to leave out atoms whose features are zero.

TensorNet's kernels for messages read indices of atoms together with features. For graph ranks, operations of torch
take their place, which give the same numbers. The kernels that compute with rows alone stay: the kernel for norms has a
third in single precision, so that operations of torch would differ from it in the eighth digit.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.patches import patched, patched_package


class TorchMDNetAdapter(Adapter):
    """Adapts models with ``OptimizedDistance``, of TorchMD-Net 3.1."""

    def tracing(self, potential: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which edges are vectors between looked-up positions, without branches and padding.

        With several graph ranks, kernels that read indices of atoms are replaced too.
        """
        return _tracing(potential, self.graph_size)


@contextmanager
def _tracing(potential: nn.Module, graph_size: int) -> Iterator[None]:
    with _plain_edges(potential), _plain_messages(potential) if graph_size > 1 else nullcontext():
        yield


@contextmanager
def _plain_edges(potential: nn.Module) -> Iterator[None]:
    from torchmdnet.models.utils import GatedEquivariantBlock, OptimizedDistance

    with ExitStack() as stack:
        for part in potential.modules():
            if isinstance(part, GatedEquivariantBlock):
                stack.enter_context(patched(part, "forward", partial(_gated, part)))
            if hasattr(part, "static_shapes"):  # pads edges, for CUDA graphs, with those of an additional atom
                stack.enter_context(patched(part, "static_shapes", False))
            if isinstance(part, OptimizedDistance):
                stack.enter_context(patched(part, "resize_to_fit", True))
                stack.enter_context(patched(part, "forward", partial(_edges, part)))
        yield


def _edges(
    part: Any, pos: Tensor, batch: Tensor | None = None, box: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns (2, E) the atoms of each edge, (E,) its length, and (E, 3) its vector if the part returns vectors."""
    pairs, _, _ = type(part).forward(part, pos.detach(), batch, box)
    # The operation finds them in any order, and all ranks need the same one.
    pairs = pairs[:, torch.argsort(pairs[0].long() * pos.shape[0] + pairs[1])]
    first, second = pairs.long()
    vectors = pos[first] - pos[second]
    if box is not None or part.use_periodic:
        cell = (part.box if box is None else box).to(pos)
        if cell.dim() == 3:
            cell = cell[0] if batch is None or cell.shape[0] == 1 else cell[batch[first]]
        vectors = _nearest_image(vectors, cell)
    squares = vectors.square().sum(-1)
    is_zero = squares == 0  # as the operation, atoms at one place have no derivative
    lengths = torch.where(is_zero, 1.0, squares).sqrt().masked_fill(is_zero, 0.0)
    return pairs, lengths, vectors if part.return_vecs else None


def _nearest_image(vectors: Tensor, cell: Tensor) -> Tensor:
    """Returns (E, 3) vectors to the nearest periodic image.

    Args:
        vectors: (E, 3).
        cell: (3, 3) or (E, 3, 3), rows are lower-triangular cell vectors.
    """
    for axis in (2, 1, 0):
        repeats = torch.round(vectors[:, axis] / cell[..., axis, axis])
        vectors = vectors - repeats[:, None] * cell[..., axis, :]
    return vectors


@contextmanager
def _plain_messages(potential: nn.Module) -> Iterator[None]:
    """Replaces TensorNet's kernels for messages, where the package has them."""
    from torchmdnet.models import tensornet

    replaced = {
        "graph_transform": _pairs_and_sizes,
        "fn_tensornet_embedding_message_passing": _embedded,
        "fn_tensornet_interaction_message_passing": _interacting,
    }
    with ExitStack() as stack:
        if tensornet.OPT and any(isinstance(part, tensornet.TensorNet) for part in potential.modules()):
            for name, function in replaced.items():
                stack.enter_context(patched_package(tensornet, name, function, "torchmd-net 3.1"))
        yield


def _pairs_and_sizes(pairs: Tensor, num_atoms: int) -> tuple[Tensor | int, ...]:
    """Returns what takes the place of the kernels' sorted indices: twice the pairs of atoms, (2, E), and two sizes."""
    return (pairs.long(), num_atoms, num_atoms) * 2


def _embedded(directions: Tensor, weights: Tensor, pairs: Tensor, num_atoms: int) -> list[Tensor]:
    """Sums scalars, vectors and traceless tensors of edges into their first atoms, as the kernel does.

    Args:
        directions: (E, 3).
        weights: (E, 3, channels) of the scalar, the vector and the tensor of each edge.
        pairs: (2, E) atoms of each edge.
        num_atoms: N.

    Returns:
        (N, 1, channels), (N, 3, channels) and (N, 5, channels).
    """
    x, y, z = directions.unbind(1)
    mean = directions.square().sum(1) / 3
    parts = [torch.ones_like(x)], [z, -y, x], [x * x - mean, x * y, x * z, y * y - mean, y * z]
    edges = [torch.stack(part, 1)[..., None] * weights[:, i, None] for i, part in enumerate(parts)]
    return [e.new_zeros(num_atoms, *e.shape[1:]).index_add(0, pairs[0], e) for e in edges]


def _interacting(
    scalars: Tensor, vectors: Tensor, tensors: Tensor, weights: Tensor, pairs: Tensor, *_: Any
) -> list[Tensor]:
    """Sums weighted features of edges' first atoms into their second atoms; shapes are those of :func:`_embedded`."""
    messages = [x[pairs[0]] * weights[:, i, None] for i, x in enumerate((scalars, vectors, tensors))]
    return [
        torch.zeros_like(x).index_add(0, pairs[1], m)
        for x, m in zip((scalars, vectors, tensors), messages, strict=True)
    ]


def _gated(part: Any, x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the scalars and vectors of a gated block; vectors that are zero have no derivative by their length."""
    vectors = part.vec1_proj(v)
    is_zero = (vectors == 0).flatten(1).all(1)
    lengths = torch.norm(torch.where(is_zero[:, None, None], 1.0, vectors), dim=-2).masked_fill(is_zero[:, None], 0.0)
    scalars, gates = torch.split(part.update_net(torch.cat([x, lengths], -1)), part.out_channels, -1)
    return scalars if part.act is None else part.act(scalars), gates.unsqueeze(1) * part.vec2_proj(v)
