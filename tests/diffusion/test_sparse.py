"""The parts of the sparse diffusion network against naive loops and torch's convolution."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F

from kaf_layer.diffusion.sparse import (
    convolve_constant,
    convolve_deviations,
    find_neighbours,
    find_rows,
)


@pytest.mark.parametrize("size", [(4, 7), (1, 3), (2, 1, 5)])
@pytest.mark.parametrize("radius", [1, 2])
def test_neighbours(size: tuple[int, ...], radius: int) -> None:
    pixels = list(product(*map(range, size)))
    cells = torch.randint(len(pixels), (3, 6))
    index, inside = find_neighbours(cells, size, radius=radius)
    steps = list(product(range(radius, -radius - 1, -1), repeat=len(size)))
    for (k, step), b, n in product(enumerate(steps), range(3), range(6)):
        near = tuple(x + d for x, d in zip(pixels[cells[b, n]], step, strict=True))
        assert inside[b, n, k] == (near in pixels)
        assert near not in pixels or pixels[index[b, n, k]] == near


@pytest.mark.parametrize("slots", [2, 7])
def test_each_pixel_has_one_row_where_a_keypoint_is_next_to_it(slots: int) -> None:
    size, cells = (3, 5), torch.randint(15, (14 // slots, slots))
    near = find_neighbours(cells, size, radius=1)
    index, inside, rows = (x.flatten(0, 1) for x in (*near, find_rows(*near, size)))
    assert rows.shape == (14, 9)
    row_of: dict[tuple[int, int], int] = {}
    for token, k in product(range(14), range(9)):
        if inside[token, k]:
            pixel, row = (token // slots, int(index[token, k])), int(rows[token, k])
            assert row_of.setdefault(pixel, row) == row  # the same for all tokens around the pixel
            owner, neighbour = divmod(row, 9)
            assert pixel == (owner // slots, int(index[owner, neighbour]))
        else:
            assert rows[token, k] == 14 * 9
    assert len(set(row_of.values())) == len(row_of)


@pytest.mark.parametrize("size", [(4, 6), (1, 3), (2, 1), (1, 1), (2, 3, 4), (1, 1, 5)])
def test_the_constant_map_is_torchs_convolution(size: tuple[int, ...]) -> None:
    dims = len(size)
    convolution = (torch.nn.Conv2d if dims == 2 else torch.nn.Conv3d)(4, 3, 3, padding=1).double()
    values = torch.randn(4, dtype=torch.float64)
    constant, border, differences = convolve_constant(values, convolution.weight, convolution.bias, size)
    actual = constant[:, None].repeat(1, torch.Size(size).numel())
    actual = actual.scatter_add(1, border.expand(3, -1), differences).view(3, *size)
    expected = convolution(values.view(1, -1, *[1] * dims).expand(1, -1, *size))[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dims", [2, 3])
def test_patches_are_torchs_convolution_of_the_surroundings(dims: int) -> None:
    deviations = torch.randn(2, 3, 3**dims, 4, dtype=torch.float64)
    weight = torch.randn(5, 4, *[3] * dims, dtype=torch.float64)  # as of a convolution
    actual = convolve_deviations(deviations, weight).unflatten(3, [5] * dims)
    maps = deviations.flatten(0, 1).mT.unflatten(2, [3] * dims).flip(*range(2, 2 + dims))  # from the first pixel on
    expected = (F.conv2d if dims == 2 else F.conv3d)(maps, weight, padding=2).flip(*range(2, 2 + dims))
    torch.testing.assert_close(actual.flatten(0, 1), expected, rtol=0, atol=1e-12)
