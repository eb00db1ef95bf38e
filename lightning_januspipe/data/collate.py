"""Joins the samples of structures into batches."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_januspipe import keys


def collate_structures(samples: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Joins samples into one batch.

    Tensors of atoms, edges and structures are concatenated. Each sample's ``edge_index`` is increased by the number of
    atoms in the samples before it, and its ``batch`` by the number of structures. A sample may itself be a batch.
    Tensors under other keys are concatenated along their first dimension.

    Args:
        samples: Samples as ``StructureDataset`` returns them, with N_s atoms, E_s edges and B_s structures.

    Returns:
        A batch of copies, with N = ΣN_s atoms, E = ΣE_s edges and B = ΣB_s structures.

    Raises:
        ValueError: There are no samples, or they do not all have the same keys.
    """
    if not samples:
        raise ValueError("no samples to collate; expected at least one")
    names = samples[0].keys()
    for number, sample in enumerate(samples):
        if sample.keys() != names:
            raise ValueError(
                f"sample {number} has the keys {sorted(sample)}, sample 0 has {sorted(names)}; samples of one batch "
                "must have the same keys"
            )

    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    num_atoms = num_structures = 0
    for sample in samples:
        for name, tensor in sample.items():
            if name == keys.EDGE_INDEX:
                tensor = tensor + num_atoms
            elif name == keys.BATCH:
                tensor = tensor + num_structures
            parts[name].append(tensor)
        num_atoms += sample[keys.POSITIONS].shape[0]
        num_structures += sample[keys.CELL].shape[0]
    return {name: torch.cat(tensors, dim=1 if name == keys.EDGE_INDEX else 0) for name, tensors in parts.items()}
