import e3nn
import pytest
import torch

from lightning_januspipe.models.e3nn_compat import o3
from lightning_januspipe.models.spherical import Coupling, SphericalHarmonics, degree_of_component

pytestmark = pytest.mark.usefixtures("float64")


def rotation_matrices(l_max: int, *, inverse: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """A rotation (followed by an inversion) of vectors, and of features up to l_max with natural parity."""
    torch.manual_seed(1)
    rotation = o3.rand_matrix()
    irreps = o3.Irreps.spherical_harmonics(l_max)
    if inverse:
        rotation = -rotation
    return rotation, irreps.D_from_matrix(rotation)


@pytest.mark.parametrize("l_max", [0, 1, 2, 3, 4])
def test_harmonics_equal_those_of_e3nn(l_max: int) -> None:
    directions = torch.nn.functional.normalize(torch.randn(7, 3), dim=-1)
    expected = o3.spherical_harmonics(list(range(l_max + 1)), directions, normalize=True, normalization="component")
    torch.testing.assert_close(SphericalHarmonics(l_max)(directions), expected)


def test_harmonics_of_nothing() -> None:
    harmonics = SphericalHarmonics(2)
    assert harmonics(torch.zeros(0, 3)).shape == (0, 9)
    torch.testing.assert_close(harmonics(torch.zeros(1, 3)), torch.eye(9)[:1])


def test_degrees() -> None:
    assert degree_of_component(2).tolist() == [0, 1, 1, 1, 2, 2, 2, 2, 2]


@pytest.mark.parametrize("inverse", [False, True])
def test_coupling_is_equivariant(inverse: bool) -> None:
    l_max = 2
    coupling = Coupling(l_max, l_max, l_max)
    assert coupling.paths_per_degree == [3, 4, 4]
    rotation, matrix = rotation_matrices(l_max, inverse=inverse)
    directions = torch.nn.functional.normalize(torch.randn(5, 3), dim=-1)
    features = torch.randn(5, 9, 4)
    harmonics = SphericalHarmonics(l_max)

    coupled = coupling(harmonics(directions)) @ features
    rotated = coupling(harmonics(directions @ rotation.T)) @ (matrix @ features)
    start = 0
    for degree, paths in enumerate(coupling.paths_per_degree):
        rows = slice(start, start + (2 * degree + 1) * paths)
        block = coupled[:, rows].unflatten(1, (2 * degree + 1, paths))
        components = slice(degree**2, (degree + 1) ** 2)
        expected = torch.einsum("ij,ejpf->eipf", matrix[components, components], block)
        torch.testing.assert_close(rotated[:, rows].unflatten(1, (2 * degree + 1, paths)), expected)
        assert block.abs().amax(dim=(0, 1, 3)).min() > 1e-3, "a path is empty"
        start = rows.stop
    assert start == coupled.shape[1]


def test_global_settings_of_e3nn_are_left_alone() -> None:
    before = e3nn.get_optimization_defaults()
    SphericalHarmonics(3)
    Coupling(2, 2, 2)
    assert e3nn.get_optimization_defaults() == before
