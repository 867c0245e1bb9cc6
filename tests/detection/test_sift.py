"""SIFTDetector against kornia_rs' and OpenCV's SIFT, and the laws that it promises."""

import importlib

import numpy as np
import pytest
import torch
from common import TARGET, checks_values
from on_device import SIFTDetector
from torch import Tensor

import kaf_layer
from kaf_layer import Keypoints
from kaf_layer.detection.sift.plane import describe, orient
from kaf_layer.detection.sift.pyramid import double, scale_space
from kaf_layer.detection.sift.refinement import locate

FIELDS = ("positions", "valid", "scores", "scales", "angles", "descriptors")
TURN = 2 * torch.pi


def texture(height: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blobs of many sizes, between 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    count = height * width // 60
    centre = torch.rand(count, 2, generator=generator, dtype=dtype) * torch.tensor([width, height])
    sigma = 1 + 5 * torch.rand(count, generator=generator, dtype=dtype) ** 2
    sign = torch.randn(count, generator=generator, dtype=dtype)
    dx = torch.arange(width) - centre[:, :1]
    dy = torch.arange(height) - centre[:, 1:]
    rows, columns = (torch.exp(-(d**2) / (2 * sigma[:, None] ** 2)) for d in (dy, dx))
    image = torch.einsum("nh,nw,n->hw", rows, columns, sign)
    return (image - image.min()) / (image.max() - image.min())


def as_bytes(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)


def found(keypoints: Keypoints) -> dict[str, np.ndarray]:
    return {name: getattr(keypoints, name)[0][keypoints.valid[0]].numpy() for name in FIELDS}


def close(a: np.ndarray, b: np.ndarray, radius: float) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=-1) < radius


@pytest.fixture(scope="module")
def oracle() -> tuple[Tensor, np.ndarray, np.ndarray]:
    """An image with kornia_rs' keypoints (x, y, size, angle, response), one row per orientation, and descriptors."""
    sift = importlib.import_module("kornia_rs").imgproc.Sift
    image = as_bytes(texture(150, 203))
    keypoints, descriptors = sift().detect_and_compute(image[..., None].float().numpy())
    table = np.array([(k.x, k.y, k.size, k.angle, k.response) for k in keypoints])
    assert len(table) > 100
    return image, table, descriptors.astype(np.float64)


def test_finds_the_oracles_keypoints(oracle):
    image, table, _ = oracle
    ours = found(SIFTDetector(2000, upscale="opencv", normalize=False)(image[None, None]))
    expected = np.unique(table[:, [0, 1, 2, 4]], axis=0)
    near = close(expected[:, :2], ours["positions"], 0.02)
    assert near.any(1).mean() >= 0.99
    assert near.any(0).mean() >= 0.99
    mine, theirs = near.argmax(1)[near.any(1)], expected[near.any(1)]
    np.testing.assert_allclose(2 * ours["scales"][mine], theirs[:, 2], rtol=0.01)
    np.testing.assert_allclose(ours["scores"][mine], theirs[:, 3], rtol=0.01)


def test_best_by_response(oracle):
    image, table, _ = oracle
    expected = np.unique(table[:, [4, 0, 1]], axis=0)[::-1][:40, 1:]
    keypoints = SIFTDetector(40, upscale="opencv", normalize=False)(image[None, None])
    assert keypoints.valid.all()
    assert (keypoints.scores.diff() <= 0).all()
    assert close(expected, keypoints.positions[0].numpy(), 0.02).any(1).mean() >= 0.97


@pytest.mark.parametrize("root", [True, False])
def test_angles_and_descriptors_resemble_the_oracles(oracle, root):
    image, table, descriptors = oracle
    detector = SIFTDetector(2000, upscale="opencv", normalize=False, orientations="all", root=root)
    ours = found(detector(image[None, None]))
    turn = np.abs(ours["angles"][:, None] - np.deg2rad(table[:, 3])[None])
    turn = np.minimum(turn, TURN - turn)
    same = close(ours["positions"], table[:, :2], 0.02) & (turn < np.deg2rad(15))
    assert same.any(0).mean() > 0.85  # peaks of just about 80 % come and go with the sampling
    mine, theirs = np.nonzero(same)
    assert np.median(turn[mine, theirs]) < np.deg2rad(2)
    expected = np.sqrt(descriptors / descriptors.sum(1, keepdims=True)) if root else descriptors
    expected = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    cosine = (ours["descriptors"][mine] * expected[theirs]).sum(1)
    assert np.median(cosine) > 0.97
    assert np.quantile(cosine, 0.05) > 0.9
    np.testing.assert_allclose(np.linalg.norm(ours["descriptors"], axis=1), 1, rtol=1e-4)


