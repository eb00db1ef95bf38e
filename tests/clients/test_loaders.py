"""Loaders of MLIP projects, as their users make them: split into micro-batches, and looked at for capture.

Slow, and each skipped where its project is not installed; run where it is, with ``python -m pytest -m slow
tests/clients/test_loaders.py``.
"""

from __future__ import annotations

import os
import typing
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_januspipe.loader.examples import example_batches
from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.packing import ATOM_WEIGHT
from lightning_januspipe.loader.sample_fields import sample_cost
from lightning_januspipe.loader.split import split_batches

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CUTOFF = 4.0
NUM_FRAMES = 24


def frames() -> list[Any]:
    """Returns rattled metal boxes of 4, 8 and 16 atoms; energy -i marks structure i."""
    build = pytest.importorskip("ase.build")
    from ase.calculators.singlepoint import SinglePointCalculator

    rng = np.random.default_rng(0)
    found = []
    for i in range(NUM_FRAMES):
        atoms = build.bulk("Cu", "fcc", a=3.75, cubic=True) * [(1, 1, 1), (2, 1, 1), (2, 2, 1)][i % 3]
        atoms.set_chemical_symbols(rng.choice(["Al", "Cu", "Ni"], len(atoms)).tolist())
        atoms.positions += 0.05 * rng.standard_normal(atoms.positions.shape)
        forces = rng.standard_normal(atoms.positions.shape)
        atoms.calc = SinglePointCalculator(atoms, energy=-float(i), forces=forces, stress=rng.standard_normal(6))
        found.append(atoms)
    return found


@dataclass
class Client:
    """A project's loaders and how to read its samples and batches.

    Attributes:
        dataset: what the loaders read.
        loader: makes one, from further arguments of its class.
        energies: of the structures of a batch.
        edges: of a batch.
        edges_of_sample: of a sample.
    """

    dataset: Any
    loader: Callable[..., Any]
    energies: Callable[[Any], torch.Tensor]
    edges: Callable[[Any], int]
    edges_of_sample: Callable[[Any], int]


def pyg(folder: Path) -> Client:
    data = pytest.importorskip("torch_geometric.data")
    from torch_geometric.loader import DataLoader

    samples = []
    for i, atoms in enumerate(frames()):
        edges = 40 * len(atoms)
        samples.append(
            data.Data(
                pos=torch.tensor(atoms.positions),
                z=torch.tensor(atoms.numbers),
                edge_index=torch.randint(len(atoms), (2, edges)),
                shifts=torch.zeros(edges, 3),
                y=torch.tensor([-float(i)]),
                note="left out",
            )
        )
    loader = partial(DataLoader, samples, follow_batch=["pos"], exclude_keys=["note"])
    return Client(samples, loader, lambda b: b.y, lambda b: b.edge_index.shape[1], lambda s: s.num_edges)


def matgl(folder: Path) -> Client:
    os.environ.setdefault("MATGL_BACKEND", "PYG")
    data = pytest.importorskip("matgl.graph.data")
    from matgl.ext.pymatgen import Structure2Graph
    from pymatgen.io.ase import AseAtomsAdaptor

    atoms = frames()
    structures = [AseAtomsAdaptor.get_structure(a) for a in atoms]
    labels = {
        "energies": [a.get_potential_energy() for a in atoms],
        "forces": [a.get_forces().tolist() for a in atoms],
        "stresses": [a.get_stress(voigt=False).tolist() for a in atoms],
    }
    dataset = data.MGLDataset(
        structures=structures,
        converter=Structure2Graph(element_types=("Al", "Cu", "Ni"), cutoff=CUTOFF),
        labels=labels,
        root=str(folder / "matgl"),
        save_cache=False,
    )

    def loader(shuffle: bool = False, **arguments: Any) -> Any:
        arguments = {"num_workers": 0, **arguments}
        train, val = data.MGLDataLoader(dataset, dataset, data.collate_fn_pes, **arguments)
        return train if shuffle else val

    return Client(dataset, loader, lambda b: b[3], lambda b: b[0].edge_index.shape[1], lambda s: s[0].num_edges)


def mace(folder: Path) -> Client:
    data = pytest.importorskip("mace.data")
    from mace.tools import AtomicNumberTable
    from mace.tools.torch_geometric.dataloader import DataLoader

    table = AtomicNumberTable([13, 28, 29])
    samples = []
    for atoms in frames():
        atoms.info["REF_energy"], atoms.arrays["REF_forces"] = atoms.get_potential_energy(), atoms.get_forces()
        config = data.config_from_atoms(
            atoms,
            key_specification=data.KeySpecification({"energy": "REF_energy"}, {"forces": "REF_forces"}),
        )
        samples.append(data.AtomicData.from_config(config, z_table=table, cutoff=CUTOFF))
    return Client(
        samples,
        partial(DataLoader, samples),
        lambda b: b.energy,
        lambda b: b.edge_index.shape[1],
        lambda s: s.edge_index.shape[1],
    )


