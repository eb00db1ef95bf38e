import pytest
import torch

from lightning_januspipe.models.e3nn_compat import o3
from lightning_januspipe.models.equivariant import EquivariantLinear, Gate, Interaction
from lightning_januspipe.models.spherical import Coupling, SphericalHarmonics

pytestmark = pytest.mark.usefixtures("float64")


def matrix_and_features(l_max: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    rotation = -o3.rand_matrix()
    matrix = o3.Irreps.spherical_harmonics(l_max).D_from_matrix(rotation)
    return rotation, matrix, torch.randn(6, (l_max + 1) ** 2, 4)


@pytest.mark.parametrize("module", [EquivariantLinear, Gate])
@pytest.mark.parametrize("l_max", [0, 1, 2])
def test_pointwise_modules_are_equivariant(module, l_max: int) -> None:
    _, matrix, features = matrix_and_features(l_max)
    function = module(l_max, 4)
    result = function(features)
    assert result.shape == features.shape
    torch.testing.assert_close(function(matrix @ features), matrix @ result)
    assert not torch.allclose(result, features)


@pytest.mark.parametrize(("l_in", "l_out"), [(0, 2), (2, 2), (2, 0), (0, 0)])
def test_interaction_is_equivariant(l_in: int, l_out: int) -> None:
    rotation, _, features = matrix_and_features(l_in)
    coupling, harmonics = Coupling(l_in, 2, l_out), SphericalHarmonics(2)
    layer = Interaction(l_in, l_out, coupling.paths_per_degree, 4, 2, 3, [5], avg_num_neighbors=3.0)
    species = torch.tensor([0, 1, 0, 1, 1, 0])
    source, target = torch.tensor([[0, 1, 2, 3, 5], [1, 0, 1, 1, 0]])
    directions = torch.nn.functional.normalize(torch.randn(5, 3), dim=-1)
    basis = torch.randn(5, 3)
    into = o3.Irreps.spherical_harmonics(l_in).D_from_matrix(rotation)
    out_of = o3.Irreps.spherical_harmonics(l_out).D_from_matrix(rotation)

    result = layer(features, species, source, target, coupling(harmonics(directions)), basis)
    rotated = layer(into @ features, species, source, target, coupling(harmonics(directions @ rotation.T)), basis)
    assert result.shape == (6, (l_out + 1) ** 2, 4)
    torch.testing.assert_close(rotated, out_of @ result)


def test_messages_go_from_source_to_target() -> None:
    _, _, features = matrix_and_features(1)
    coupling = Coupling(1, 1, 1)
    layer = Interaction(1, 1, coupling.paths_per_degree, 4, 1, 3, [5], avg_num_neighbors=1.0)
    matrices = coupling(SphericalHarmonics(1)(torch.tensor([[0.0, 0.6, 0.8]])))

    def updated(values: torch.Tensor) -> torch.Tensor:
        edge = torch.tensor([2]), torch.tensor([4])
        return layer(values, torch.zeros(6, dtype=torch.long), *edge, matrices, torch.ones(1, 3))

    moved = features.clone()
    moved[2] += 1.0
    changed = (updated(moved) - updated(features)).abs().amax(dim=(1, 2)) > 1e-6
    assert changed.tolist() == [False, False, True, False, True, False]
