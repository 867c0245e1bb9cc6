"""The fit of a quadratic against quadratics that are known."""

import itertools

import pytest
import torch

from kaf_layer.detection.sift.quadratic import central_differences, fit_quadratic, is_corner


@pytest.mark.parametrize("axes", [3, 4])
def test_a_quadratic_is_found_again(axes: int) -> None:
    generator = torch.Generator().manual_seed(0)
    value, gradient, root = (
        torch.randn(5, *shape, generator=generator, dtype=torch.float64) for shape in ((), (axes,), (axes, axes))
    )
    hessian = root + root.mT
    places = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=axes)), dtype=torch.float64)
    around = value[:, None] + gradient @ places.T + torch.einsum("pi,nij,pj->np", places, hessian, places) / 2
    fit = fit_quadratic(around, central_differences(axes, around))
    torch.testing.assert_close(fit.value, value)
    torch.testing.assert_close(fit.downhill, -gradient)
    torch.testing.assert_close(fit.hessian, hessian)
    space = slice(axes - 3, axes)  # in volumes layers are solved on their own
    torch.testing.assert_close(fit.offset[:, space], -torch.linalg.solve(hessian[:, space, space], gradient[:, space]))
    if axes == 4:
        torch.testing.assert_close(fit.offset[:, 0], -gradient[:, 0] / hessian[:, 0, 0])


def test_singular_fits_are_finite_and_no_corners() -> None:
    layer, y, x = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=3))).unbind(1)
    around = torch.stack([torch.zeros(27), x, y**2 + x, y**2 + x**2 + layer])  # of ranks 0, 0, 1 and 2
    fit = fit_quadratic(around, central_differences(3, around))
    assert fit.offset.isfinite().all()
    assert fit.offset[3, 0].abs() > 1e6
    assert is_corner(fit.hessian[:, 1:, 1:], 10.0).tolist() == [False, False, False, True]