def schnetpack(folder: Path) -> Client:
    import torch.utils.data.dataloader as dataloader

    if not hasattr(dataloader, "T_co"):  # schnetpack 2.1 imports a name that torch no longer exports
        dataloader.T_co = typing.TypeVar("T_co", covariant=True)  # type: ignore[attr-defined]
    data = pytest.importorskip("schnetpack.data")
    import schnetpack.transform as transform

    atoms = frames()
    dataset = data.ASEAtomsData.create(
        str(folder / "data.db"), distance_unit="Ang", property_unit_dict={"energy": "eV", "forces": "eV/Ang"}
    )
    dataset.add_systems(
        [{"energy": np.array([a.get_potential_energy()]), "forces": a.get_forces()} for a in atoms], atoms
    )
    dataset.transforms = [transform.MatScipyNeighborList(cutoff=CUTOFF), transform.CastTo32()]
    return Client(
        dataset,
        partial(data.AtomsLoader, dataset),
        lambda b: b["energy"],
        lambda b: b["_idx_i"].numel(),
        lambda s: s["_idx_i"].numel(),
    )


def nequip(folder: Path) -> Client:
    pytest.importorskip("nequip")
    from ase.io import write
    from hydra.utils import instantiate
    from nequip.utils.global_state import set_global_state

    set_global_state()
    write(folder / "data.xyz", frames(), format="extxyz")

    def loader(**arguments: Any) -> Any:
        module = instantiate(
            {
                "_target_": "nequip.data.datamodule.ASEDataModule",
                "seed": 1,
                "train_file_path": str(folder / "data.xyz"),
                "val_file_path": str(folder / "data.xyz"),
                "transforms": [
                    {
                        "_target_": "nequip.data.transforms.ChemicalSpeciesToAtomTypeMapper",
                        "model_type_names": ["Al", "Cu", "Ni"],
                    },
                    {"_target_": "nequip.data.transforms.NeighborListTransform", "r_max": CUTOFF},
                ],
                "train_dataloader": {"_target_": "torch.utils.data.DataLoader", **arguments},
                "val_dataloader": {"_target_": "torch.utils.data.DataLoader"},
            },
            _recursive_=False,
        )
        module.prepare_data()
        module.setup("fit")
        return module.train_dataloader()

    return Client(
        loader().dataset,
        loader,
        lambda b: b["total_energy"],
        lambda b: b["edge_index"].shape[1],
        lambda s: s["edge_index"].shape[1],
    )


CLIENTS = [pyg, matgl, mace, schnetpack, nequip]


@pytest.fixture(scope="module", params=CLIENTS, ids=lambda c: c.__name__)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Client:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return request.param(tmp_path_factory.mktemp("data"))


def energies(client: Client, batch: Any) -> list[float]:
    """Returns which structures a batch holds, in its order."""
    return [round(float(e)) for e in client.energies(batch).reshape(-1)]


def everything(client: Client, batches: Any) -> list[list[int]]:
    """Returns which structures each batch holds, in any order."""
    found = []
    for batch in batches:
        parts = batch.batches if isinstance(batch, MicroBatches) else [batch]
        found.append(sorted(e for part in parts for e in energies(client, part)))
    return found


WORKERS = [{}, {"num_workers": 2, "persistent_workers": True, "prefetch_factor": 3}]


@pytest.mark.parametrize("arguments", WORKERS, ids=["here", "workers"])
def test_batches_are_split(client: Client, arguments: dict[str, Any]) -> None:
    user = client.loader(batch_size=8, **arguments)
    plain = list(client.loader(batch_size=8))
    split = split_batches(user, 4, required=True)
    for _ in range(2):
        found = list(split)
        assert everything(client, found) == everything(client, plain)
        for batch, whole in zip(found, plain, strict=True):
            assert isinstance(batch, MicroBatches) and len(batch) == 4
            assert all(type(part) is type(whole) for part in batch)
            edges = [client.edges(part) for part in batch]
            assert sum(edges) == client.edges(whole)
            assert max(edges) < 1.6 * sum(edges) / 4, f"micro-batches of {edges} edges"
    assert everything(client, client.loader(batch_size=8)) == everything(client, plain)


def test_cost_is_edges_and_atoms(client: Client) -> None:
    samples = [client.dataset[i] for i in range(6)]
    for sample in samples:
        edges = client.edges_of_sample(sample)
        num_atoms = (sample_cost(sample) - edges) / ATOM_WEIGHT
        assert num_atoms == int(num_atoms) and 0 <= num_atoms < edges


@pytest.mark.parametrize("arguments", WORKERS, ids=["here", "workers"])
@pytest.mark.parametrize("num_microbatches", [1, 4])
def test_examples(client: Client, arguments: dict[str, Any], num_microbatches: int) -> None:
    """Batches as the project's own, of different sizes; what comes afterwards, in random order, is not changed."""
    kind = type(next(iter(client.loader(batch_size=8))))

    def passes(look: bool) -> list[list[int]]:
        torch.manual_seed(3)
        np.random.seed(3)
        loader = split_batches(client.loader(batch_size=8, shuffle=True, **arguments), num_microbatches, required=True)
        iterator = iter(loader)
        if look:
            traced, other = example_batches(loader, num_microbatches)
            assert type(traced) is type(other) is kind
            assert len(energies(client, traced)) >= 2
            assert len(energies(client, other)) == 8 // num_microbatches
            assert len({len(energies(client, b)) for b in (traced, other)}) == 2
            assert client.edges(traced) > 0 < client.edges(other)
        return everything(client, iterator) + everything(client, loader)

    assert passes(look=True) == passes(look=False)


