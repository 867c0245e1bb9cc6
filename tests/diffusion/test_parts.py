"""The parts of the sparse diffusion network against naive loops and torch's convolution."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from kaf_layer.diffusion.background import border_matrix, fill, fill_backward
from kaf_layer.diffusion.karatsuba import karatsuba_matrices
from kaf_layer.diffusion.neighbours import find_neighbours, find_rows, padded_neighbours


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_karatsubas_product_is_the_convolution(dims: int) -> None:
    before, after = karatsuba_matrices(dims)
    assert (before.shape, after.shape) == ((6**dims, 3**dims), (5**dims, 6**dims))
    a, b = torch.randint(-9, 10, (2, *[3] * dims)).float()  # whole numbers are exact
    expected = torch.zeros([5] * dims)
    for i in product(range(3), repeat=dims):
        for j in product(range(3), repeat=dims):
            expected[tuple(x + y for x, y in zip(i, j, strict=True))] += a[i] * b[j]
    assert torch.equal(after @ ((before @ a.flatten()) * (before @ b.flatten())), expected.flatten())


@pytest.mark.parametrize("size", [(4, 7), (1, 3), (2, 1, 5)])
@pytest.mark.parametrize("radius", [1, 2])
def test_neighbours(size: tuple[int, ...], radius: int) -> None:
    pixels = list(product(*map(range, size)))
    cells = torch.randint(len(pixels), (3, 6))
    index, inside = find_neighbours(cells, size, radius=radius)
    steps = list(product(range(radius, -radius - 1, -1), repeat=len(size)))
    for (k, step), b, n in product(enumerate(steps), range(3), range(6)):
        near = tuple(x + d for x, d in zip(pixels[cells[b, n]], step, strict=True))
        assert inside[k, b, n] == (near in pixels)
        assert near not in pixels or pixels[index[k, b, n]] == near


@pytest.mark.parametrize("size", [(4, 7), (1, 3), (2, 1, 5)])
def test_neighbours_in_padded_maps(size: tuple[int, ...]) -> None:
    pixels = list(product(*map(range, size)))
    padded = list(product(range(3), *(range(-1, length + 1) for length in size)))  # of three maps
    cells = torch.randint(len(pixels), (3, 6))
    index = padded_neighbours(cells, size)
    for (k, step), b, n in product(enumerate(product((1, 0, -1), repeat=len(size))), range(3), range(6)):
        near = (x + d for x, d in zip(pixels[cells[b, n]], step, strict=True))
        assert padded[index[6 * b + n, k]] == (b, *near)


@pytest.mark.parametrize("slots", [2, 7])
def test_each_pixel_has_one_row_where_a_keypoint_is_next_to_it(slots: int) -> None:
    size, cells = (3, 5), torch.randint(15, (14 // slots, slots))
    near = find_neighbours(cells, size, radius=1)
    rows = find_rows(*near, size)
    index, inside = (x.flatten(1).mT for x in near)
    assert rows.shape == (14, 9)
    row_of: dict[tuple[int, int], int] = {}
    for token, k in product(range(14), range(9)):
        if inside[token, k]:
            pixel, row = (token // slots, int(index[token, k])), int(rows[token, k])
            assert row_of.setdefault(pixel, row) == row > 0  # the same for all tokens around the pixel
            # Row 1 + k * M + t lies at neighbour k of token t.
            owner, neighbour = (row - 1) % 14, (row - 1) // 14
            assert pixel == (owner // slots, int(index[owner, neighbour]))
        else:
            assert rows[token, k] == 0
    assert len(set(row_of.values())) == len(row_of)


@pytest.mark.parametrize("size", [(4, 6), (1, 3), (2, 1), (1, 1), (2, 3, 4), (1, 1, 5)])
def test_the_background_is_torchs_convolution(size: tuple[int, ...]) -> None:
    dims = len(size)
    convolve = F.conv2d if dims == 2 else F.conv3d
    values = torch.randn(4, dtype=torch.float64)
    weight = torch.randn(3, 4, *[3] * dims, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64)
    constant = values.view(1, -1, *[1] * dims).expand(2, -1, *size)
    expected = convolve(constant, weight, bias, padding=1)
    out = torch.empty_like(expected)
    borders = border_matrix(dims).double()
    fill(out, values, weight.detach(), bias, borders)
    torch.testing.assert_close(out, expected.detach(), rtol=0, atol=1e-12)
    grad = torch.randn_like(out)
    expected.backward(grad)
    actual = fill_backward(grad, borders).view(3, 1, *[3] * dims) * values.view(1, -1, *[1] * dims)
    torch.testing.assert_close(actual, weight.grad, rtol=0, atol=1e-12)
