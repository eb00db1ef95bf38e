"""Defines the calculator of ASE that evaluates a potential."""

from __future__ import annotations

import copy
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.stress import full_3x3_to_voigt_6_stress
from lightning_utilities.core.rank_zero import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_januspipe.calculator.adapter import AtomsAdapter, StructureAdapter, near_origin
from lightning_januspipe.calculator.captured_phases import CapturedPhases, examples_of, parts_of
from lightning_januspipe.calculator.graph_ranks import LEAST_ATOMS, GraphRanks
from lightning_januspipe.calculator.packages import known_potential, potential_of
from lightning_januspipe.calculator.skin import Edges, SkinNeighborList
from lightning_januspipe.compiled.compiled_potential import TOLERANCES, CompiledPotential, conditions_of
from lightning_januspipe.compiled.torch_internals import device_of, missing_compiler
from lightning_januspipe.data.structures import resolve_dtype
from lightning_januspipe.data.tasks import NAMES
from lightning_januspipe.errors import CaptureError, in_one_line
from lightning_januspipe.mesh import Mesh, MeshShape
from lightning_januspipe.models import load

_SECONDS_BEFORE_COMPILING = 60.0
"""Time of eager evaluations after which ``compile="auto"`` compiles: it takes about as long, so a run loses little."""