def test_pyg_keys_and_batches_of_variable_size(tmp_path: Path) -> None:
    client = pyg(tmp_path)
    from torch_geometric.loader import DynamicBatchSampler

    sampler = DynamicBatchSampler(client.dataset, max_num=40, mode="node")
    loader = split_batches(client.loader(batch_sampler=sampler), 4, required=True)
    traced, other = example_batches(loader, 4)
    batches = [*iter(loader)]  # not list(loader), which would ask for a length that this sampler has not
    sizes = {sum(b.num_samples) for b in batches}
    assert len(sizes) > 1 and sum(sum(b.num_samples) for b in batches) == NUM_FRAMES
    assert all(len(b) == min(4, sum(b.num_samples)) for b in batches)
    for batch in (traced, other, *batches[0]):
        assert "pos_batch" in batch and "note" not in batch
        assert batch.num_graphs == int(batch.pos_batch.max()) + 1


def test_matgl_shards_on_disk(tmp_path: Path) -> None:
    """Its batch sampler counts epochs whenever it is iterated: capture must not count one."""
    client = matgl(tmp_path)
    from matgl.graph.data import MGLDataModule, write_mgl_shards

    dataset = client.dataset
    labels = [{k: v[i] for k, v in dataset.labels.items()} for i in range(len(dataset))]
    records = ({"structure": s, "labels": v} for s, v in zip(dataset.structures, labels, strict=True))
    write_mgl_shards(records, tmp_path / "train", converter=dataset.converter, shard_size=6)
    (tmp_path / "valid").symlink_to(tmp_path / "train")

    def passes(look: bool) -> list[list[int]]:
        module = MGLDataModule(tmp_path, batch_size=3, num_workers=0, seed=1)
        module.setup("fit")
        loader = split_batches(module.train_dataloader(), 2, required=True)
        if look:
            traced, other = example_batches(loader, 2)
            assert (len(energies(client, traced)), len(energies(client, other))) == (3, 2)
        return everything(client, loader) + everything(client, loader)

    found = passes(look=True)
    assert len(found) == 16 and found[:8] != found[8:]
    assert found == passes(look=False)


def test_state_of_a_loader_that_resumes() -> None:
    """A data module that keeps its loader saves how far training is, not how far its unused loader is."""
    module = pytest.importorskip("torchdata.stateful_dataloader")

    def loader() -> Any:
        return module.StatefulDataLoader(list(range(20)), batch_size=4, shuffle=True, collate_fn=list)

    torch.manual_seed(0)
    expected = [sorted(b) for b in loader()]
    torch.manual_seed(0)
    user = loader()
    split = split_batches(user, 2, required=True)
    iterator = iter(split)
    example_batches(split, 2)
    first = [next(iterator) for _ in range(2)]
    assert [sorted(chain(*b.batches)) for b in first] == expected[:2]
    state = user.state_dict()
    assert state == split.state_dict()

    resumed = loader()
    resumed.load_state_dict(state)
    rest = [sorted(chain(*b.batches)) for b in split_batches(resumed, 2, required=True)]
    assert rest == expected[2:]
    again = split_batches(resumed, 2, required=True)
    assert len(list(again)) == 5, "the state that was loaded is used once"


def test_schnetpack_sampler(tmp_path: Path) -> None:
    client = schnetpack(tmp_path)
    from schnetpack.data.sampler import NumberOfAtomsCriterion, StratifiedSampler

    sampler = StratifiedSampler(client.dataset, NumberOfAtomsCriterion(), num_samples=12, num_bins=2, verbose=False)
    batches = torch.utils.data.BatchSampler(sampler, 4, drop_last=True)
    loader = split_batches(client.loader(batch_sampler=batches), 2, required=True)
    example_batches(loader, 2)
    assert [len(b) for b in loader] == [2, 2, 2]


def test_nequip_sampler_that_must_be_told_its_epoch(tmp_path: Path) -> None:
    client = nequip(tmp_path)
    from nequip.data._sampler import PartialSampler

    sampler = PartialSampler(client.dataset, num_samples_per_epoch=8, generator=torch.Generator().manual_seed(1))
    loader = client.loader(batch_size=4)
    arguments = {"batch_size": 4, "sampler": sampler, "collate_fn": loader.collate_fn}
    split = split_batches(torch.utils.data.DataLoader(client.dataset, **arguments), 2, required=True)
    example_batches(split, 2)
    seen = []
    for epoch in range(3):
        sampler.step_epoch(epoch)
        seen += [e for b in everything(client, split) for e in b]
    assert sorted(seen) == sorted(-i for i in range(NUM_FRAMES))