@pytest.mark.parametrize("upscale", ["precise", "opencv"])
def test_finds_opencvs_keypoints(upscale):
    cv2 = pytest.importorskip("cv2")
    image = as_bytes(texture(181, 130, seed=1))
    points = cv2.SIFT_create(0, 3, 0.04, 10, 1.6, upscale == "precise").detect(image.numpy(), None)
    expected = np.unique([point.pt for point in points], axis=0)
    ours = found(SIFTDetector(2000, upscale=upscale, normalize=False)(image[None, None]))["positions"]
    near = close(expected, ours, 0.05)
    assert near.any(1).mean() >= 0.99
    assert near.any(0).mean() >= 0.99


@pytest.mark.parametrize("centre", [(40.0, 21.0), (40.25, 20.6), (39.5, 20.5)])
def test_precise_upscale_has_no_bias(centre):
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(70.0), indexing="ij")
    blob = torch.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * 3.0**2))
    keypoints = SIFTDetector(4)(blob[None, None])
    assert keypoints.valid.tolist() == [[True, False, False, False]]
    torch.testing.assert_close(keypoints.positions[0, 0], torch.tensor(centre), rtol=0, atol=0.05)
    biased = SIFTDetector(4, upscale="opencv")(blob[None, None])
    torch.testing.assert_close(biased.positions[0, 0], torch.tensor(centre) + 0.25, rtol=0, atol=0.05)
    # Differences of Gaussians k apart answer strongest to a blob of their geometric mean.
    assert keypoints.scales[0, 0].item() == pytest.approx(3.0 / 2 ** (1 / 6), rel=0.05)


def test_angles_turn_with_the_image():
    image = texture(96, 96, seed=3)
    a = found(SIFTDetector(300)(image[None, None]))
    b = found(SIFTDetector(300)(image.rot90(1)[None, None]))  # (x, y) becomes (y, 95 - x)
    near = close(np.stack([a["positions"][:, 1], 95 - a["positions"][:, 0]], axis=1), b["positions"], 0.2)
    mine, theirs = np.nonzero(near)
    assert len(mine) > 0.8 * len(near)
    turn = (a["angles"][mine] - TURN / 4 - b["angles"][theirs] + TURN / 2) % TURN - TURN / 2
    assert np.median(np.abs(turn)) < np.deg2rad(1)
    assert np.median((a["descriptors"][mine] * b["descriptors"][theirs]).sum(1)) > 0.98


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.float32, 1e-3)])
def test_a_batch_gives_what_each_image_gets_alone(dtype, tolerance):
    images = torch.stack([texture(70, 93, seed, dtype) for seed in range(3)])[:, None]
    images[1] = 0.5
    detector = SIFTDetector(64)
    batch = detector(images)
    for sample, image in enumerate(images):
        alone = detector(image[None])
        assert alone.valid[0].equal(batch.valid[sample])
        torch.testing.assert_close(alone.positions[0], batch.positions[sample], rtol=0, atol=tolerance)
        torch.testing.assert_close(alone.descriptors[0], batch.descriptors[sample], rtol=0, atol=tolerance)


