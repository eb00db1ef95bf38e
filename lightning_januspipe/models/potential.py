"""Defines the reference potential: an equivariant message-passing energy, with forces and stress as derivatives."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.models.conservative import (
    AtomicEnergies,
    ConservativePotential,
    PerTask,
    check_species,
    check_tasks,
    per_species_values,
)
from lightning_januspipe.models.equivariant import Interaction
from lightning_januspipe.models.radial import BesselBasis
from lightning_januspipe.models.spherical import Coupling, SphericalHarmonics


class EnergyModel(AtomicEnergies):
    """Computes energies from positions and strain; holds the weights of :class:`EquivariantPotential`.

    For arguments and errors see :class:`EquivariantPotential`.
    """

    def __init__(
        self,
        species: Sequence[str],
        cutoff: float,
        num_layers: int = 4,
        num_features: int = 32,
        l_max: int = 1,
        num_bessel: int = 8,
        radial_hidden: Sequence[int] = (32, 32),
        cutoff_exponent: int = 6,
        trainable_bessel: bool = False,
        avg_num_neighbors: float = 16.0,
        per_species_scale: PerTask = 1.0,
        per_species_shift: PerTask = 0.0,
        trainable_scale_shift: bool = False,
        tasks: Sequence[str] = ("default",),
    ) -> None:
        super().__init__(species, cutoff, tasks)
        for name, value, least in (
            ("num_layers", num_layers, 1),
            ("num_features", num_features, 2),
            ("l_max", l_max, 0),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if avg_num_neighbors <= 0:
            raise ValueError(
                f"avg_num_neighbors must be positive, got {avg_num_neighbors}; "
                "give the average number of edges per atom of the training set"
            )
        self.num_features = num_features

        self.radial_basis = BesselBasis(num_bessel, cutoff, cutoff_exponent, trainable_bessel)
        self.harmonics = SphericalHarmonics(l_max)
        self.embedding = nn.Embedding(len(species), num_features)

        # Scalars go in and come out, so the first and the last layer couple fewer degrees.
        degrees = [0, *[l_max] * (num_layers - 1), 0]
        self.couplings = nn.ModuleDict()
        self.layers = nn.ModuleList()
        self.coupling_names: list[str] = []
        for l_in, l_out in pairwise(degrees):
            name = f"{l_in}_{l_out}"
            if name not in self.couplings:
                self.couplings[name] = Coupling(l_in, l_max, l_out)
            self.coupling_names.append(name)
            coupling = self.couplings[name]
            assert isinstance(coupling, Coupling)
            self.layers.append(
                Interaction(
                    l_in,
                    l_out,
                    coupling.paths_per_degree,
                    num_features,
                    len(species),
                    num_bessel,
                    radial_hidden,
                    avg_num_neighbors,
                )
            )
        readouts = [
            nn.Sequential(
                nn.Linear(num_features, num_features // 2), nn.SiLU(), nn.Linear(num_features // 2, 1, bias=False)
            )
            for _ in self.tasks
        ]
        if len(readouts) == 1:
            self.readout = readouts[0]
        else:
            self.readouts = nn.ModuleList(readouts)

        self.add_scale_and_shift(per_species_scale, per_species_shift, trainable_scale_shift)

    @override
    def unscaled_energies(self, batch: Mapping[str, Tensor], positions: Tensor, strain: Tensor) -> Tensor:
        """Evaluates the energies of the atoms before scale and shift: (N,), or (N, T) with several tasks."""
        species = batch[keys.SPECIES]
        source, target = batch[keys.EDGE_INDEX].unbind(0)
        lengths, directions = self.edges(batch, positions, strain)
        radial_basis = self.radial_basis(lengths)
        harmonics = self.harmonics(directions)
        couplings = {name: coupling(harmonics) for name, coupling in self.couplings.items()}

        features = self.embedding(species).unsqueeze(1)
        for name, layer in zip(self.coupling_names, self.layers, strict=True):
            features = layer(features, species, source, target, couplings[name], radial_basis)
        scalars = features.squeeze(1)
        if len(self.tasks) == 1:
            energies: Tensor = self.readout(scalars).squeeze(-1)
            return energies
        return torch.cat([readout(scalars) for readout in self.readouts], dim=1)


class EquivariantPotential(ConservativePotential):
    """Predicts energy, forces and stress by equivariant messages, in the manner of NequIP (arXiv 2101.03164).

    Its constants have the default dtype: for float64 accuracy build the potential under
    ``torch.set_default_dtype(torch.float64)`` instead of converting it afterwards. Only the shifts, and the sums of
    atomic energies, are in float64 always.

    Structures of several tasks, such as levels of theory, share the layers; each task has a readout and energies of
    atoms of its own. Batches then have ``task`` (see :mod:`lightning_januspipe.keys`).

    Args:
        species: Chemical symbols; the index of a symbol is its species index in a batch.
        cutoff: Cutoff radius in Å.
        num_layers: Number of interaction layers.
        num_features: Number of channels of each degree.
        l_max: Highest degree of features and spherical harmonics.
        num_bessel: Number of radial basis functions.
        radial_hidden: Widths of the hidden layers of the radial networks.
        cutoff_exponent: Exponent of the polynomial cutoff.
        trainable_bessel: Train the frequencies of the radial basis.
        avg_num_neighbors: Average number of edges per atom in the training set.
        per_species_scale: Factor of atomic energies in eV: one number, a number per species, or a mapping from symbols;
            or a mapping from tasks to these.
        per_species_shift: Energy in eV that each atom adds, in the same forms.
        trainable_scale_shift: Train scale and shift.
        tasks: Names of the tasks; their order is that of the task index.

    Attributes:
        conditions: Keys of a batch that the potential reads beside the structures: ``task`` if there are several.

    Raises:
        ValueError: An argument is out of its range, or a value of a species or task is missing.

    Example:
        >>> import torch
        >>> potential = EquivariantPotential(species=["Cu", "Au"], cutoff=5.0, num_layers=2, num_features=8).eval()
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
          class_path: lightning_januspipe.models.EquivariantPotential
          init_args: {species: [Cu, Au], cutoff: 5.0, num_layers: 4, l_max: 2, avg_num_neighbors: 42.0}
    """

    def __init__(
        self,
        species: Sequence[str],
        cutoff: float,
        num_layers: int = 4,
        num_features: int = 32,
        l_max: int = 1,
        num_bessel: int = 8,
        radial_hidden: Sequence[int] = (32, 32),
        cutoff_exponent: int = 6,
        trainable_bessel: bool = False,
        avg_num_neighbors: float = 16.0,
        per_species_scale: PerTask = 1.0,
        per_species_shift: PerTask = 0.0,
        trainable_scale_shift: bool = False,
        tasks: Sequence[str] = ("default",),
    ) -> None:
        check_species(species)
        check_tasks(tasks)
        arguments: dict[str, Any] = {
            "species": list(species),
            "cutoff": float(cutoff),
            "num_layers": num_layers,
            "num_features": num_features,
            "l_max": l_max,
            "num_bessel": num_bessel,
            "radial_hidden": list(radial_hidden),
            "cutoff_exponent": cutoff_exponent,
            "trainable_bessel": trainable_bessel,
            "avg_num_neighbors": float(avg_num_neighbors),
            "per_species_scale": per_species_values("per_species_scale", per_species_scale, species, tasks),
            "per_species_shift": per_species_values("per_species_shift", per_species_shift, species, tasks),
            "trainable_scale_shift": trainable_scale_shift,
            "tasks": list(tasks),
        }
        super().__init__(EnergyModel(**arguments))
        self.arguments = arguments
        self.species, self.tasks = tuple(species), tuple(tasks)
        self.conditions = (keys.TASK,) if len(self.tasks) > 1 else ()
        self.cutoff = float(cutoff)
        self.avg_num_neighbors = float(avg_num_neighbors)
