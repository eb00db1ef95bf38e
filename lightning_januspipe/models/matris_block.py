"""Defines the interaction block of MatRIS-MoE: attention on the line graph and on the atoms' graph, then refinement.

Rows are the N atoms, the E directed and U undirected edges, and the A angles of a batch. Whatever is summed over edges
or angles has their envelope as a factor, so that the energy stays smooth where one of them appears.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_januspipe.experts import ElementExperts


@dataclass(frozen=True)
class Neighbors:
    """Says who is whose neighbour in a batch, and how much it counts.

    Attributes:
        species: (N,) species index of each atom.
        source: (E,) the atom that each directed edge begins at.
        target: (E,) the atom that each directed edge ends at.
        undirected: (E,) the undirected edge of each directed one.
        ends: (2, U) the two atoms of each undirected edge.
        arms: (2, A) the undirected edges of each angle; messages go from the second to the first.
        center: (A,) the atom of each angle.
        of_edges: (E,) envelope of the directed edges.
        of_undirected: (U,) envelope of the undirected edges.
        of_angles: (A,) envelope of the angles.
    """

    species: Tensor
    source: Tensor
    target: Tensor
    undirected: Tensor
    ends: tuple[Tensor, Tensor]
    arms: tuple[Tensor, Tensor]
    center: Tensor
    of_edges: Tensor
    of_undirected: Tensor
    of_angles: Tensor


@dataclass(frozen=True)
class Features:
    """Holds the features of a batch: ``atoms`` (N, F), undirected ``edges`` (U, F) and ``angles`` (A, F)."""

    atoms: Tensor
    edges: Tensor
    angles: Tensor


class GatedPerceptron(nn.Module):
    """Computes SiLU(norm(core)) · sigmoid(norm(gate)) of linear maps of its rows, as MatRIS does.

    Args:
        in_features: Width of the rows.
        out_features: Width of the results.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.core, self.gate = nn.Linear(in_features, out_features), nn.Linear(in_features, out_features)
        self.norm_core, self.norm_gate = nn.LayerNorm(out_features), nn.LayerNorm(out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (R, in_features) rows to (R, out_features)."""
        return F.silu(self.norm_core(self.core(x))) * self.norm_gate(self.gate(x)).sigmoid()


class SmoothAttention(nn.Module):
    """Sums messages by multi-head attention of their receivers, with weights that vanish with the envelope.

    The share of message m at its receiver is w_m exp(l_m) / (1 + Σ w exp(l)) in each head, with envelopes w and logits
    l. The 1 stands for no message at all: a receiver that loses its last message changes smoothly, too.

    Args:
        num_features: Width F of receivers and messages.
        num_heads: Number of heads, a divisor of F.
    """

    def __init__(self, num_features: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(num_features, num_features)
        self.key = nn.Linear(num_features, num_features)
        self.out = nn.Linear(num_features, num_features, bias=False)

    def forward(self, receivers: Tensor, messages: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Returns what each receiver gets.

        Args:
            receivers: (R, F) features.
            messages: (M, F) messages.
            index: (M,) the receiver of each message.
            weight: (M,) envelopes, at least 0.

        Returns:
            (R, F), zero where there are no messages.
        """
        heads = messages.unflatten(1, (self.num_heads, -1))
        products = self.query(receivers)[index] * self.key(messages)
        logits = products.unflatten(1, (self.num_heads, -1)).sum(-1) / heads.shape[-1] ** 0.5
        # All terms are divided by exp(largest), on which the shares do not depend; so it needs no derivative.
        largest = torch.zeros_like(receivers[:, : self.num_heads], dtype=logits.dtype).scatter_reduce(
            0, index[:, None].expand(-1, self.num_heads), logits.detach(), "amax"
        )
        powers = weight[:, None] * (logits - largest[index]).exp()
        total = (-largest).exp() + torch.zeros_like(largest, dtype=powers.dtype).index_add(0, index, powers)
        shared = (heads * (powers / total[index])[:, :, None]).flatten(1)
        return self.out(torch.zeros_like(receivers, dtype=shared.dtype).index_add(0, index, shared))


class MatRISBlock(nn.Module):
    """Updates atoms, edges and angles once.

    The messages of the atoms' graph are made, before attention, by the experts of the receiving atom's element, and the
    atoms are updated, after attention, by the experts of their own element. Each residual has a learned scale for
    each channel.

    Args:
        num_species: Number of species.
        num_features: Width F.
        num_heads: Number of heads of attention.
        num_experts: Number of experts of each of the two mixtures.
        top_k: Number of experts of each element.
        expert_features: Width of the experts.
        is_last: Whether edges and angles are not read any more, and so are not refined.
    """

    def __init__(
        self,
        num_species: int,
        num_features: int,
        num_heads: int,
        num_experts: int,
        top_k: int,
        expert_features: int,
        is_last: bool,
    ) -> None:
        super().__init__()

        def experts(num_inputs: int) -> ElementExperts:
            return ElementExperts(
                num_species,
                num_experts,
                num_inputs * num_features,
                num_features,
                top_k,
                has_shared=True,
                hidden_features=expert_features,
                bias=False,
            )

        self.norm_atoms, self.norm_edges = nn.LayerNorm(num_features), nn.LayerNorm(num_features)
        self.line_messages = GatedPerceptron(4 * num_features, num_features)
        self.line_attention = SmoothAttention(num_features, num_heads)
        self.atom_messages = experts(3)
        self.atom_attention = SmoothAttention(num_features, num_heads)
        self.atom_update = experts(2)
        self.scale_line, self.scale_atom = (
            nn.Parameter(torch.empty(num_features)),
            nn.Parameter(torch.empty(num_features)),
        )
        self.refine_angles = self.refine_edges = None
        if not is_last:
            self.refine_angles = GatedPerceptron(4 * num_features, num_features)
            self.refine_edges = GatedPerceptron(3 * num_features, num_features)
            self.scale_angles = nn.Parameter(torch.empty(num_features))
            self.scale_edges = nn.Parameter(torch.empty(num_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Sets the factors of all updates to 0.5."""
        for name, parameter in self.named_parameters(recurse=False):
            assert name.startswith("scale_")
            nn.init.constant_(parameter, 0.5)

    def forward(self, features: Features, near: Neighbors) -> Features:
        """Returns the updated features."""
        atoms, edges, angles = features.atoms, features.edges, features.angles
        messages = self.line_messages(self._of_angles(atoms, edges, angles, near))
        edges = edges + self.scale_line * self.line_attention(edges, messages, near.arms[0], near.of_angles)

        normed = self.norm_atoms(atoms)
        of_edges = torch.cat([normed[near.target], normed[near.source], self.norm_edges(edges)[near.undirected]], 1)
        messages = self.atom_messages(of_edges, near.species[near.target])
        received = self.atom_attention(normed, messages, near.target, near.of_edges)
        atoms = atoms + self.scale_atom * self.atom_update(torch.cat([normed, received], 1), near.species)

        if self.refine_angles is None or self.refine_edges is None:
            return Features(atoms, edges, angles)
        angles = angles + self.scale_angles * self.refine_angles(self._of_angles(atoms, edges, angles, near))
        here, there = (atoms[end] for end in near.ends)
        refined = self.refine_edges(torch.cat([here + there, here * there, edges], 1))
        edges = edges + self.scale_edges * near.of_undirected[:, None] * refined
        return Features(atoms, edges, angles)

    def _of_angles(self, atoms: Tensor, edges: Tensor, angles: Tensor, near: Neighbors) -> Tensor:
        return torch.cat([edges[near.arms[0]], edges[near.arms[1]], angles, atoms[near.center]], 1)
