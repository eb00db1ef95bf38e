"""Padded batches of AIMNet2 as packed ones; tests/clients trains with the package itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_januspipe.capture.adapters.aimnet_padded import is_padded, joined, packed, separated, with_masks

NUMBERS = torch.tensor([[1, 8, 0], [6, 0, 0]])


def batch(numbers: Tensor = NUMBERS) -> dict[str, Tensor]:
    """Returns molecules at random positions."""
    return {"coord": torch.rand(*numbers.shape, 3), "numbers": numbers, "charge": torch.zeros(len(numbers))}


def test_neighbors_are_the_other_atoms_of_a_molecule() -> None:
    data = batch()
    found = packed(data)
    assert is_padded(data) and not is_padded(found)
    assert found["nbmat"].tolist() == [[6, 1, 6], [0, 6, 6], [6] * 3, [6] * 3, [6] * 3, [6] * 3, [6] * 3]
    assert found["mol_idx"].tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert found["is_padding"].tolist() == [False, False, True, False, True, True, True]
    assert torch.equal(found["coord"][:-1].reshape(2, 3, 3), data["coord"])
    assert with_masks(found | {"mask_ij": found["nbmat"] == 6})["mol_sizes"].tolist() == [2, 1]


@pytest.mark.parametrize("is_whole", [False, True])
def test_what_is_returned_is_restored(is_whole: bool) -> None:
    """Molecules of one size without padding have one number of atoms for all."""
    data = batch(torch.ones(2, 3, dtype=torch.int64) if is_whole else NUMBERS)
    sizes = torch.tensor(3) if is_whole else torch.tensor([2, 1])
    returned = data | {"_natom": sizes, "mol_sizes": sizes, "_nb_mode": torch.tensor(0)}
    returned |= {
        "_input_padded": torch.tensor(not is_whole),
        "forces": torch.rand(2, 3, 3),
        "d_ij": torch.rand(2, 3, 3),
    }
    found = joined(returned)
    assert found["forces"].shape == found["d_ij"].shape == (7, 3) and found["_natom"].shape == (2,)
    restored = separated(data, found)
    assert restored.keys() == returned.keys()
    assert all(torch.equal(restored[name], value) for name, value in returned.items())


def test_both_forms_have_the_same_entries() -> None:
    """The traced call returns the packed batch: the order of its entries has to be that of the padded batch."""
    data = batch()
    sizes = torch.tensor([2, 1])
    more = {"_input_padded": torch.tensor(True), "energy": torch.zeros(2)}
    padded = joined(data | more | {"_natom": sizes, "mol_sizes": sizes, "_nb_mode": torch.tensor(0)})
    given = packed(data)
    given["coord"][-1] = 1.0  # the last row counts as zero
    found = joined(given | {"mol_sizes": sizes, "_natom": sizes, "_nb_mode": torch.tensor(1)} | more)
    assert list(found) == list(padded)
    assert all(torch.equal(value, padded[name]) for name, value in found.items())