class JanusPipeCalculator(Calculator):
    """Evaluates a trained potential for ASE: ``energy``, ``free_energy``, ``forces``, ``stress`` and ``energies``.

    ``stress`` is there for structures that are periodic and have a volume, and ``energies``, those of the atoms, where
    the potential has them. The free energy is the energy. One evaluation gives everything but ``energies``, which are
    computed when they are asked for.

    Args:
        model: A checkpoint (a file, or a folder of ``torch.distributed.checkpoint``) of a
            :class:`~lightning_januspipe.models.PotentialModule`; or a module: a ``PotentialModule``, or a potential of
            any package. The calculator has a copy, so that a module can be trained on.
        device: ``"auto"`` for a GPU (the first, or this process's one of a ``torchrun``), else the CPU; or a device of
            torch.
        dtype: ``"float32"`` or ``"float64"``, to which the potential is converted; None for the type of its weights.
        adapter: How batches are made of structures. None for potentials that take the batches of
            :mod:`lightning_januspipe.keys` and have attributes ``species`` and ``cutoff``, as those of this package do,
            and for potentials of the packages that the documentation lists, such as MACE and NequIP, which may be
            anywhere in the module.
        skin: How far the neighbour list reaches beyond the cutoff in Å, so that it serves for several steps; 0 makes a
            new one at every step.
        compile: Evaluate by code that torch's inductor compiles from the potential and its derivatives, once for all
            numbers of atoms and edges. True compiles at the first evaluation; ``"auto"`` when evaluations have taken a
            minute, and stays with the eager potential, with a warning, where it cannot be compiled; False never. One
            line says when compiling begins, and another how long it took. Structures without pairs of neighbours are
            evaluated eagerly. With several processes ``"auto"`` is False.
        task: Name of the task by which all structures are evaluated, for potentials of several tasks; None for the one
            that ``Atoms.info["task"]`` names.
        graph_size: Number of processes, started by ``torchrun``, among which the atoms of each structure are shared.
            All of them run the same script, and get all results. Structures of fewer than eight atoms are evaluated
            whole, by each of them.

    Attributes:
        potential: The copy of the potential, in evaluation mode.
        neighbors: The neighbour list.

    Raises:
        FileNotFoundError: There is no checkpoint.
        ValueError: The checkpoint is of a potential of another package, the potential needs an adapter, or an argument
            is out of its range.

    Example:
        >>> import torch
        >>> from ase.build import bulk
        >>> from lightning_januspipe.models import EquivariantPotential
        >>> potential = EquivariantPotential(["Cu"], cutoff=4.0, num_layers=2, num_features=4)
        >>> copper = bulk("Cu", cubic=True)
        >>> copper.calc = JanusPipeCalculator(potential, dtype="float64")
        >>> bool(abs(copper.get_forces()).max() < 1e-6)
        True
    """

    implemented_properties = ["energy", "free_energy", "forces", "stress", "energies"]  # noqa: RUF012 (as ASE has it)

    def __init__(
        self,
        model: str | Path | nn.Module,
        *,
        device: str | torch.device = "auto",
        dtype: Literal["float32", "float64"] | torch.dtype | None = None,
        adapter: AtomsAdapter | None = None,
        skin: float = 1.0,
        compile: bool | Literal["auto"] = "auto",
        task: str | None = None,
        graph_size: int = 1,
    ) -> None:
        super().__init__()
        if compile not in (True, False, "auto"):
            raise ValueError(f"compile={compile!r}; expected True, False or 'auto'")
        if isinstance(graph_size, bool) or not isinstance(graph_size, int) or graph_size < 1:
            raise ValueError(f"graph_size={graph_size!r}; expected a positive integer")
        if adapter is not None and task is not None:
            raise ValueError(f"task={task!r} with an adapter of its own; expected one of them")
        module = load(model) if isinstance(model, (str, Path)) else model
        if adapter is None:
            potential, self.adapter = _potential_of(module, task)
        else:
            potential, self.adapter = potential_of(module, adapter), adapter
        self.device = device_of(_first_device() if device == "auto" else device)
        self.potential = copy.deepcopy(potential)
        self.potential.eval()  # which returns nothing for models of some packages
        self.potential.requires_grad_(False).to(self.device)
        if dtype is not None:
            self.potential.to(resolve_dtype(dtype))
        self.dtype = _dtype_of(self.potential)
        self.neighbors = SkinNeighborList(self.adapter.cutoff, skin)
        self.parameters |= {"skin": skin, "dtype": str(self.dtype), "device": str(self.device)}
        self._graph_ranks: GraphRanks | None = None
        if graph_size > 1:
            self._graph_ranks = GraphRanks(self.potential, self._results, self.device, graph_size, compile is True)
        elif compile is True and (problem := self._why_not()):
            raise ValueError(f"compile=True, but {problem}")
        self._compile, self._has_tried, self._has_warned, self._eager_seconds = compile, False, False, 0.0
        self._compiled: CompiledPotential | CapturedPhases | None = None
        # Copied now: potentials that keep values of an evaluation cannot be copied after it.
        self._to_capture = (
            _with_same_values(self.potential) if compile and graph_size == 1 and self._is_foreign else None
        )

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out compiled code, which a copy and another process have to make again."""
        return self.__dict__ | {"_compiled": None, "_has_tried": False}

    @override
    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Returns what has changed since the last call: also task, charge and spin, which ASE does not compare."""
        changes: list[str] = super().check_state(atoms, tol)
        if self.atoms is not None and any(atoms.info.get(name) != self.atoms.info.get(name) for name in NAMES):
            changes.append("info")
        return changes

    @override
    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Evaluates a structure, and keeps the results.

        Args:
            atoms: The structure; None for that of the last call.
            properties: What is asked for; ``energies`` are computed only then.
            system_changes: What has changed since the last call.

        Raises:
            PropertyNotImplementedError: The potential has no energies of atoms, and they are asked for.
            ValueError: The structure has an unknown species, or no neighbour list.
        """
        began = time.perf_counter()
        super().calculate(atoms, list(properties), list(system_changes))
        if system_changes:
            self.results = {}
        structure = self.atoms
        assert structure is not None, "ASE keeps a copy of the structure"
        edges = self.neighbors.edges(structure)
        batch = self._batch(structure, edges)
        if self._graph_ranks is not None and len(structure) >= LEAST_ATOMS:
            with torch.inference_mode(False):
                found = self._graph_ranks.evaluate(batch, lambda: self._batches(parts_of(structure)))
        else:
            found = self._evaluate(batch, structure, edges.edge_index.shape[1])
        if "energies" in properties and "energies" not in found:
            with torch.inference_mode(False), torch.no_grad():
                energies = self.adapter.energies_of_atoms(self.potential, batch)
            if energies is None:
                raise PropertyNotImplementedError(
                    f"{type(self.potential).__name__} has no energies of atoms; see AtomsAdapter.energies_of_atoms"
                )
            found["energies"] = energies
        arrays = {name: value.detach().cpu().double().numpy() for name, value in found.items()}
        energy = float(arrays["energy"].reshape(()))
        self.results.update({"energy": energy, "free_energy": energy})
        if "forces" in arrays:
            self.results["forces"] = arrays["forces"].reshape(len(structure), 3)
        if "energies" in arrays:
            self.results["energies"] = arrays["energies"].reshape(len(structure))
        if "stress" in arrays and structure.pbc.any() and structure.cell.rank == 3:
            self.results["stress"] = full_3x3_to_voigt_6_stress(arrays["stress"].reshape(3, 3))
        if self._compiled is None:
            self._eager_seconds += time.perf_counter() - began

    def _batch(self, structure: Atoms, edges: Edges) -> Any:
        """Returns the batch of a structure, on the device."""
        return _moved(self.adapter.batch_from_atoms(*near_origin(structure, edges), self.dtype), self.device)

    def _batches(self, structures: Sequence[Atoms]) -> tuple[Any, ...]:
        """Returns the batches of structures that have no neighbour lists yet."""
        neighbors = SkinNeighborList(self.adapter.cutoff, 0.0)
        return tuple(self._batch(atoms, neighbors.edges(atoms)) for atoms in structures)

    def _results(self, potential: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Returns the results of a batch by the potential as it is."""
        return self.adapter.results(potential, batch, self.adapter.call(potential, batch))

    def _evaluate(self, batch: Any, structure: Atoms, num_edges: int) -> dict[str, Tensor]:
        """Returns the results of a batch, by compiled code where there is some that fits."""
        if self._graph_ranks is not None or num_edges < 2:
            return self._eager(batch)
        is_long = self._eager_seconds >= _SECONDS_BEFORE_COMPILING
        if self._compile is True or (self._compile == "auto" and is_long and not self._has_tried):
            self._compile_once(batch, structure)
        if self._compiled is None:
            return self._eager(batch)
        try:
            return self._by_compiled(self._compiled, batch, structure)
        except CaptureError as error:  # the captured phases are not right for a structure like this one
            if not self._has_warned:
                warnings.warn(
                    f"JanusPipeCalculator evaluates a structure eagerly, and others like it: {error}", stacklevel=3
                )
            self._has_warned = True
            return self._eager(batch)

    def _by_compiled(
        self, compiled: CompiledPotential | CapturedPhases, batch: Any, structure: Atoms
    ) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            if isinstance(compiled, CapturedPhases):
                if not compiled.takes(batch):
                    return self._eager(batch)
                return compiled.evaluate(batch, lambda: self._batches(examples_of(structure)))
            return compiled(batch) if compiled.misfit(batch) is None else self._eager(batch)

    def _eager(self, batch: Any) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.enable_grad():
            return self._results(self.potential, batch)

    def _compile_once(self, batch: Any, structure: Atoms) -> None:
        """Compiles the potential, and compares the compiled code with it on a batch.

        Raises:
            ValueError: The potential cannot be compiled, or its code gives other results, and ``compile`` is True.
        """
        if self._compiled is not None:
            return
        always, self._has_tried = self._compile is True, True
        problem = self._why_not()
        if not problem:
            name, began = type(self.potential).__name__, time.perf_counter()
            after = "" if always else f" after {self._eager_seconds:.0f} s of evaluations"
            rank_zero_info(f"JanusPipeCalculator compiles {name}{after}, once, which may take some minutes")
            try:
                compiled = self._compiler()
                problem = self._problem(compiled, batch, structure)
            except Exception as error:  # torch's tracing and compiling may fail in any way
                problem = f"{name} cannot be compiled ({in_one_line(error)})"
                if always:
                    raise ValueError(f"compile=True, but {problem}. Use compile=False") from error
        if not problem:
            self._compiled = compiled
            rank_zero_info(f"JanusPipeCalculator has compiled {name} in {time.perf_counter() - began:.0f} s")
        elif always:
            raise ValueError(f"compile=True, but {problem}. Use compile=False")
        else:
            warnings.warn(f"JanusPipeCalculator stays eager: {problem}", stacklevel=4)

    def _compiler(self) -> CompiledPotential | CapturedPhases:
        """Returns the compiled potential; one of another package is captured at its first evaluation."""
        if self._to_capture is None:
            return CompiledPotential(self.potential, self.dtype, self.device)
        alone, potential = Mesh(MeshShape(1, 1, 1), 0, self.device), self._to_capture
        return CapturedPhases(potential, self._results, alone, compiles=True)

    @property
    def _is_foreign(self) -> bool:
        """Whether the potential takes other batches than those of this package."""
        return type(self.adapter) is not StructureAdapter

    def _why_not(self) -> str | None:
        """Returns in words why nothing can be compiled; None where nothing is known against it."""
        return missing_compiler(self.device.type)

    def _problem(self, compiled: CompiledPotential | CapturedPhases, batch: Any, structure: Atoms) -> str | None:
        """Returns in words why compiled code cannot be used; None where it gives what the potential does."""
        if isinstance(compiled, CompiledPotential) and (problem := compiled.misfit(batch)):
            return problem
        expected, found = self._eager(batch), self._by_compiled(compiled, batch, structure)
        if isinstance(compiled, CapturedPhases) and (problem := compiled.why_eager()):
            return problem
        for name, value in found.items():
            right, is_number = expected[name].detach(), expected[name].isfinite()
            scale = max(1.0, float(right.abs().masked_fill(~is_number, 0.0).max()))
            error = float((value.detach() - right).abs().masked_fill(~is_number & ~value.isfinite(), 0.0).max())
            if not error <= TOLERANCES[self.dtype] * scale:
                return f"its {name} result differs by {error:.2e} from that of the potential, at a scale of {scale:.2e}"
        return None


