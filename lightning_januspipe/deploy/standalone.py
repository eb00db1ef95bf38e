"""Exports a trained potential as one compiled file, which torch runs in Python and C++ without this package.

The forward, with its derivatives, is traced with symbolic numbers of atoms, edges and structures, and compiled by
AOTInductor of torch. So the file holds no Python, needs no autograd, and takes structures of any size.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from ase import Atoms
from ase.build import bulk
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn

import lightning_januspipe
from lightning_januspipe import keys
from lightning_januspipe.calculator import SkinNeighborList, StructureAdapter
from lightning_januspipe.checkpoint import atomic
from lightning_januspipe.compiled.compiled_potential import INPUTS, OUTPUTS, TOLERANCES, trace_evaluation
from lightning_januspipe.compiled.torch_internals import checking_inputs, device_of, reading_after_writing
from lightning_januspipe.deploy.input_checks import code_of_checks
from lightning_januspipe.models import load


def export_potential(
    model: str | Path | nn.Module,
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: Literal["float32", "float64"] | torch.dtype | None = None,
    task: str | None = None,
) -> dict[str, str]:
    """Compiles a potential into one file, and compares the file with the potential.

    The file is a package of AOTInductor. It runs on the kind of device and processor that it was compiled on, and with
    the same minor version of torch::

        import torch

        run = torch._inductor.aoti_load_package("model.pt2")
        energy, forces, stress = run(positions, species, edge_index, cell_shifts, cell, batch)

    Shapes and units are those of :mod:`lightning_januspipe.keys`. ``run.get_metadata()`` tells the rest: species,
    cutoff, dtype, units, the names of arguments and results.

    Args:
        model: A checkpoint of a :class:`~lightning_januspipe.models.PotentialModule`, such a module, or a potential
            that takes the batches of :mod:`lightning_januspipe.keys` and has attributes ``species`` and ``cutoff``.
        path: The file to write, ending in ``.pt2``; it is replaced if it exists.
        device: The device that the file is for.
        dtype: The type that the potential is converted to; None for the type of its weights.
        task: The task that the file is for, where the potential has several.

    Returns:
        The metadata in the file.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The path does not end in ``.pt2``, is a folder or the checkpoint, or cannot be written, the
            potential takes other batches, ``task`` is none of its tasks, the compiled file gives other results than
            the potential, or ``device`` is a GPU that is not there.
    """
    path = file_to_write(path, ".pt2", "torch loads files whose", model)
    device = device_of(device)
    potential, species, cutoff = potential_of(model, task)
    potential = potential.to(device)
    began = time.perf_counter()
    rank_zero_info(f"tracing {type(potential).__name__} with its derivatives")
    floats = converted(potential, dtype)
    adapter = StructureAdapter(species, cutoff)
    graph = _Positional(trace_evaluation(potential, floats, device)[0])
    example = example_arguments(adapter, [3, 2, 4], floats, device)
    metadata = {
        "species": json.dumps(species),
        "cutoff": str(cutoff),
        "dtype": str(floats).removeprefix("torch."),
        "device": device.type,
        "inputs": json.dumps({name: list(shape) for name, (shape, _) in INPUTS.items()}),
        "integers": json.dumps([name for name, (_, kind) in INPUTS.items() if kind == "int64"]),
        "outputs": json.dumps(OUTPUTS),
        "units": json.dumps({"energy": "eV", "forces": "eV/Å", "stress": "eV/Å³", "positions": "Å"}),
        **({} if task is None else {"task": task}),
        "versions": json.dumps({"torch": torch.__version__, "lightning_januspipe": lightning_januspipe.__version__}),
    }
    dynamic = [{d: torch.export.Dim.DYNAMIC for d, n in enumerate(s) if isinstance(n, str)} for s, _ in INPUTS.values()]
    program = torch.export.export(graph, tuple(example), dynamic_shapes=(tuple(dynamic),))
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / path.name
        settings = {"aot_inductor.metadata": metadata}
        checks = code_of_checks(len(species), floats, device.type)
        rank_zero_info(f"traced in {time.perf_counter() - began:.0f} s; compiling it, which may take some minutes")
        with checking_inputs(checks), reading_after_writing():
            torch._inductor.aoti_compile_and_package(program, package_path=str(part), inductor_configs=settings)
        rank_zero_info(f"compiled after {time.perf_counter() - began:.0f} s; comparing the file with the potential")
        for sizes in ([1], [2, 1, 3, 1]):
            _require_same(part, potential, example_arguments(adapter, sizes, floats, device), floats)
        with atomic.replacing(path) as target:
            shutil.copyfile(part, target)
    return metadata


def file_to_write(path: str | Path, suffix: str, whose: str, model: str | Path | nn.Module) -> Path:
    """Returns the absolute path of a file to export to, which is checked before anything is compiled.

    Args:
        path: The path as the user gave it.
        suffix: What its name has to end in.
        whose: Whose names end so, as the beginning of a sentence.
        model: What is exported; a checkpoint is not to be replaced by what is made of it.

    Raises:
        ValueError: The name ends in something else, or is that of a folder or of the checkpoint, or the folder cannot
            be written to.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{path}: {whose} names end in {suffix}; give such a name")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; give the name of a file")
    if isinstance(model, (str, Path)) and path.exists() and path.samefile(model):
        raise ValueError(f"{path} is the checkpoint, which the exported file would replace; give another name")
    path = path.absolute()
    parent = next(p for p in path.parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        reason = "cannot be written to" if parent.is_dir() else "is no folder"
        raise ValueError(f"{path} cannot be made: {parent} {reason}")
    return path


def potential_of(model: str | Path | nn.Module, task: str | None = None) -> tuple[nn.Module, list[str], float]:
    """Returns a frozen copy of a potential in evaluation mode, for one task, with its species and its cutoff in Å."""
    module = load(model) if isinstance(model, (str, Path)) else model
    potential = getattr(module, "potential", None)
    potential = potential if isinstance(potential, nn.Module) else module
    species, cutoff = getattr(potential, "species", None), getattr(potential, "cutoff", None)
    if species is None or cutoff is None:
        raise ValueError(
            f"{type(potential).__name__} has no attributes 'species' and 'cutoff', so that nothing is known of the "
            "batches that it takes; potentials of other packages are exported by their own tools"
        )
    tasks = list(getattr(potential, "tasks", ()))
    if (len(tasks) > 1 or task is not None) and task not in tasks:
        known = f"has the tasks {tasks}: name the one" if tasks else "was trained without tasks: name none"
        raise ValueError(f"task={task!r}, but {type(potential).__name__} {known} (--task, or task= in Python)")
    own = copy.deepcopy(potential).eval().requires_grad_(False)
    return own if task is None else _OneTask(own, tasks.index(task)), list(species), float(cutoff)


def converted(potential: nn.Module, dtype: Literal["float32", "float64"] | torch.dtype | None) -> torch.dtype:
    """Converts a potential in place, unless ``dtype`` is None; returns the type of its first floating-point tensor."""
    if dtype is not None:
        potential.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)
    return next(p.dtype for p in [*potential.parameters(), *potential.buffers()] if p.is_floating_point())


