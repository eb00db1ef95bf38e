"""Makes the batches of fairchem's eSEN and UMA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from typing_extensions import override

from lightning_januspipe import keys
from lightning_januspipe.calculator.adapter import TRAINED, AtomsAdapter
from lightning_januspipe.calculator.packages.package_parts import symbols_of
from lightning_januspipe.calculator.skin import Edges
from lightning_januspipe.data.structures import species_index


class FairchemAtomsAdapter(AtomsAdapter):
    """Makes the batches of fairchem's models. Those that make edges by themselves get none.

    Normalizers and energies of elements are applied where the model knows its ``tasks``, as one that
    ``pretrained_mlip`` has loaded does.

    Args:
        model: The model, with its backbone and its heads.
        task: Name of the task, such as ``"omat"``; None where the model has one task at most.

    Raises:
        ValueError: There is no such task, or several and none is named.
    """

    def __init__(self, model: Any, task: str | None = None) -> None:
        super().__init__(float(model.backbone.cutoff))
        self.tasks = _tasks_of(model)
        if task not in self.tasks and (task is not None or len(self.tasks) > 1):
            raise ValueError(
                f"task={task!r}; the model has the tasks {self.tasks}: give "
                "adapter=FairchemAtomsAdapter(model, task=...)"
            )
        self.task = task or next(iter(self.tasks), "")
        self.symbols = symbols_of(range(1, min(model.backbone.sphere_embedding.num_embeddings, 119)))
        self.makes_edges = bool(model.backbone.otf_graph)
        self.all_periodic = self.makes_edges and bool(model.backbone.always_use_pbc)

    @override
    def batch_from_atoms(self, atoms: Atoms, edges: Edges, dtype: torch.dtype) -> Any:
        from fairchem.core.datasets.atomic_data import AtomicData

        species_index(atoms, self.symbols, "the structure", TRAINED)
        plain = Atoms(atoms.numbers, atoms.positions, cell=_box(atoms, self.cutoff), pbc=atoms.pbc)
        if self.all_periodic:
            plain.pbc = True
        default_spin = 1 if self.task == "omol" else 0
        plain.info = {"charge": atoms.info.get(keys.CHARGE, 0), "spin": atoms.info.get(keys.SPIN, default_spin)}
        data = AtomicData.from_ase(plain, task_name=self.task, target_dtype=dtype, r_data_keys=["charge", "spin"])
        if not self.makes_edges:
            moved = (plain.positions - data.pos.double().numpy()) @ np.linalg.inv(plain.cell.array)
            cells = np.rint(moved).astype(np.int64)  # by which fairchem has wrapped the positions
            source, target = edges.edge_index
            offsets = edges.cell_shifts + cells[source] - cells[target]
            data.edge_index = torch.from_numpy(edges.edge_index)
            data.cell_offsets = torch.tensor(offsets, dtype=dtype)
            data.nedges = torch.tensor([len(source)])
        return data

    @override
    def call(self, potential: Any, batch: Any) -> Any:
        return potential(batch.clone())  # its forward changes what it gets

    @override
    def results(self, potential: Any, batch: Any, output: Any) -> dict[str, Tensor]:
        """Returns the results.

        Raises:
            ValueError: The heads give no energy or several.
        """
        found = {name: only_output(output, name, self.task, self.tasks) for name in ("energy", "forces", "stress")}
        if found["energy"] is None:
            raise ValueError(f"the heads {list(potential.output_heads)} of fairchem's model give no energy")
        results = {name: value for name, value in found.items() if value is not None}
        for task in (potential.tasks or {}).values():
            if self.task in task.datasets and task.property in results:
                value = task.normalizer.to(batch.pos.device).denorm(results[task.property])
                if task.element_references is not None:
                    batch.batch_full, batch.atomic_numbers_full = batch.batch, batch.atomic_numbers
                    value = task.element_references.to(batch.pos.device).undo_refs(batch, value)
                results[task.property] = value
        return results


def _tasks_of(model: Any) -> list[str]:
    """Returns the names of the tasks that the backbone or a head of a model tells apart."""
    parts = [model.backbone, *model.output_heads.values()]
    embedded = getattr(model.backbone, "dataset_mapping", None) or {}
    return sorted({*embedded, *(name for part in parts for name in getattr(part, "dataset_names", ()))})


def _box(atoms: Atoms, cutoff: float) -> np.ndarray:
    """Returns the cell (3, 3) of a structure in Å, wide in directions that are not periodic."""
    cell = np.array(Atoms(cell=atoms.cell.array * atoms.pbc[:, None]).cell.complete())
    for direction in np.flatnonzero(~atoms.pbc):
        along = np.linalg.solve(cell.T, atoms.positions.T)[direction]
        cell[direction] *= np.ptp(along) + 3 * cutoff
    return cell


def only_output(output: Mapping[str, Any], name: str, task: str, tasks: list[str]) -> Tensor | None:
    """Returns the one output of a name that is not of another task; None if there is none."""
    foreign = {f"{other}_{name}" for other in tasks if other != task}
    paths = [
        (path, value)
        for path, value in _leaves(output)
        if (path[-1] == name or path[-1].endswith(f"_{name}")) and foreign.isdisjoint(path)
    ]
    if len(paths) > 1:
        raise ValueError(f"the heads of fairchem's model give several of {name}: {['.'.join(p) for p, _ in paths]}")
    return paths[0][1] if paths else None


def _leaves(output: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Tensor]]:
    for name, value in output.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value
