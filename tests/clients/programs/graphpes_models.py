"""graph-pes in its own TrainingTask, which asks each term of a sum of models for its derivatives."""

from __future__ import annotations

from functools import partial
from typing import Any

from ase import Atoms
from client_parts import CUTOFF, Structures, seeded_model
from graph_pes.atomic_graph import AtomicGraph
from graph_pes.data.loader import GraphDataLoader
from graph_pes.models import AdditionModel, LearnableOffset, LennardJones, NequIP, PaiNN, TensorNet
from graph_pes.training.loss import PerAtomEnergyLoss, PropertyLoss, TotalLoss
from graph_pes.training.opt import Optimizer
from graph_pes.training.tasks import TrainingTask
from graph_pes.utils.nn import PerElementParameter
from torch import Tensor, nn

ELEMENTS = ("Al", "Cu", "Ni")


def sample(atoms: Atoms) -> AtomicGraph:
    """Returns a graph with labels in double precision."""
    return _double(AtomicGraph.from_ase(atoms, cutoff=CUTOFF))


def _double(value: Any) -> Any:
    if isinstance(value, AtomicGraph):
        return AtomicGraph(*map(_double, value))
    if isinstance(value, dict):
        return {name: _double(x) for name, x in value.items()}
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def make_task(model: nn.Module, stress: bool = True) -> TrainingTask:
    """Trains energies, forces and, where there are cells, stress."""
    for parameter in model.parameters():
        if isinstance(parameter, PerElementParameter):
            parameter.register_elements([13, 28, 29])
    losses = [PerAtomEnergyLoss("RMSE"), PropertyLoss("forces", "MSE")]
    losses += [PropertyLoss("stress", "MSE", 10.0)] if stress else []
    return TrainingTask(model, TotalLoss(losses), Optimizer("SGD", lr=1e-3), None, [])


def make_sum(stress: bool = True) -> TrainingTask:
    """Energies of elements, a pair potential and PaiNN, whose shorter cutoff leaves edges out."""

    def make() -> nn.Module:
        offset = LearnableOffset(Al=-1.0, Cu=-2.0, Ni=-3.0)
        network = PaiNN(cutoff=CUTOFF - 0.3, channels=8, radial_features=5, layers=2)
        return AdditionModel(offset=offset, pairs=LennardJones(cutoff=CUTOFF), network=network)

    return make_task(seeded_model(make), stress)


def make_tensornet() -> TrainingTask:
    """TensorNet, which reads the features of both ends of edges at once."""
    return make_task(seeded_model(lambda: TensorNet(cutoff=CUTOFF, channels=8, radial_features=5, layers=2)))


def make_nequip() -> TrainingTask:
    """NequIP as graph-pes has it."""
    features = {"channels": [8, 4], "l_max": 1, "use_odd_parity": False}
    return make_task(seeded_model(lambda: NequIP(list(ELEMENTS), cutoff=CUTOFF, features=features, layers=2)))


make_sum_without_stress = partial(make_sum, False)
crystals = partial(Structures, "crystals", sample, loader=GraphDataLoader)
molecules = partial(Structures, "molecules", sample, loader=GraphDataLoader)
