"""Makes of a trained potential a file that runs without this package, and lets LAMMPS run it."""

from lightning_januspipe.deploy.lammps_fix import LammpsPotential
from lightning_januspipe.deploy.metatomic import export_metatomic
from lightning_januspipe.deploy.standalone import export_potential

__all__ = ["LammpsPotential", "export_metatomic", "export_potential"]
