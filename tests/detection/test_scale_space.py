"""The scale space against NumPy loops in float64."""

import dataclasses

import numpy as np
import pytest
import torch
from common import TARGET

from kaf_layer.detection import SIFTDetector
from kaf_layer.detection.sift.blur import blur, gaussian_kernels
from kaf_layer.detection.sift.extrema import find_extrema
from kaf_layer.detection.sift.pyramid import ScaleSpace, double, scale_space
from kaf_layer.detection.sift.sheets import sheets


def naive_blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Correlation with a sampled Gaussian, pixel by pixel along either axis."""
    radius = (round(8 * sigma + 1) | 1) // 2
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(image, [(radius, radius) if a == axis else (0, 0) for a in (0, 1)], mode="reflect")
        image = sum(w * np.take(padded, range(i, i + image.shape[axis]), axis) for i, w in enumerate(kernel))
    return image


@pytest.mark.parametrize("shape", [(11, 12), (31, 33), (64, 65), (97, 161), (130, 225)])
@pytest.mark.parametrize("sigmas", [(0.5, 0.8), (1.2, 1.9), (3.09, 5.0, 1.0)])
def test_blur_is_a_convolution(shape, sigmas):
    images = torch.rand(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(TARGET.device)
    expected = images.cpu().numpy()
    kernels = [gaussian_kernels(sigmas, images)] * 2
    memory, (sheet,) = sheets(images, [shape], len(sigmas), kernels)
    memory.fill_(torch.nan)  # as new memory may be
    pairs = zip(blur(images, kernels), sheet.blur(images, kernels), strict=True)
    for (blurred, in_place), sigma in zip(pairs, sigmas, strict=True):
        expected = np.stack([naive_blur(image, sigma) for image in expected])
        np.testing.assert_allclose(blurred.cpu().numpy(), expected, rtol=0, atol=1e-12)
        np.testing.assert_allclose(in_place.cpu().numpy(), expected, rtol=0, atol=1e-12)
    assert sheet.octave()[:, -1].equal(in_place)


def test_without_the_first_blur():
    images = torch.rand(2, 40, 30, generator=torch.Generator().manual_seed(0)).to(TARGET.device)
    kernels = [gaussian_kernels((3.0, 1.2), images)] * 2
    _, (sheet,) = sheets(images, [(40, 30)], 2, kernels)
    for planes in (blur(images, kernels, first=False), sheet.blur(images, kernels, first=False)):
        first, second = planes
        assert first.equal(images)
        torch.testing.assert_close(second, next(blur(images, [gaussian_kernels((1.2,), images)] * 2)))


@pytest.mark.parametrize("differentiable", [True, False])
def test_one_index_reaches_all_layers(differentiable):
    images = torch.rand(2, 47, 90, generator=torch.Generator().manual_seed(0)).to(TARGET.device)
    space = scale_space(images.requires_grad_(differentiable), layers=3, sigma=1.6, blurred=1.0)
    start, image, step, *_ = space.tables()
    for i, octave in enumerate(space.octaves):
        place = torch.cartesian_prod(*(torch.arange(n, device=TARGET.device) for n in octave.shape))
        index = start[i] + image[i] * place[:, 0] + (step[i] * place[:, 1:]).sum(1)
        assert space.take(index).equal(octave.flatten())


def test_both_ways_of_blurring_give_the_same_keypoints():
    images = torch.rand(2, 1, 70, 90, generator=torch.Generator().manual_seed(0)).to(TARGET.device)
    expected, found = SIFTDetector(40)(images), SIFTDetector(40)(images.clone().requires_grad_())
    torch.testing.assert_close(found.positions, expected.positions)
    torch.testing.assert_close(found.descriptors, expected.descriptors)
    assert expected.valid.sum() > 10


def test_doubling_interpolates_at_its_positions():
    height, width = 5, 7
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ramp = (3.0 * x - 2.0 * y)[None]
    v, u = torch.meshgrid(torch.arange(2 * height) / 2, torch.arange(2 * width) / 2, indexing="ij")
    precise = 3 * u.clamp(max=width - 1) - 2 * v.clamp(max=height - 1)
    opencv = 3 * (u - 0.25).clamp(0, width - 1) - 2 * (v - 0.25).clamp(0, height - 1)
    torch.testing.assert_close(double(ramp, "precise")[0], precise)
    torch.testing.assert_close(double(ramp, "opencv")[0], opencv)


def test_octaves_are_half_as_large_each():
    images = torch.rand(2, 47, 90, generator=torch.Generator().manual_seed(0)).to(TARGET.device)
    space = scale_space(images, layers=3, sigma=1.6, blurred=1.0)
    assert [tuple(octave.shape[2:]) for octave in space.octaves] == [(47, 90), (23, 45), (11, 22)]
    assert space.octaves[1][:, 0].equal(space.octaves[0][:, 3, :46:2, ::2])


def test_layers_have_their_blur():
    # The variance of a blurred impulse is the sum of the squared blurs.
    impulse = torch.zeros(1, 101, 101, dtype=torch.float64)
    impulse[0, 50, 50] = 1
    offset = torch.arange(101, dtype=torch.float64) - 50
    for i, layer in enumerate(scale_space(impulse, layers=3, sigma=1.6, blurred=1.0).octaves[0][0]):
        variance = (layer.sum(0) * offset**2).sum()
        assert variance.item() == pytest.approx((1.6 * 2 ** (i / 3)) ** 2 - 1, rel=2e-3)


@pytest.mark.parametrize("room", [None, 300])
def test_extrema_are_those_of_scipys_filters(room):
    """Of 27 pixels in three layers; where slots are fixed, those of the largest differences."""
    ndimage = pytest.importorskip("scipy.ndimage")
    images = torch.rand(2, 90, 77, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(TARGET.device)
    space = scale_space(images, layers=3, sigma=0.8, blurred=0.5)
    expected = []
    for i, octave in enumerate(space.octaves):
        for image, gaussians in enumerate(octave.cpu().numpy()):
            d = np.diff(gaussians, axis=0)
            mask = (d == ndimage.maximum_filter(d, 3)) & (d > 0.004)
            mask |= (d == ndimage.minimum_filter(d, 3)) & (d < -0.004)
            inside = mask[1:-1, 5:-5, 5:-5]
            expected += [(image, i, x + 1, y + 5, z + 5) for x, y, z in np.argwhere(inside)]
    assert len(expected) > 20
    found = []
    for image, start in searched(space, room):
        extrema, valid = find_extrema(image, threshold=0.004, room=room)
        place = torch.cat([extrema.stride[..., :1].log2().long(), extrema.pixel], dim=-1)
        found += [(start + i, *row) for i in range(len(valid)) for row in place[i, valid[i]].tolist()]
        values = image.take(extrema.position())
        for i in range(len(valid)):
            expected_values = [image.octaves[o][i, x, y, z].item() for o, x, y, z in place[i, valid[i]].tolist()]
            assert values[i, valid[i]].tolist() == expected_values
    assert sorted(found) == sorted(expected)


def searched(space: ScaleSpace, room: int | None) -> list[tuple[ScaleSpace, int]]:
    """The whole batch and, without a room, one image after the other; each with the number of its first image."""
    if room is not None:
        return [(space, 0)]
    images = []
    for i in range(len(space.octaves[0])):
        octaves = [octave[i : i + 1] for octave in space.octaves]
        starts = [int(octave.storage_offset()) for octave in octaves]
        images.append((dataclasses.replace(space, octaves=octaves, starts=starts), i))
    return images


def test_the_weakest_are_lost_where_there_is_no_room():
    images = torch.rand(2, 90, 77, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(TARGET.device)
    images[1] *= 0.1  # one image takes no room of another
    space = scale_space(images, layers=3, sigma=0.8, blurred=0.5)

    def strengths(room):
        of_images = []
        for image, _ in searched(space, room):
            extrema, valid = find_extrema(image, threshold=0.0, room=room)
            index = extrema.position()
            values = (image.take(index + extrema.step[..., 0]) - image.take(index)).abs()
            first = valid & (extrema.stride[..., 0] == 1)
            of_images += [v[chosen].sort(descending=True).values for v, chosen in zip(values, first, strict=True)]
        return of_images

    for few, all_of_them in zip(strengths(5), strengths(None), strict=True):
        assert len(all_of_them) > 5
        assert few.equal(all_of_them[:5])
