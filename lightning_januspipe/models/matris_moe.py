"""Defines MatRIS-MoE: the invariant trunk of MatRIS with mixtures of experts by element, after Janus.

Known of MatRIS-MoE (Janus, arXiv 2604.15821) are the trunk, that two mixtures of experts stand in each block, routing
by element, the embeddings of task, charge and spin, and total and active numbers of parameters with their top-k. The
number and width of the experts, their gates, and the expert that all elements share are choices of this package.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.experts import ElementExperts
from lightning_januspipe.models.conservative import (
    AtomicEnergies,
    ConservativePotential,
    PerTask,
    check_species,
    check_tasks,
    per_species_values,
)
from lightning_januspipe.models.line_graph import line_graph
from lightning_januspipe.models.matris_block import Features, MatRISBlock, Neighbors
from lightning_januspipe.models.radial import BesselBasis, PolynomialCutoff

Size = Literal["S", "M", "L", "tiny"]

ELEMENTS = re.findall(
    "[A-Z][a-z]?",
    "HHeLiBeBCNOFNeNaMgAlSiPSClArKCaScTiVCrMnFeCoNiCuZnGaGeAsSeBrKrRbSrYZrNbMoTcRuRhPdAgCdInSnSbTeIXeCsBaLaCePrNdPmSm"
    "EuGdTbDyHoErTmYbLuHfTaWReOsIrPtAuHgTlPbBiPoAtRnFrRaAcThPaUNpPu",
)
"""The elements from hydrogen to plutonium."""

SIZES: dict[str, dict[str, int]] = {
    "S": {"num_experts": 24, "top_k": 4, "expert_features": 4992},
    "M": {"num_experts": 36, "top_k": 8, "expert_features": 7488},
    "L": {"num_experts": 64, "top_k": 16, "expert_features": 19456},
    "tiny": {
        **{"num_blocks": 2, "num_features": 16, "num_heads": 2},
        **{"num_experts": 4, "top_k": 2, "expert_features": 16},
    },
}

_ENVELOPE_EXPONENT = 8
_NUM_WAVES = 8
_LONGEST_WAVE = 64.0
"""Charges and spins up to this are far apart in their embedding."""


class _NumberEmbedding(nn.Module):
    """Embeds an integer of any size by sines and cosines of several wavelengths, and a linear map without a bias."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        lengths = _LONGEST_WAVE ** (torch.arange(1, _NUM_WAVES + 1, dtype=torch.get_default_dtype()) / _NUM_WAVES)
        self.register_buffer("frequencies", 2 * torch.pi / lengths, persistent=False)
        self.linear = nn.Linear(2 * _NUM_WAVES, num_features, bias=False)

    def forward(self, numbers: Tensor) -> Tensor:
        """Maps (B,) integers to (B, num_features); zero is mapped to zero."""
        frequencies = self.get_buffer("frequencies")
        phases = numbers.to(frequencies.dtype)[:, None] * frequencies
        result: Tensor = self.linear(torch.cat([phases.sin(), phases.cos() - 1], 1))
        return result


