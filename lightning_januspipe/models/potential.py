"""Defines the reference potential: an equivariant message-passing energy, with forces and stress as derivatives."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.models.equivariant import Interaction
from lightning_januspipe.models.radial import BesselBasis
from lightning_januspipe.models.spherical import Coupling, SphericalHarmonics

PerSpecies = float | Sequence[float] | Mapping[str, float]


class EnergyModel(nn.Module):
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
        per_species_scale: PerSpecies = 1.0,
        per_species_shift: PerSpecies = 0.0,
        trainable_scale_shift: bool = False,
    ) -> None:
        super().__init__()
        _check_species(species)
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
        self.species = tuple(species)
        self.cutoff = float(cutoff)
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
        self.readout = nn.Sequential(
            nn.Linear(num_features, num_features // 2), nn.SiLU(), nn.Linear(num_features // 2, 1, bias=False)
        )

        scale = _per_species_tensor("per_species_scale", per_species_scale, self.species).to(torch.get_default_dtype())
        shift = _per_species_tensor("per_species_shift", per_species_shift, self.species)
        self.scale: Tensor = nn.Parameter(scale) if trainable_scale_shift else nn.Buffer(scale)
        # All-electron energies have more digits than float32: shifts and sums of energies stay in float64.
        self.shift: Tensor = nn.Parameter(shift) if trainable_scale_shift else nn.Buffer(shift)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EnergyModel":
        """Moves or convert the model, but keep the shifts in float64."""
        exact = self.shift.detach()
        super()._apply(fn, recurse)
        if self.shift.dtype != exact.dtype:
            self.shift.data = exact.to(self.shift.device)
        return self

    @override
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Loads the model, but keep its shifts where those in ``state_dict`` are the same ones with fewer digits."""
        saved = state_dict.get(f"{prefix}shift")
        own = self.shift.detach()
        if isinstance(saved, Tensor) and saved.shape == own.shape and torch.equal(own.to(saved), saved):
            state_dict[f"{prefix}shift"] = own
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, batch: Mapping[str, Tensor], positions: Tensor, strain: Tensor) -> Tensor:
        """Evaluates the energy of strained structures.

        Args:
            batch: The batch (see :mod:`lightning_januspipe.keys`); its positions are not read.
            positions: (N, 3) positions in Å before the strain.
            strain: (B, 3, 3) strain; its symmetric part is applied to positions and cell.

        Returns:
            (B,) energies in eV, in float64.
        """
        return self.sum_structures(batch, self.atomic_energies(batch, positions, strain))

    def atomic_energies(self, batch: Mapping[str, Tensor], positions: Tensor, strain: Tensor) -> Tensor:
        """Evaluates the energies of the atoms, (N,) in eV and float64. For the arguments see :meth:`forward`."""
        species = batch[keys.SPECIES]
        source, target = batch[keys.EDGE_INDEX].unbind(0)
        lengths, directions = self.edges(batch, positions, strain)
        radial_basis = self.radial_basis(lengths)
        harmonics = self.harmonics(directions)
        couplings = {name: coupling(harmonics) for name, coupling in self.couplings.items()}

        features = self.embedding(species).unsqueeze(1)
        for name, layer in zip(self.coupling_names, self.layers, strict=True):
            features = layer(features, species, source, target, couplings[name], radial_basis)
        energies = self.readout(features.squeeze(1)).squeeze(-1)
        return (self.scale[species] * energies).to(self.shift.dtype) + self.shift[species]

    def edges(self, batch: Mapping[str, Tensor], positions: Tensor, strain: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the lengths (E,) in Å and the directions (E, 3) of the edges.

        An edge of length zero (padding) gets the length of the cutoff and a zero direction, so that it carries no
        message.
        """
        structure = batch[keys.BATCH]
        source, target = batch[keys.EDGE_INDEX].unbind(0)
        symmetric = 0.5 * (strain + strain.transpose(1, 2))
        positions = positions + torch.bmm(positions.unsqueeze(1), symmetric[structure]).squeeze(1)
        cell = batch[keys.CELL]
        cell = cell + torch.bmm(cell, symmetric)
        shifts = torch.bmm(batch[keys.CELL_SHIFTS].unsqueeze(1), cell[structure[source]]).squeeze(1)
        vectors = positions[source] + shifts - positions[target]
        squares = vectors.square().sum(-1)
        lengths = torch.where(squares > 0, squares, self.cutoff**2).sqrt()
        return lengths, vectors / lengths.unsqueeze(-1)

    def sum_structures(self, batch: Mapping[str, Tensor], atomic: Tensor) -> Tensor:
        """Sums (N,) energies of atoms to (B,) energies of structures."""
        return atomic.new_zeros(batch[keys.CELL].shape[0]).index_add(0, batch[keys.BATCH], atomic)


class ConservativePotential(nn.Module):
    """Computes forces and stress as derivatives of an energy model.

    Args:
        energy_model: Module called as ``energy_model(batch, positions, strain)`` that returns (B,) energies in eV, for
            (N, 3) positions in Å and a (B, 3, 3) strain.
    """

    def __init__(self, energy_model: nn.Module) -> None:
        super().__init__()
        self.energy_model = energy_model

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Evaluates energy, forces and stress.

        In training mode the results can be differentiated with respect to the parameters; in evaluation mode they are
        detached. The caller need not enable gradients, but must leave inference mode.

        Args:
            batch: The batch (see :mod:`lightning_januspipe.keys`).

        Returns:
            ``energy`` (B,) in eV, in the dtype of the energy model, ``forces`` (N, 3) in eV/Å and ``stress`` (B, 3, 3)
            in eV/Å³, zero where the cell has no volume.

        Raises:
            RuntimeError: Called in inference mode, where torch cannot differentiate.
        """
        if torch.is_inference_mode_enabled():
            raise RuntimeError(
                "forces are derivatives, which torch cannot compute in inference mode; call the potential under "
                "torch.inference_mode(False) with cloned inputs, or give the Trainer inference_mode=False"
            )
        with nullcontext() if torch.is_grad_enabled() else torch.enable_grad():
            positions = batch[keys.POSITIONS].detach().requires_grad_(True)
            strain = torch.zeros_like(batch[keys.CELL]).requires_grad_(True)
            energy = self.energy_model(batch, positions, strain)
            position_gradient, virial = torch.autograd.grad(
                [energy.sum()], [positions, strain], create_graph=self.training
            )
        volume = cell_volume(batch[keys.CELL])[:, None, None]
        periodic = volume > 0
        stress = torch.where(periodic, virial / torch.where(periodic, volume, 1.0), 0.0)
        return {
            keys.ENERGY: energy if self.training else energy.detach(),
            keys.FORCES: -position_gradient,
            keys.STRESS: stress,
        }


class EquivariantPotential(ConservativePotential):
    """Predicts energy, forces and stress by equivariant messages, in the manner of NequIP (arXiv 2101.03164).

    Its constants have the default dtype: for float64 accuracy build the potential under
    ``torch.set_default_dtype(torch.float64)`` instead of converting it afterwards. Only the shifts, and the sums of
    atomic energies, are in float64 always.

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
        per_species_scale: Factor of atomic energies in eV: one number, a number per species, or a mapping from symbols.
        per_species_shift: Energy in eV that each atom adds, in the same forms.
        trainable_scale_shift: Train scale and shift.

    Raises:
        ValueError: An argument is out of its range, or a per-species value is missing.

    Example:
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
        per_species_scale: PerSpecies = 1.0,
        per_species_shift: PerSpecies = 0.0,
        trainable_scale_shift: bool = False,
    ) -> None:
        _check_species(species)
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
            "per_species_scale": _per_species_tensor("per_species_scale", per_species_scale, species).tolist(),
            "per_species_shift": _per_species_tensor("per_species_shift", per_species_shift, species).tolist(),
            "trainable_scale_shift": trainable_scale_shift,
        }
        super().__init__(EnergyModel(**arguments))
        self.arguments = arguments
        self.species = tuple(species)
        self.cutoff = float(cutoff)
        self.avg_num_neighbors = float(avg_num_neighbors)


def cell_volume(cell: Tensor) -> Tensor:
    """Returns the volumes (B,) in Å³ of the (B, 3, 3) cells; zero where a cell vector is missing."""
    a, b, c = cell.unbind(1)
    return (a * torch.linalg.cross(b, c)).sum(-1).abs()


def _check_species(species: Sequence[str]) -> None:
    """Raises ValueError unless ``species`` is a list of distinct chemical symbols."""
    if isinstance(species, str) or not species or not all(isinstance(symbol, str) for symbol in species):
        raise ValueError(f'species must be a list of chemical symbols such as ["Cu", "Au"], got {species!r}')
    if len(set(species)) != len(species):
        raise ValueError(f"species must be distinct, got {list(species)}")


def _per_species_tensor(name: str, given: PerSpecies, species: Sequence[str]) -> Tensor:
    """Returns one value per species, (num_species,), from any of the accepted forms."""
    if isinstance(given, Mapping):
        if missing := [symbol for symbol in species if symbol not in given]:
            raise ValueError(f"{name} has no value for {missing}; give one for each of {list(species)}")
        given = [given[symbol] for symbol in species]
    elif not isinstance(given, Sequence):
        given = [given] * len(species)
    if len(given) != len(species):
        raise ValueError(
            f"{name} has {len(given)} values for the {len(species)} species {list(species)}; give one for each"
        )
    return torch.tensor([float(value) for value in given], dtype=torch.float64)