class _OneTask(nn.Module):
    """Evaluates a potential of several tasks by one of them."""

    conditions = ()

    def __init__(self, potential: nn.Module, task: int) -> None:
        super().__init__()
        self.potential, self.task = potential, task

    def forward(self, batch: dict[str, Tensor]) -> Any:
        task = torch.full_like(batch[keys.CELL][:, 0, 0], self.task, dtype=torch.int64)
        return self.potential(batch | {keys.TASK: task})


class _Positional(nn.Module):
    """Gives a traced function the arguments and results of an exported file."""

    def __init__(self, traced: nn.Module) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, *arguments: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.traced(*arguments))


def example_arguments(
    adapter: StructureAdapter, sizes: Sequence[int], floats: torch.dtype, device: Any
) -> list[Tensor]:
    """Returns the arguments for made structures: crystals of some cells, and a lone atom in place of one cell."""
    rng = np.random.default_rng(0)
    batches = []
    for size in sizes:
        atoms = Atoms("X", [[0.0, 0.0, 0.0]])
        if size > 1:
            atoms = bulk("Cu", "fcc", a=adapter.cutoff, cubic=True) * (size, 1, 1)
            atoms.rattle(0.05, rng=rng)
        atoms.symbols = list(rng.choice(adapter.species, len(atoms)))
        edges = SkinNeighborList(adapter.cutoff, 0.0).edges(atoms)
        batches.append(adapter.batch_from_atoms(atoms, edges, floats))
    starts = np.cumsum([0, *(len(b[keys.SPECIES]) for b in batches)])
    for index, (batch, start) in enumerate(zip(batches, starts, strict=False)):
        batch[keys.EDGE_INDEX] = batch[keys.EDGE_INDEX] + int(start)
        batch[keys.BATCH] = batch[keys.BATCH] + index
    return [torch.cat([b[n] for b in batches], dim=1 if n == keys.EDGE_INDEX else 0).to(device) for n in INPUTS]


def _require_same(path: Path, potential: nn.Module, arguments: list[Tensor], floats: torch.dtype) -> None:
    expected = potential(dict(zip(INPUTS, arguments, strict=True)))
    for name, found in zip(OUTPUTS, torch._inductor.aoti_load_package(str(path))(*arguments), strict=True):
        scale = max(1.0, float(expected[name].abs().max()))
        error = float((found - expected[name]).abs().max())
        if not error <= TOLERANCES[floats] * scale:
            raise ValueError(
                f"the compiled file gives another {name} than the potential: it differs by {error:.2e} at a scale of "
                f"{scale:.2e}. Please report this, with the potential and the version of torch ({torch.__version__})."
            )