def _potential_of(module: nn.Module, task: str | None) -> tuple[nn.Module, AtomsAdapter]:
    """Returns the potential in a module, and the adapter that makes its batches."""
    own = getattr(module, "potential", None)
    potential = own if isinstance(own, nn.Module) else module
    species, cutoff = getattr(potential, "species", None), getattr(potential, "cutoff", None)
    if species is not None and cutoff is not None:
        tasks = getattr(potential, "tasks", ()) if conditions_of(potential) else ()
        return potential, StructureAdapter(species, float(cutoff), tasks, task)
    if task is not None:
        raise ValueError(f"task={task!r}, but {type(potential).__name__} is no potential of this package with tasks")
    found = known_potential(module)
    if found is None:
        raise ValueError(
            f"{type(potential).__name__} has no attributes 'species' and 'cutoff', which tell how to make its batches, "
            "and is of no known package; give an adapter=..., see lightning_januspipe.calculator.AtomsAdapter"
        )
    return found


def _with_same_values(potential: nn.Module) -> nn.Module:
    """Returns a copy of a potential whose parameters have the same memory as those that are given."""
    same = {id(parameter): nn.Parameter(parameter.detach(), False) for parameter in potential.parameters()}
    return copy.deepcopy(potential, same)


def _first_device() -> str:
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def _dtype_of(potential: nn.Module) -> torch.dtype:
    """Returns the type of most weights, float32 or float64."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in [*potential.parameters(), *potential.buffers()]:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return resolve_dtype(max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None)


def _moved(batch: Any, device: torch.device) -> Any:
    """Returns a batch on a device: tensors, objects with a method ``to``, and mappings of them."""
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, (list, tuple)) and not hasattr(batch, "to"):
        return type(batch)(_moved(value, device) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) or hasattr(batch, "to") else batch