@pytest.mark.parametrize("orientations", ["strongest", "all"])
def test_compiled_whole_shapes_are_static_and_give_the_same(orientations):
    # Stripes, whose every pixel is an extremum, overflow the room for extrema; they must not take that of others.
    stripes = (torch.arange(40) // 4 % 2).float().expand(32, -1)
    images = torch.stack([stripes, texture(32, 40, 0), torch.zeros(32, 40), texture(32, 40, 1)])[:, None]
    detector = SIFTDetector(20, orientations=orientations)
    expected = detector(images)
    assert expected.valid[1::2].any(1).all()
    compiled = torch.compile(detector, fullgraph=True, backend="eager")(images)
    for name in FIELDS:
        torch.testing.assert_close(getattr(compiled, name)[1:], getattr(expected, name)[1:], rtol=1e-4, atol=1e-4)


def test_exported_gives_the_same_and_cannot_look_at_values():
    images = torch.stack([texture(24, 28, 5), texture(24, 28, 6)])[:, None]
    detector = SIFTDetector(16)
    expected = detector(images)
    shapes = ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(detector, (images,), dynamic_shapes=shapes).module()
    for batch in (1, 2):  # the batch size stays open
        found = exported(images[:batch])
        for name in FIELDS:
            torch.testing.assert_close(getattr(found, name), getattr(expected, name)[:batch], rtol=1e-4, atol=1e-4)
    images[1, 0, 3, 4] = float("nan")
    assert exported(images).valid.any(1).tolist() == [True, False]
    assert exported(images).descriptors.isfinite().all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_without_waiting_for_it():
    images = torch.stack([texture(70, 93, seed) for seed in range(3)])[:, None]
    detector = kaf_layer.SIFTDetector(64)
    expected, on_device = detector(images), images.cuda()
    detector(on_device)  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        keypoints = detector(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in FIELDS:
        torch.testing.assert_close(getattr(keypoints, name).cpu(), getattr(expected, name), rtol=1e-3, atol=1e-3)


def test_every_slot_is_a_keypoint_or_padding():
    few, many = SIFTDetector(7)(texture(60, 80)[None, None]), SIFTDetector(900)(texture(60, 80)[None, None])
    count = int(many.valid.sum())
    assert 7 < count < 900
    assert few.valid.all()
    assert many.valid[0, :count].all()
    assert few.positions.equal(many.positions[:, :7])
    assert (many.descriptors[0, count:] == 0).all()
    assert len(np.unique(found(many)["positions"], axis=0)) == count


def test_all_orientations_repeat_positions():
    image = texture(90, 90)[None, None]
    one, several = found(SIFTDetector(900)(image)), found(SIFTDetector(900, orientations="all")(image))
    assert len(several["positions"]) > len(one["positions"])
    assert np.unique(several["positions"], axis=0).shape == np.unique(one["positions"], axis=0).shape
    first = np.unique(several["positions"], axis=0, return_index=True)[1]
    np.testing.assert_array_equal(several["angles"][np.sort(first)], one["angles"])


def test_range_type_and_colour_do_not_matter():
    image = as_bytes(texture(64, 72))[None, None]
    detector = SIFTDetector(64)
    expected = detector(image)
    for other in (image.float(), image.double() * 40 - 1000, image.int(), image.expand(-1, 3, -1, -1)):
        keypoints = detector(other)
        assert keypoints.positions.dtype == (torch.float64 if other.dtype == torch.float64 else torch.float32)
        assert keypoints.valid.equal(expected.valid)
        torch.testing.assert_close(keypoints.positions.float(), expected.positions, rtol=0, atol=1e-2)
    channels_last = detector(image.expand(-1, 3, -1, -1).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(channels_last.positions, expected.positions, rtol=0, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    image = texture(48, 56)[None, None]
    expected = SIFTDetector(32)(image)
    with torch.autocast(TARGET.device, dtype=dtype):
        keypoints = SIFTDetector(32)(image)
    for name in FIELDS:
        assert getattr(keypoints, name).equal(getattr(expected, name))
    assert SIFTDetector(32)(image.to(dtype)).positions.dtype == torch.float32


@pytest.mark.parametrize("name", ["positions", "scores", "scales"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_with_fixed_selection(name, normalize):
    detector = SIFTDetector(12, descriptors=False, normalize=normalize)
    image = texture(44, 36, seed=2, dtype=torch.float64)[None, None].requires_grad_()
    valid = detector(image).valid
    assert valid.sum() >= 3
    assert torch.autograd.gradcheck(lambda x: getattr(detector(x), name)[valid], image, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("root", [True, False])
def test_descriptor_gradient_with_fixed_frames(root):
    detector = SIFTDetector(6)
    image = texture(44, 36, seed=2, dtype=torch.float64)[None].requires_grad_()

    def space_of(image: Tensor):
        return scale_space(double(image, "precise"), layers=3, sigma=1.6, blurred=1.0)

    space = space_of(image)
    extrema, valid = detector._search(space, static=False)
    assert valid.all()
    angle = orient(space, extrema, valid, locate(space, extrema, valid), every=False, slots=6)[2].angle

    def descriptors(image: Tensor) -> Tensor:
        space = space_of(image)
        return describe(space, extrema, locate(space, extrema, valid)._replace(angle=angle), root=root)

    assert torch.autograd.gradcheck(descriptors, image, fast_mode=True, atol=1e-4)


def test_constant_images_have_no_keypoints_and_no_nan_gradients():
    images = torch.stack([torch.zeros(40, 40), torch.full((40, 40), 7.0), texture(40, 40)])[:, None].requires_grad_()
    keypoints = SIFTDetector(16)(images)
    assert keypoints.valid.any(1).tolist() == [False, False, True]
    total = sum(getattr(keypoints, name).square().sum() for name in FIELDS if name != "valid")
    (gradient,) = torch.autograd.grad(total, images)
    assert gradient.isfinite().all()
    assert gradient[2].abs().sum() > 0


@checks_values
def test_images_that_are_not_finite():
    images = torch.stack([texture(40, 40), texture(40, 40)])[:, None]
    images[1, 0, 3, 4] = float("nan")
    with pytest.raises(ValueError, match=r"samples=\[1\]"):
        SIFTDetector()(images)


@pytest.mark.parametrize("shape", [(8,), (8, 8), (1, 8, 8), (1, 1, 8, 8, 8)])
def test_images_must_be_a_batch(shape):
    with pytest.raises(ValueError, match=r"images must be \(B, C, H, W\), got"):
        SIFTDetector()(torch.zeros(shape))


def test_an_empty_batch():
    images = torch.zeros(0, 3, 16, 24, requires_grad=True)
    keypoints = SIFTDetector(7)(images)
    assert keypoints.valid.shape == (0, 7)
    assert keypoints.descriptors.shape == (0, 7, 128)
    assert keypoints.image_size == (16, 24)
    assert torch.autograd.grad(keypoints.positions.sum(), images)[0].shape == images.shape


def modalities(height: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Four channels of different ranges, the second of them constant."""
    images = torch.stack([texture(height, width, seed, dtype) for seed in range(4)])[None]
    images[:, 1] = 7.0
    return images * torch.tensor([1.0, 1.0, 40.0, 2000.0], dtype=dtype).view(-1, 1, 1) - 3


def test_channels_of_any_number_are_averaged_in_one_range():
    images = modalities(44, 60, torch.float64)
    stretched = [(x - x.min()) / np.ptp(x) for x in images[0, [0, 2, 3]].numpy()]
    expected = found(SIFTDetector(32)(torch.from_numpy(np.mean(stretched, axis=0))[None, None]))
    assert len(expected["positions"]) > 5
    for several in (images, images[:, [0, 1, 1, 2, 3]]):
        actual = found(SIFTDetector(32)(several))
        for name in FIELDS:
            np.testing.assert_allclose(actual[name], expected[name], rtol=1e-6, atol=1e-6)
    three = images[:, [0, 2, 3]]
    np.testing.assert_allclose(found(SIFTDetector(32, channel="mean")(three))["scores"], expected["scores"], rtol=1e-6)
    assert not np.allclose(SIFTDetector(32)(three).scores, SIFTDetector(32, channel="mean")(three).scores)


def test_channels_as_they_are_without_normalize():
    images = modalities(44, 60) / 2000 + 0.1
    actual = SIFTDetector(32, normalize=False)(images)
    expected = SIFTDetector(32, normalize=False)(images.mean(1, keepdim=True))
    assert actual.valid.any()
    for name in FIELDS:
        assert getattr(actual, name).equal(getattr(expected, name))


@pytest.mark.parametrize("channel", [0, 2])
def test_a_chosen_channel_is_all_that_is_looked_at(channel):
    images = modalities(44, 60)
    expected = SIFTDetector(32)(images[:, channel : channel + 1])
    images[:, 3] = torch.nan
    actual = SIFTDetector(np.int64(32), channel=np.int64(channel))(images)
    assert actual.valid.any()
    for name in FIELDS:
        assert getattr(actual, name).equal(getattr(expected, name))


def test_colours_are_weighed():
    images = torch.rand(1, 3, 40, 48, dtype=torch.float64)
    grey = torch.einsum("bchw,c->bhw", images, torch.tensor([0.299, 0.587, 0.114]).double())[:, None]
    for channel in (None, "rgb"):
        actual, expected = SIFTDetector(32, channel=channel)(images), SIFTDetector(32)(grey)
        torch.testing.assert_close(actual.positions, expected.positions, rtol=0, atol=1e-5)


def test_gradients_reach_every_channel_that_varies():
    images = modalities(44, 36, torch.float64).requires_grad_()
    detector = SIFTDetector(8, descriptors=False)
    valid = detector(images).valid
    assert valid.sum() >= 3

    def positions(images: Tensor) -> Tensor:
        constant = images * torch.tensor([1.0, 0.0, 1.0, 1.0]).view(-1, 1, 1)  # a finite difference would make it vary
        return detector(constant).positions[valid]

    assert torch.autograd.gradcheck(positions, images, fast_mode=True, atol=1e-4)
    (gradient,) = torch.autograd.grad(detector(images).positions.square().sum(), images)
    assert gradient.isfinite().all()
    assert gradient.abs().sum((0, 2, 3)).gt(0).tolist()[::2] == [True, True]


@pytest.mark.parametrize(("channel", "channels"), [(None, 0), ("mean", 0), (0, 0), (2, 2), ("rgb", 1), ("rgb", 4)])
def test_images_must_have_the_channels(channel, channels):
    with pytest.raises(ValueError, match="must have the channels that the rule needs"):
        SIFTDetector(channel=channel)(torch.zeros(1, channels, 8, 8))


def test_images_must_not_be_too_small():
    with pytest.raises(ValueError, match="at least 6 x 6 pixels"):
        SIFTDetector()(torch.zeros(1, 1, 5, 40))
    assert not SIFTDetector()(torch.rand(1, 1, 6, 6)).valid.all()


@pytest.mark.parametrize(
    "arguments",
    [
        *({"max_keypoints": 0}, {"sigma": 0.0}, {"octave_layers": 0}, {"upscale": "linear"}, {"orientations": "some"}),
        *({"channel": "red"}, {"channel": -1}, {"channel": 0.5}),
    ],
)
def test_arguments_must_be_in_range(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        SIFTDetector(**arguments)
