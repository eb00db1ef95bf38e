import pytest
import torch

from lightning_januspipe.models.radial import BesselBasis, PolynomialCutoff, RadialNetwork

pytestmark = pytest.mark.usefixtures("float64")


def derivatives(function, x: float) -> list[float]:
    point = torch.tensor([x], requires_grad=True)
    values = [function(point).sum()]
    for _ in range(2):
        (gradient,) = torch.autograd.grad(values[-1], point, create_graph=True)
        values.append(gradient.sum())
    return [value.item() for value in values]


def test_cutoff_vanishes_smoothly() -> None:
    envelope = PolynomialCutoff(cutoff=4.0)
    assert envelope(torch.tensor([0.0])).item() == 1.0
    assert derivatives(envelope, 4.0 - 1e-7) == pytest.approx([0.0] * 3, abs=1e-4)
    assert derivatives(envelope, 5.0) == [0.0] * 3
    values = envelope(torch.linspace(0, 4, 50))
    assert (values.diff() <= 0).all()


def test_basis_is_the_closed_form() -> None:
    basis = BesselBasis(num_bessel=3, cutoff=4.0, exponent=6)
    r = torch.tensor([1.3])
    x = r / 4.0
    envelope = 1 - 28 * x**6 + 48 * x**7 - 21 * x**8
    expected = torch.stack([(2 / 3) ** 0.5 * torch.sin(n * torch.pi * x) / x * envelope for n in (1, 2, 3)], dim=-1)
    torch.testing.assert_close(basis(r), expected)
    assert basis(torch.tensor([4.0, 4.5])).abs().max() == 0.0


def test_frequencies_are_trained_on_request() -> None:
    assert not list(BesselBasis(3, 4.0).parameters())
    (frequencies,) = BesselBasis(3, 4.0, trainable=True).parameters()
    torch.testing.assert_close(frequencies, torch.pi * torch.arange(1.0, 4.0))


def test_network_maps_zero_to_zero() -> None:
    network = RadialNetwork(4, [8, 8], 5)
    assert network(torch.zeros(2, 4)).abs().max() == 0.0
    assert network(torch.ones(2, 4)).abs().max() > 0.0
    assert network(torch.zeros(0, 4)).shape == (0, 5)


@pytest.mark.parametrize(
    "build",
    [
        lambda: PolynomialCutoff(-1.0),
        lambda: PolynomialCutoff(4.0, exponent=1),
        lambda: BesselBasis(0, 4.0),
        lambda: RadialNetwork(4, [0], 5),
    ],
)
def test_rejects(build) -> None:
    with pytest.raises(ValueError, match="got"):
        build()
