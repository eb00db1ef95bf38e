"""What the stages of each package's models send and compute again, at the sizes of published models.

    python tests/clients/cuts.py nequip     # in an environment with that package; one Markdown row for each cut

Sizes follow from one batch of rattled alloys with 18 neighbors for each atom. "again" is the share of the forward time
of the stages that goes into what depends on parameters and is computed by several of them.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "programs"))

from structures import CUTOFF, SYMBOLS

from lightning_januspipe.capture import CapturedPotential, ProgramCache, capture_module
from lightning_januspipe.capture.report import report
from lightning_januspipe.errors import TooFewParts
from lightning_januspipe.loader.examples import example_batches
from lightning_januspipe.runtime.user_step import with_batch

Model = tuple[str, Any, Any]
"""A name, a LightningModule and its training batches."""


def nequip(folder: Path) -> Iterator[Model]:
    """Yields NequIP with two numbers of layers."""
    import nequip_program
    from hydra.utils import instantiate
    from nequip.utils.global_state import set_global_state

    set_global_state()
    for layers, l_max in ((4, 2), (6, 1)):
        arguments = Namespace(
            structures="crystals", num_structures=8, batch_size=4, replicas=1, out=folder / "nequip.pt", ema=False
        )
        data = nequip_program.make_data(arguments)
        data.setup("fit")
        model = {
            "_target_": "nequip.model.NequIPGNNModel",
            "seed": 7,
            "model_dtype": "float32",
            "compile_mode": "eager",
            "type_names": list(SYMBOLS),
            "r_max": CUTOFF,
            "num_layers": layers,
            "l_max": l_max,
            "parity": True,
            "num_features": 64,
            "avg_num_neighbors": 18.0,
        }
        loss = {"_target_": "nequip.train.EnergyForceLoss", "per_atom_energy": True}
        loss["coeffs"] = {"total_energy": 1.0, "forces": 1.0}
        module = instantiate(
            {"_target_": "nequip.train.NequIPLightningModule", "loss": loss, "model": model},
            _recursive_=False,
            _convert_="all",
            num_datasets={"train": 1, "val": 1, "test": 0, "predict": 0},
        )
        yield f"NequIP, {layers} layers, l = {l_max}, 64 features", module, data.train_dataloader()


def schnetpack(folder: Path) -> Iterator[Model]:
    """Yields PaiNN and SchNet as SchNetPack's examples have them."""
    import compatible.sitecustomize  # noqa: F401 - a name that SchNetPack asks torch for
    import schnetpack as spk
    import schnetpack_program

    representations = {
        "PaiNN, 3 layers, 128 features": spk.representation.PaiNN(
            128, 3, spk.nn.GaussianRBF(20, CUTOFF), spk.nn.CosineCutoff(CUTOFF)
        ),
        "PaiNN, 6 layers, 128 features, shared filters": spk.representation.PaiNN(
            128, 6, spk.nn.GaussianRBF(20, CUTOFF), spk.nn.CosineCutoff(CUTOFF), shared_filters=True
        ),
        "SchNet, 6 layers, 128 features": spk.representation.SchNet(
            128, 6, spk.nn.GaussianRBF(20, CUTOFF), spk.nn.CosineCutoff(CUTOFF)
        ),
    }
    data = schnetpack_program.make_data(
        Namespace(structures="crystals", num_structures=8, batch_size=4, out=folder / "schnetpack.pt")
    )
    data.setup()
    data.train_dataset.transforms = [spk.transform.MatScipyNeighborList(cutoff=CUTOFF), spk.transform.CastTo32()]
    for name, representation in representations.items():
        model = spk.model.NeuralNetworkPotential(
            representation,
            [spk.atomistic.PairwiseDistances()],
            [spk.atomistic.Atomwise(n_in=128, output_key="energy"), spk.atomistic.Forces()],
        )
        outputs = [spk.task.ModelOutput(n, torch.nn.MSELoss(), 1.0, {}) for n in ("energy", "forces")]
        yield name, spk.task.AtomisticTask(model, outputs, optimizer_args={"lr": 1e-3}), data.train_dataloader()


