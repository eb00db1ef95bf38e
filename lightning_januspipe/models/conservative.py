"""Defines what all reference potentials share: sums of scaled energies of atoms, and their derivatives."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe import keys

PerSpecies = float | Sequence[float] | Mapping[str, float]
"""One number for all species, one for each, or a mapping from chemical symbols."""

PerTask = PerSpecies | Mapping[str, Sequence[float]] | Mapping[str, Mapping[str, float]]
"""The same for all tasks, or a mapping from the names of the tasks."""


class AtomicEnergies(nn.Module):
    """Sums the energies of atoms, which a subclass computes in :meth:`unscaled_energies`, to energies of structures.

    Args:
        species: Chemical symbols; the index of a symbol is its species index in a batch.
        cutoff: Length in Å of the longest edges.
        tasks: Names of the T tasks, by task index.

    Attributes:
        scale: Factors of the energies of atoms in eV by species, (S,), or (S, T) with several tasks.
        shift: Energies in eV that each atom adds, in the same shape.

    Raises:
        ValueError: The species are no list of distinct symbols, or the tasks no list of distinct names.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, species: Sequence[str], cutoff: float, tasks: Sequence[str] = ("default",)) -> None:
        super().__init__()
        check_species(species)
        check_tasks(tasks)
        self.species = tuple(species)
        self.cutoff = float(cutoff)
        self.tasks = tuple(tasks)

    def add_scale_and_shift(self, scale: PerTask, shift: PerTask, trainable: bool) -> None:
        """Adds factors and energies in eV by species; call it last, since optimizers know parameters by their order."""
        self._initial = self._by_species("per_species_scale", scale), self._by_species("per_species_shift", shift)
        scales = torch.tensor(self._initial[0])
        shifts = torch.tensor(self._initial[1], dtype=torch.float64)
        self.scale = nn.Parameter(scales) if trainable else nn.Buffer(scales)
        # All-electron energies have more digits than float32: shifts and sums of energies stay in float64.
        self.shift = nn.Parameter(shifts) if trainable else nn.Buffer(shifts)

    def reset_parameters(self) -> None:
        """Sets the scales and shifts to what :meth:`add_scale_and_shift` was given."""
        with torch.no_grad():
            for tensor, values in zip((self.scale, self.shift), self._initial, strict=True):
                tensor.copy_(torch.tensor(values, dtype=tensor.dtype, device=tensor.device))

    def _by_species(self, name: str, given: PerTask) -> list[Any]:
        """Returns a number for each species, or with several tasks a list of one for each task."""
        values = per_species_values(name, given, self.species, self.tasks)
        if not isinstance(values, Mapping):
            return values
        return [list(of_species) for of_species in zip(*(values[task] for task in self.tasks), strict=True)]

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AtomicEnergies":
        """Moves or converts the model, but keeps the shifts in float64."""
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
        if (
            isinstance(saved, Tensor)
            and not own.is_meta
            and saved.shape == own.shape
            and torch.equal(own.to(saved), saved)
        ):
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

    def unscaled_energies(self, batch: Mapping[str, Tensor], positions: Tensor, strain: Tensor) -> Tensor:
        """Evaluates the energies of the atoms before scale and shift. For the arguments see :meth:`forward`.

        Returns:
            (N,) energies, or with several tasks (N, T) energies, one for each task.
        """
        raise NotImplementedError

    def atomic_energies(self, batch: Mapping[str, Tensor], positions: Tensor, strain: Tensor) -> Tensor:
        """Evaluates the energies of the atoms, (N,) in eV and float64. For the arguments see :meth:`forward`."""
        species, energies = batch[keys.SPECIES], self.unscaled_energies(batch, positions, strain)
        if len(self.tasks) == 1:
            return (self.scale[species] * energies).to(self.shift.dtype) + self.shift[species]
        energies = energies if energies.dim() == 2 else energies.unsqueeze(1)
        of_tasks = (self.scale[species] * energies).to(self.shift.dtype) + self.shift[species]
        task = batch[keys.TASK] if keys.TASK in batch else torch.zeros_like(batch[keys.CELL][:, 0, 0]).long()
        return of_tasks.gather(1, task[batch[keys.BATCH]].unsqueeze(1)).squeeze(1)

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


def cell_volume(cell: Tensor) -> Tensor:
    """Returns the volumes (B,) in Å³ of the (B, 3, 3) cells; zero where a cell vector is missing."""
    a, b, c = cell.unbind(1)
    return (a * torch.linalg.cross(b, c)).sum(-1).abs()


def check_species(species: Sequence[str]) -> None:
    """Raises ValueError unless ``species`` is a list of distinct chemical symbols."""
    if isinstance(species, str) or not species or not all(isinstance(symbol, str) for symbol in species):
        raise ValueError(f'species must be a list of chemical symbols such as ["Cu", "Au"], got {species!r}')
    if len(set(species)) != len(species):
        raise ValueError(f"species must be distinct, got {list(species)}")


def check_tasks(tasks: Sequence[str]) -> None:
    """Raises ValueError unless ``tasks`` is a list of distinct names."""
    if isinstance(tasks, str) or not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"tasks={tasks!r}; expected a list of distinct names, at least one")


def per_species_values(
    name: str, given: PerTask, species: Sequence[str], tasks: Sequence[str] = ("default",)
) -> list[float] | dict[str, list[float]]:
    """Returns one number for each species, from any of the accepted forms; by task where there are several.

    Raises:
        ValueError: A species or a task has no value.
    """
    if isinstance(given, Mapping) and any(isinstance(value, (Mapping, Sequence)) for value in given.values()):
        if missing := [task for task in tasks if task not in given]:
            raise ValueError(f"{name} has no values for the tasks {missing}; give some for each of {list(tasks)}")
        of_tasks: Mapping[str, Any] = given
    else:
        of_tasks = dict.fromkeys(tasks, given)
    found = {task: _of_species(name, of_tasks[task], species) for task in tasks}
    return found if len(tasks) > 1 else found[tasks[0]]


def _of_species(name: str, given: PerSpecies, species: Sequence[str]) -> list[float]:
    """Returns one number for each species."""
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
    return [float(value) for value in given]
