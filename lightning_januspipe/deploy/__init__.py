"""Makes of a trained potential a file that runs without this package."""

from lightning_januspipe.deploy.standalone import export_potential

__all__ = ["export_potential"]