def matgl(folder: Path) -> Iterator[Model]:
    """Yields TensorNet, M3GNet and CHGNet with MatGL's defaults."""
    import matgl_program
    from matgl.models import CHGNet, M3GNet, TensorNet

    arguments = Namespace(
        structures="periodic", frames=8, lone_atom=False, model="tensornet", layers=2, loss="mse_loss", batch_size=4
    )
    matgl_program.make_data(arguments)
    torch.set_default_dtype(torch.float32)
    matgl_program.matgl.set_default_dtype("float", 32)
    loader, module = matgl_program.make_data(arguments).train_dataloader(), matgl_program.make_module(arguments)
    models = {
        "TensorNet, 2 layers, 64 features": TensorNet(SYMBOLS, cutoff=CUTOFF, is_intensive=False),
        "TensorNet, 4 layers, 64 features": TensorNet(SYMBOLS, cutoff=CUTOFF, nblocks=4, is_intensive=False),
        "M3GNet, 3 layers, 64 features": M3GNet(
            SYMBOLS, cutoff=CUTOFF, threebody_cutoff=matgl_program.THREEBODY_CUTOFF, is_intensive=False
        ),
        "CHGNet, 4 layers, 64 features": CHGNet(
            SYMBOLS, cutoff=CUTOFF, threebody_cutoff=matgl_program.THREEBODY_CUTOFF
        ),
    }
    for name, model in models.items():
        module.model.model = model
        yield name, module.float(), loader


def mace(folder: Path) -> Iterator[Model]:
    """Yields MACE with 128 channels."""
    import mace_program
    from e3nn import o3

    loader = mace_program.DataLoader(mace_program.dataset("periodic", 8), batch_size=4, shuffle=False)
    for layers, irreps in ((2, "128x0e + 128x1o"), (4, "64x0e + 64x1o")):
        model = mace_program.model("scaleshift", layers, 3, hidden_irreps=o3.Irreps(irreps), max_ell=3)
        yield f"MACE, {layers} layers, {irreps}", mace_program.Potential(model), loader


def matris(folder: Path) -> Iterator[Model]:
    """Yields MatRIS with its defaults."""
    import matris_program

    module = matris_program.Training(2, "efs")
    for layers in (2, 4):
        module.model = matris_program.MatRIS(num_layers=layers, pairwise_cutoff=CUTOFF, three_body_cutoff=3.2)
        samples = [matris_program.sample(i, "periodic", module.model.graph_converter) for i in range(8)]
        samples = [(graph, {n: v.float() for n, v in labels.items()}) for graph, labels in samples]
        loader = torch.utils.data.DataLoader(samples, batch_size=4, collate_fn=matris_program.collate)
        yield f"MatRIS, {layers} layers", module, loader


PACKAGES: dict[str, Callable[[Path], Iterator[Model]]] = {
    "nequip": nequip,
    "schnetpack": schnetpack,
    "matgl": matgl,
    "mace": mace,
    "matris": matris,
}


def row(name: str, module: Any, loader: Any, num_stages: int, folder: Path) -> str:
    """Returns a row of the table."""
    module.log = lambda *args, **kwargs: None
    traced_batch, other_batch = example_batches(loader, 1)
    cache = ProgramCache(folder / f"{abs(hash((name, num_stages)))}")
    seconds = []
    for _ in range(2):  # traced, and from the cache
        began = time.perf_counter()
        step = with_batch(module.training_step)
        captured = capture_module(module, step, traced_batch, other_batch, [list(range(num_stages))], cache=cache)
        seconds.append(time.perf_counter() - began)
    assert isinstance(captured.potential, CapturedPotential)
    found = report(captured.potential)
    boundaries = "; ".join(dict.fromkeys(str(boundary) for boundary in found.boundaries))
    again = sum(map(len, captured.potential.cut.replicated))
    shared = len(found.shared)
    total = sum(s.total for s in captured.costs)
    shares = " + ".join(f"{100 * s.total / total:.0f}" for s in captured.costs)
    times = f"{seconds[0]:.1f} | {seconds[1]:.1f}"
    return f"| {name} | {num_stages} | {boundaries} | {shares} | {again} | {shared} | {times} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("package", choices=PACKAGES)
    parser.add_argument("--stages", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| model | stages | boundary | work % | again | shared | start s | cached s |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for label, module, loader in PACKAGES[arguments.package](folder):
            module.train()
            for num_stages in arguments.stages:
                try:
                    print(row(label, module, loader, num_stages, folder), flush=True)
                except TooFewParts as error:
                    print(f"| {label} | {num_stages} | {error.most} parts at most | | | | | |", flush=True)


if __name__ == "__main__":
    main()
