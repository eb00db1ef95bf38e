"""Allegro in NequIP's own LightningModule and data module."""

from __future__ import annotations

import nequip_program  # noqa: F401  # imported once for all ranks
from factories import data_of, module_of

_MODEL = ("--model", "allegro", "--layers", "2")
make_module = module_of("nequip_program", *_MODEL)
make_without_stress = module_of("nequip_program", *_MODEL, "--structures", "molecules")
crystals = data_of("nequip_program")
molecules = data_of("nequip_program", "--structures", "molecules")
