"""Modules and loaders of packages for ``januspipe bench compile --factory bench_models:NAME``.

The functions that end in _calculators are for ``januspipe bench md --factory``.

PYTHONPATH=tests/clients/programs januspipe bench compile --factory bench_models:nequip \
    --own_factory bench_models:nequip_compiled
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from ase import Atoms

from lightning_januspipe.bench.work import Work
from lightning_januspipe.data import emt_structures

Calculators = tuple[Any, Callable[[Atoms], Any]]
"""A module, and a function of a structure that returns the package's own calculator with the same weights."""


def nequip(work: Work) -> tuple[Any, Any]:
    """Makes NequIP's own module and loader, uncompiled."""
    return _nequip(work, "eager")


def nequip_compiled(work: Work) -> tuple[Any, Any]:
    """Makes the same with NequIP's own compiled training."""
    return _nequip(work, "compile")


def _nequip(work: Work, compile_mode: str) -> tuple[Any, Any]:
    program = import_module("nequip_program")
    program._COMMON.update(model_dtype=work.dtype, r_max=work.cutoff, avg_num_neighbors=40.0)
    made = program._nequip

    def features(args: Any) -> dict[str, Any]:
        return {**made(args), "num_features": work.num_features}

    program._ARCHITECTURES["nequip"] = features
    program.CUTOFF = work.cutoff
    program.labelled = _structures(work)
    return _made(program, work, "--l-max", str(work.l_max), "--compile-mode", compile_mode)


def mace(work: Work) -> tuple[Any, Any]:
    """Makes MACE's model in an ordinary LightningModule, with MACE's loader."""
    program = _program("mace_program", work)
    structures = _structures(work)("", 2 * work.batch_size)
    program.CUTOFF = work.cutoff
    program.STRUCTURES["periodic"] = lambda index, _: structures[index]
    from e3nn import o3  # which this torch can import after mace only

    irreps = o3.Irreps([(work.num_features, (degree, (-1) ** degree)) for degree in range(work.l_max + 1)])
    made = program.model
    program.model = lambda *given, **more: made(*given, hidden_irreps=irreps, **more)
    return _made(program, work, "--model", "mace")


def painn(work: Work) -> tuple[Any, Any]:
    """Makes SchNetPack's task with PaiNN, and its loader."""
    program = _program("schnetpack_program", work)
    program.CUTOFF = work.cutoff
    program.labelled = _structures(work)
    return _made(program, work, "--model", "painn")


def nequip_calculators(work: Work) -> Calculators:
    """Makes NequIP's module, and its own calculator."""
    module, _ = nequip(replace(work, num_atoms=4))
    (model,) = [part for part in module.modules() if getattr(part, "is_graph_model", False)]

    def own(_: Atoms) -> Any:
        transforms = import_module("nequip.data.transforms")
        mapper = transforms.ChemicalSpeciesToAtomTypeMapper(list(model.type_names))
        calculator = import_module("nequip.integrations.ase").NequIPCalculator
        return calculator(model.eval(), "cpu", transforms=[mapper, transforms.NeighborListTransform(work.cutoff)])

    return module, own


def mace_calculators(work: Work) -> Calculators:
    """Makes MACE's model, and its own calculator."""
    module, _ = mace(replace(work, num_atoms=4))
    (model,) = [child for child in module.children() if hasattr(child, "r_max")]

    def own(_: Atoms) -> Any:
        calculator = import_module("mace.calculators").MACECalculator
        return calculator(models=[model], device="cpu", default_dtype="float64")

    return module, own


def painn_calculators(work: Work) -> Calculators:
    """Makes SchNetPack's PaiNN, and its own calculator with a neighbour list that has a skin too."""
    module, _ = painn(replace(work, num_atoms=4))

    def own(_: Atoms) -> Any:
        spk, torch = import_module("schnetpack"), import_module("torch")
        given = import_module("schnetpack.interfaces.ase_interface").SpkCalculator
        # It loads a file with the default of torch.load, which torch 2.6 and later refuse.
        calculator = type("SpkCalculator", (given,), {"_load_model": lambda *_: module.model.eval()})
        neighbors = spk.transform.SkinNeighborList(spk.transform.MatScipyNeighborList(work.cutoff), cutoff_skin=1.0)
        units = {"energy_unit": "eV", "position_unit": "Ang", "dtype": torch.float64}
        return calculator("", neighbors, stress_key="stress", **units)

    return module, own


def _program(name: str, work: Work) -> Any:
    if work.dtype != "float64":
        raise ValueError(f"{name} makes modules and data in float64 only; give --dtype float64")
    return import_module(name)


def _made(program: Any, work: Work, *options: str) -> tuple[Any, Any]:
    common = ["--layers", str(work.num_layers), "--batch-size", str(work.batch_size)]
    common += ["--num-structures", str(2 * work.batch_size), "--out", str(Path(mkdtemp()) / "out.pt")]
    args = program.arguments([*common, *options])
    data = program.make_data(args)
    data.prepare_data()
    data.setup("fit")
    module = program.make_module(args)
    module.world_size = 1
    return module, data.train_dataloader()


def _structures(work: Work) -> Any:
    """Returns a function that makes boxes of metal with labels, of the work's size."""

    def labelled(_: str, number: int) -> Sequence[Atoms]:
        sizes, species = (work.num_atoms,), ("Al", "Cu", "Ni")
        return emt_structures(number, species=species, sizes=sizes, vacancy_probability=0.0, seed=0)

    return labelled