class MatRISEnergy(AtomicEnergies):
    """Computes energies from positions and strain; holds the weights of :class:`MatRISMoE`.

    For arguments and errors see :class:`MatRISMoE`.
    """

    def __init__(
        self,
        species: Sequence[str],
        cutoff: float,
        angle_cutoff: float,
        num_blocks: int,
        num_features: int,
        num_heads: int,
        num_experts: int,
        top_k: int,
        expert_features: int,
        num_radial: int,
        tasks: Sequence[str],
        per_species_scale: PerTask,
        per_species_shift: PerTask,
        trainable_scale_shift: bool,
    ) -> None:
        super().__init__(species, cutoff, tasks)
        for name, value in (("num_blocks", num_blocks), ("num_heads", num_heads), ("expert_features", expert_features)):
            if value < 1:
                raise ValueError(f"{name}={value}; expected at least 1")
        if num_features < 1 or num_features % num_heads:
            raise ValueError(f"num_features={num_features}; expected a positive multiple of num_heads={num_heads}")
        if not 0 < angle_cutoff <= cutoff:
            raise ValueError(
                f"angle_cutoff={angle_cutoff} Å; expected a positive length up to cutoff={cutoff} Å, because the arms "
                "of angles are edges"
            )
        self.angle_cutoff = float(angle_cutoff)
        self.basis = BesselBasis(num_radial, cutoff, _ENVELOPE_EXPONENT, trainable=True)
        self.envelope = PolynomialCutoff(cutoff, _ENVELOPE_EXPONENT)
        self.angle_envelope = PolynomialCutoff(angle_cutoff, _ENVELOPE_EXPONENT)
        self.embed_species = nn.Embedding(len(self.species), num_features)
        self.embed_task = nn.Embedding(len(self.tasks), num_features)
        self.embed_charge = _NumberEmbedding(num_features)
        self.embed_spin = _NumberEmbedding(num_features)
        self.embed_edges = nn.Linear(num_radial, num_features, bias=False)
        self.num_waves = num_radial
        self.embed_angles = nn.Linear(num_radial, num_features, bias=False)
        self.blocks = nn.ModuleList(
            MatRISBlock(
                len(self.species),
                num_features,
                num_heads,
                num_experts,
                top_k,
                expert_features,
                is_last=index == num_blocks - 1,
            )
            for index in range(num_blocks)
        )
        self.readout = nn.Sequential(
            nn.LayerNorm(num_features),
            nn.Linear(num_features, num_features),
            nn.SiLU(),
            nn.Linear(num_features, 1, bias=False),
        )
        self.add_scale_and_shift(per_species_scale, per_species_shift, trainable_scale_shift)

    @override
    def unscaled_energies(self, batch: Mapping[str, Tensor], positions: Tensor, strain: Tensor) -> Tensor:
        """Evaluates the energies (N,) of the atoms before scale and shift."""
        species, edge_index = batch[keys.SPECIES], batch[keys.EDGE_INDEX]
        source, target = edge_index.unbind(0)
        lengths, directions = self.edges(batch, positions, strain)
        is_near = lengths.detach() < self.angle_cutoff
        graph = line_graph(edge_index, batch[keys.CELL_SHIFTS], is_near, species.shape[0])
        of_edges, near = self.envelope(lengths), self.angle_envelope(lengths)
        neighbors = Neighbors(
            species=species,
            source=source,
            target=target,
            undirected=graph.undirected,
            ends=(source[graph.directed], target[graph.directed]),
            arms=(graph.undirected[graph.edge], graph.undirected[graph.other]),
            center=target[graph.edge],
            of_edges=of_edges,
            of_undirected=of_edges[graph.directed],
            of_angles=near[graph.edge] * near[graph.other],
        )
        cosines = (directions[graph.edge] * directions[graph.other]).sum(-1)
        features = Features(
            self.embed_species(species) + self.embed_structures(batch)[batch[keys.BATCH]],
            self.embed_edges(self.basis(lengths)[graph.directed]),
            self.embed_angles(_cosines_of_multiples(cosines, self.num_waves)),
        )
        for block in self.blocks:
            features = block(features, neighbors)
        energies: Tensor = self.readout(features.atoms).squeeze(-1)
        return energies

    def embed_structures(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Embeds task, charge and spin of each structure, which are 0 where a batch does not tell them, in (B, F)."""
        nothing = torch.zeros_like(batch[keys.CELL][:, 0, 0], dtype=torch.int64)
        task, charge, spin = (batch.get(name, nothing) for name in (keys.TASK, keys.CHARGE, keys.SPIN))
        embedded: Tensor = self.embed_task(task) + self.embed_charge(charge) + self.embed_spin(spin)
        return embedded


def _cosines_of_multiples(cosine: Tensor, num: int) -> Tensor:
    """Returns cos(n θ), (A, num) for n = 0 … num - 1, as polynomials of cos θ, which are smooth at straight angles."""
    found = [torch.ones_like(cosine), cosine]
    while len(found) < num:
        found.append(2 * cosine * found[-1] - found[-2])
    return torch.stack(found[:num], 1)


class MatRISMoE(ConservativePotential):
    """Predicts energy, forces and stress by attention on atoms and angles, with experts by element.

    The trunk is that of MatRIS: features of atoms, edges and angles, and attention on the atoms' graph and on the line
    graph, whose nodes are edges and whose edges are angles. In each block one mixture of experts makes the messages,
    and another one updates the atoms. An atom's element alone chooses its experts, so that the energy is smooth along
    trajectories. Structures of several tasks (data sets, levels of theory), charges and spins are told apart by
    embeddings: batches may have ``task``, ``charge`` and ``spin`` (see :mod:`lightning_januspipe.keys`). Each task has
    energies of atoms of its own.

    Args:
        species: Chemical symbols; the index of a symbol is its species index in a batch.
        cutoff: Cutoff radius of edges in Å.
        angle_cutoff: Cutoff radius in Å of the edges between which there are angles.
        num_blocks: Number of blocks.
        num_features: Width of the features of atoms, edges and angles.
        num_heads: Number of heads of attention, a divisor of ``num_features``.
        num_experts: Number of experts of each of the two mixtures of a block.
        top_k: Number of experts of each element.
        expert_features: Width of the experts.
        num_radial: Number of learned radial functions, and of cosines of angles.
        tasks: Names of the tasks; their order is that of the task index.
        per_species_scale: Factor of atomic energies in eV: one number, a number per species, or a mapping from symbols;
            or a mapping from tasks to these.
        per_species_shift: Energy in eV that each atom adds, in the same forms.
        trainable_scale_shift: Train scale and shift.

    Attributes:
        conditions: Keys of a batch that the potential reads beside the structures.

    Raises:
        ValueError: An argument is out of its range.

    Example:
        >>> potential = MatRISMoE.from_size("tiny", species=["Cu", "Au"]).eval()
        >>> batch = {
        ...     "positions": torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 2.5]]),
        ...     "species": torch.tensor([0, 1]),
        ...     "edge_index": torch.tensor([[0, 1], [1, 0]]),
        ...     "cell_shifts": torch.zeros(2, 3),
        ...     "cell": torch.zeros(1, 3, 3),
        ...     "batch": torch.zeros(2, dtype=torch.long),
        ... }
        >>> {name: tuple(value.shape) for name, value in potential(batch).items()}
        {'energy': (1,), 'forces': (2, 3), 'stress': (1, 3, 3)}

    In a recipe::

        potential:
          class_path: lightning_januspipe.models.MatRISMoE
          init_args: {num_blocks: 2, num_features: 32, num_heads: 4, num_experts: 4, top_k: 2, expert_features: 32}
    """

    def __init__(
        self,
        species: Sequence[str],
        cutoff: float = 6.0,
        angle_cutoff: float = 4.0,
        num_blocks: int = 6,
        num_features: int = 128,
        num_heads: int = 8,
        num_experts: int = 8,
        top_k: int = 2,
        expert_features: int = 128,
        num_radial: int = 7,
        tasks: Sequence[str] = ("default",),
        per_species_scale: PerTask = 1.0,
        per_species_shift: PerTask = 0.0,
        trainable_scale_shift: bool = False,
    ) -> None:
        check_species(species)
        check_tasks(tasks)
        arguments: dict[str, Any] = {
            "species": list(species),
            "cutoff": float(cutoff),
            "angle_cutoff": float(angle_cutoff),
            "num_blocks": num_blocks,
            "num_features": num_features,
            "num_heads": num_heads,
            "num_experts": num_experts,
            "top_k": top_k,
            "expert_features": expert_features,
            "num_radial": num_radial,
            "tasks": list(tasks),
            "per_species_scale": per_species_values("per_species_scale", per_species_scale, species, tasks),
            "per_species_shift": per_species_values("per_species_shift", per_species_shift, species, tasks),
            "trainable_scale_shift": trainable_scale_shift,
        }
        super().__init__(MatRISEnergy(**arguments))
        self.arguments = arguments
        self.species, self.tasks = tuple(species), tuple(tasks)
        self.conditions = (keys.TASK, keys.CHARGE, keys.SPIN)
        self.cutoff, self.angle_cutoff = float(cutoff), float(angle_cutoff)

    @classmethod
    def from_size(cls, size: Size, species: Sequence[str] = ELEMENTS, **changes: Any) -> MatRISMoE:
        """Builds a potential of a published size.

        Args:
            size: ``"S"`` (1.09 billion parameters, 0.19 billion of them active for each atom), ``"M"`` (2.47, 0.56),
                ``"L"`` (11.5, 2.89), or ``"tiny"`` for tests.
            species: Chemical symbols; by default the elements from hydrogen to plutonium.
            changes: Further arguments of the class, and those that are to differ from the size's.

        Raises:
            ValueError: There is no such size.
        """
        if size not in SIZES:
            raise ValueError(f"size={size!r}; expected one of {get_args(Size)}")
        return cls(species, **{**SIZES[size], **changes})

    def num_parameters(self) -> tuple[int, int]:
        """Returns the number of parameters, and of those that are active for one element."""
        total = sum(parameter.numel() for parameter in self.parameters())
        mixtures = [module for module in self.modules() if isinstance(module, ElementExperts)]
        return total, total - sum(mixture.num_inactive() for mixture in mixtures)
