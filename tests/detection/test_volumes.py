"""SIFTDetector in three dimensions against formulas, SciPy and loops, and the laws that it promises."""

import itertools

import numpy as np
import pytest
import torch
from common import TARGET, checks_values
from on_device import SIFTDetector
from torch import Tensor

import kaf_layer
from kaf_layer import Keypoints, match_keypoints
from kaf_layer.detection.sift.blur import blur, gaussian_kernels
from kaf_layer.detection.sift.extrema import find_extrema
from kaf_layer.detection.sift.pyramid import double, scale_space
from kaf_layer.detection.sift.quadratic import is_corner
from kaf_layer.detection.sift.refinement import locate
from kaf_layer.detection.sift.volume import describe, eigenvectors, orient
from kaf_layer.detection.sift.voxels import Voxels

FIELDS = ("positions", "valid", "scores", "scales", "descriptors")


def blob(size: tuple[int, int, int], centre: tuple[float, float, float], sigma: float, spacing=(1, 1, 1)) -> Tensor:
    """A Gaussian (1, 1, D, H, W) about a centre in voxels, (x, y, z), whose sigma is a distance."""
    axes = [
        torch.exp(-((step * (torch.arange(n) - c)) ** 2) / (2 * sigma**2))
        for n, c, step in zip(size, reversed(centre), spacing, strict=True)
    ]
    return torch.einsum("z,y,x->zyx", *axes)[None, None]


def texture(size: tuple[int, int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blobs of many sizes."""
    generator = torch.Generator().manual_seed(seed)
    count = int(np.prod(size)) // 150
    centres = torch.rand(count, 3, generator=generator, dtype=dtype) * torch.tensor(size)
    sigma = 1 + 3 * torch.rand(count, generator=generator, dtype=dtype) ** 2
    sign = torch.randn(count, generator=generator, dtype=dtype)
    axes = [
        torch.exp(-((torch.arange(n) - centres[:, i : i + 1]) ** 2) / (2 * sigma[:, None] ** 2))
        for i, n in enumerate(size)
    ]
    return torch.einsum("nz,ny,nx,n->zyx", *axes, sign)


def detector(slots: int = 64, **options) -> SIFTDetector:
    return SIFTDetector(slots, spatial_dims=3, **options)


def positions_of(keypoints: Keypoints, sample: int = 0) -> np.ndarray:
    return keypoints.positions[sample][keypoints.valid[sample]].double().numpy()


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


@pytest.mark.parametrize(("centre", "sigma"), [((20.25, 21.5, 18.0), 3.0), ((15.0, 30.6, 20.1), 2.0)])
def test_a_blob_by_its_formula(centre, sigma):
    keypoints = detector(8)(blob((40, 48, 44), centre, sigma))
    best = keypoints.scores[0].argmax()
    torch.testing.assert_close(keypoints.positions[0, best], torch.tensor(centre), rtol=0, atol=0.1)
    # The Laplacian's answer to a Gaussian in space is strongest at sqrt(2/3) sigma, the mean of the two blurs.
    blur_of_peak = (2 / 3) ** 0.5 * sigma / 2 ** (1 / 6)
    assert keypoints.scales[0, best].item() == pytest.approx(blur_of_peak, rel=0.05)
    inner, outer = (1 + (blur_of_peak * k / sigma) ** 2 for k in (1, 2 ** (1 / 3)))
    assert keypoints.scores[0, best].item() == pytest.approx(inner**-1.5 - outer**-1.5, rel=0.1)
    assert keypoints.angles is None


@pytest.mark.parametrize("spacing", [(2.5, 1, 1), (1, 1.6, 1), (0.8, 0.8, 0.4)])
def test_anisotropic_voxels_show_the_same_blob(spacing):
    distance = np.array(spacing)
    size, place = np.ceil(44 * min(distance) / distance).astype(int), 21.3 * min(distance)
    centre = tuple((place / distance)[::-1])
    keypoints = detector(8, spacing=spacing)(blob(tuple(size), centre, 4 * min(distance), spacing))
    best = keypoints.scores[0].argmax()
    torch.testing.assert_close(keypoints.positions[0, best].tolist(), list(centre), rtol=0, atol=0.2)
    assert keypoints.scales[0, best].item() == pytest.approx((2 / 3) ** 0.5 * 4 / 2 ** (1 / 6), rel=0.1)


def test_octaves_halve_coarse_axes_once_the_others_have_caught_up():
    voxels = Voxels.spaced((4.0, 1.0, 1.2), 3)
    assert voxels.factors == (1, 2, 2)
    space = voxels.scale_space(torch.rand(2, 6, 20, 21), "precise", layers=2, sigma=1.6, border=1)
    assert [grid.size for grid in space.grids] == [(6, 40, 42), (6, 20, 21), (6, 10, 10), (6, 5, 5)]
    assert [grid.pitch[0] for grid in space.grids] == [8.0, 4.0, 2.0, 1.0]
    assert space.values[1].equal(torch.cat([octave[1].flatten() for octave in space.octaves]))


def test_blur_along_each_axis():
    ndimage = pytest.importorskip("scipy.ndimage")
    volumes = torch.rand(2, 9, 33, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sigmas = [(0.5, 1.0, 2.0), (1.5, 0.6, 1.0)]
    expected = volumes.numpy()
    kernels = [gaussian_kernels(axis, volumes) for axis in zip(*sigmas, strict=True)]
    for blurred, sigma in zip(blur(volumes, kernels), sigmas, strict=True):
        radius = [(round(8 * s + 1) | 1) // 2 for s in sigma]
        expected = np.stack([ndimage.gaussian_filter(v, sigma, mode="mirror", radius=radius) for v in expected])
        np.testing.assert_allclose(blurred.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("room", [None, 500])
def test_extrema_are_those_of_scipys_differences(room):
    ndimage = pytest.importorskip("scipy.ndimage")
    volume = torch.rand(18, 24, 21, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    doubled = double(volume[None], "precise")
    space = scale_space(doubled, layers=3, sigma=1.6, blurred=1.0, border=1)
    extrema, valid = find_extrema(space, threshold=0.005, room=room)
    first = valid & (extrema.stride[..., 0] == 1)
    ours = {tuple(pixel) for pixel in extrema.pixel[first].tolist()}

    # Blurred from the original each time, not progressively.
    grid = ndimage.map_coordinates(
        volume.numpy(), np.stack(np.meshgrid(*(np.arange(2 * n) / 2 for n in volume.shape), indexing="ij")),
        order=1, mode="nearest",
    )  # fmt: skip
    blurs = [np.sqrt((1.6 * 2 ** (i / 3)) ** 2 - 1) for i in range(6)]
    layers = np.stack([ndimage.gaussian_filter(grid, s, mode="mirror", truncate=5) for s in blurs])
    differences = np.diff(layers, axis=0)
    cross = ndimage.generate_binary_structure(4, 1)
    peaks = (differences == ndimage.maximum_filter(differences, footprint=cross)) & (differences > 0.005)
    peaks |= (differences == ndimage.minimum_filter(differences, footprint=cross)) & (differences < -0.005)
    inner = tuple(slice(1, -1) for _ in range(4))
    expected = {tuple(1 + index) for index in np.argwhere(peaks[inner])}
    assert len(expected) >= 20
    assert len(ours & expected) > 0.95 * max(len(ours), len(expected))


@pytest.mark.parametrize(
    ("curvatures", "corner"),
    [((1, 1, 1), 1), ((-2, -2, -2), 1), ((9.9, 1, 1), 1), ((10.1, 1, 1), 0), ((5, -1, -1), 0), ((1, 0, 1), 0)],
)
def test_edges_by_the_ratio_of_curvatures(curvatures, corner):
    basis = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    hessian = basis @ torch.diag(torch.tensor(curvatures, dtype=torch.float64)) @ basis.T
    assert is_corner(hessian, 10.0).item() == corner


def test_eigenvectors_are_lapacks():
    root = torch.randn(50, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    matrix = torch.cat([root @ root.mT, torch.diag(torch.tensor([1.0, 5.0, 2.0])).double()[None]])
    expected = torch.linalg.eigh(matrix).eigenvectors.flip(-1)
    torch.testing.assert_close((eigenvectors(matrix) * expected).sum(-2).abs(), torch.ones(51, 3).double())


def test_descriptor_is_its_definition():
    """One keypoint, sample by sample."""
    volume = texture((24, 26, 28), seed=4, dtype=torch.float64)
    spacing = (1.5, 1.0, 1.0)
    space = Voxels.spaced(spacing, 3).scale_space(volume[None], "precise", layers=3, sigma=1.6, border=1)
    found, valid = find_extrema(space, threshold=0.05, room=None)
    extrema = found.take(torch.arange(valid.shape[1])[(valid & (found.stride[..., 1] == 2))[0]][3:5])
    place = locate(space, extrema, torch.ones(1, 2, dtype=torch.bool))
    centre, scale = place.centre, place.scale
    frame = orient(space, extrema, place)
    actual = describe(space, extrema, place, root=False)
    golden = (1 + 5**0.5) / 2
    vertices = [
        np.roll([0.0, a, b * golden], shift) / np.hypot(1, golden)
        for shift in range(3)
        for b, a in itertools.product((1, -1), repeat=2)
    ]
    for slot in range(2):
        layer = space.octaves[1][0, extrema.pixel[0, slot, 0]].numpy()
        axes, pitch = frame[0, slot].numpy(), extrema.pitch[0, slot].numpy()
        assert np.linalg.det(axes) == pytest.approx(1)

        def value(point, slot=slot, layer=layer, axes=axes, pitch=pitch):
            """Trilinear, beyond the edge extrapolated; and whether it lies inside."""
            place = (centre[0, slot].numpy() + scale[0, slot].item() * (axes @ point) / pitch[::-1])[::-1]
            low = [int(np.clip(np.floor(p), 0, n - 2)) for p, n in zip(place, layer.shape, strict=True)]
            total = 0.0
            for corner in itertools.product((0, 1), repeat=3):
                weights = [p - i if c else 1 - p + i for p, i, c in zip(place, low, corner, strict=True)]
                total += np.prod(weights) * layer[tuple(np.add(low, corner))]
            return total, all(0 <= p <= n - 1 for p, n in zip(place, layer.shape, strict=True))

        histogram, step = np.zeros((4, 4, 4, 12)), 1.5
        for w, v, u in itertools.product((np.arange(10) - 4.5) * step, repeat=3):
            point = np.array([u, v, w])
            if not value(point)[1]:
                continue
            gradient = [value(point + d)[0] - value(point - d)[0] for d in step * np.eye(3)]
            strength = [max(0.0, np.dot(gradient, n) - np.linalg.norm(gradient) / 5**0.5) for n in vertices]
            window = np.exp(-(u**2 + v**2 + w**2) / 9 / 8)
            for cell in itertools.product(range(4), repeat=3):
                share = np.prod([max(0.0, 1 - abs(p / 3 - (c - 1.5))) for p, c in zip((w, v, u), cell, strict=True)])
                histogram[cell] += share * window * np.array(strength)
        flat = histogram.ravel() / np.linalg.norm(histogram)
        expected = np.minimum(flat, 0.2) / np.linalg.norm(np.minimum(flat, 0.2))
        np.testing.assert_allclose(actual[0, slot].numpy(), expected, atol=1e-9)


@pytest.mark.parametrize("axes", [(2, 3), (2, 4), (3, 4)])
def test_keypoints_turn_with_the_volume(axes):
    volume = texture((30, 32, 34))[None, None]
    turned = volume.rot90(1, axes)
    before, after = detector(200)(volume), detector(200)(turned)
    # The position of every voxel before, carried along.
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in volume.shape[2:]), indexing="ij"))[None]
    where = grid.rot90(1, axes)[0]
    p, q = positions_of(before), positions_of(after)
    rounded = q.round().astype(int).clip(0, np.array(turned.shape[4:1:-1]) - 1)
    origin = where[:, rounded[:, 2], rounded[:, 1], rounded[:, 0]].T.numpy()[:, ::-1]
    near = distances(origin, p) < 1
    assert near.any(1).mean() > 0.9
    mine, theirs = near.nonzero()
    cosine = (after.descriptors[0, mine] * before.descriptors[0, theirs]).sum(-1)
    assert cosine.median() > 0.97


def test_matches_after_a_rotation_about_an_oblique_axis():
    ndimage = pytest.importorskip("scipy.ndimage")
    from scipy.spatial.transform import Rotation

    volume = texture((40, 42, 44), seed=2).numpy()
    matrix = Rotation.from_rotvec(np.deg2rad(40) * np.array([0.6, 0.64, 0.48])).as_matrix()  # of (z, y, x)
    centre = (np.array(volume.shape) - 1) / 2
    turned = ndimage.affine_transform(volume, matrix.T, offset=centre - matrix.T @ centre, mode="mirror")
    before, after = (detector(256)(torch.from_numpy(v)[None, None]) for v in (volume, turned))
    partner = match_keypoints(before, after, max_distance=1e3).indices[0]
    moved = (before.positions[0].flip(-1).double().numpy() - centre) @ matrix.T + centre
    error = np.linalg.norm(moved - after.positions[0, partner].flip(-1).double().numpy(), axis=1)
    matched = (partner >= 0).numpy()
    assert matched.sum() > 50
    assert (error[matched] < 3).mean() > 0.8


def test_a_batch_gives_what_each_volume_gets_alone_compiled_or_not():
    volumes = torch.stack([texture((8, 14, 12), seed) for seed in range(3)])[:, None]
    volumes[1] = 0.5
    find = detector(12, octave_layers=2, contrast_threshold=0.01, edge_threshold=100.0)
    batch = find(volumes)
    assert batch.valid.any(1).tolist() == [True, False, True]
    for sample, volume in enumerate(volumes):
        alone = find(volume[None])
        for name in FIELDS:
            torch.testing.assert_close(getattr(alone, name)[0], getattr(batch, name)[sample], rtol=1e-4, atol=1e-4)
    compiled = torch.compile(find, fullgraph=True, backend="eager")(volumes)
    for name in FIELDS:
        torch.testing.assert_close(getattr(compiled, name), getattr(batch, name), rtol=1e-4, atol=1e-4)


def test_exported():
    """Without descriptors, whose graph takes minutes to trace."""
    volumes = torch.stack([texture((8, 14, 12), seed) for seed in range(2)])[:, None]
    find = detector(12, octave_layers=1, contrast_threshold=0.01, edge_threshold=100.0, descriptors=False)
    shapes = ({0: torch.export.Dim("batch")},)
    exported, expected = torch.export.export(find, (volumes,), dynamic_shapes=shapes).module(), find(volumes)
    assert expected.valid.any()
    for batch in (1, 2):  # the batch size stays open
        found = exported(volumes[:batch])
        for name in ("valid", "positions", "scores", "scales"):
            torch.testing.assert_close(getattr(found, name), getattr(expected, name)[:batch], rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_without_waiting_for_it():
    volumes = torch.stack([texture((20, 24, 28), seed) for seed in range(2)])[:, None]
    find = kaf_layer.SIFTDetector(64, spatial_dims=3, spacing=(2.0, 1.0, 1.0))
    expected, on_device = find(volumes), volumes.cuda()
    find(on_device)  # the first call loads kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        keypoints = find(on_device)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in FIELDS:
        torch.testing.assert_close(getattr(keypoints, name).cpu(), getattr(expected, name), rtol=1e-3, atol=1e-3)


def test_autocast_type_range_and_colour_change_nothing():
    volume = (texture((16, 18, 20)) * 20 + 100).round().clamp(0, 255).to(torch.uint8)[None, None]
    expected = detector()(volume)
    with torch.autocast(TARGET.device, dtype=torch.bfloat16):
        assert detector()(volume).descriptors.equal(expected.descriptors)
    for other in (volume.float() * 3 - 7, volume.double(), volume.expand(-1, 3, -1, -1, -1)):
        keypoints = detector()(other)
        assert keypoints.positions.dtype == (torch.float64 if other.dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(keypoints.positions.float(), expected.positions, rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["positions", "scores", "scales"])
def test_gradient_with_fixed_selection(name):
    find = detector(12, descriptors=False, spacing=(2.0, 1.0, 1.0))
    volume = texture((9, 12, 14), seed=2, dtype=torch.float64)[None, None].requires_grad_()
    valid = find(volume).valid
    assert valid.sum() >= 3
    assert torch.autograd.gradcheck(lambda x: getattr(find(x), name)[valid], volume, fast_mode=True, atol=1e-4)


def test_constant_volumes_have_no_keypoints_and_no_nan_gradients():
    volumes = torch.stack([torch.full((12, 14, 16), 7.0), texture((12, 14, 16))])[:, None].requires_grad_()
    keypoints = detector(16)(volumes)
    assert keypoints.valid.any(1).tolist() == [False, True]
    assert (keypoints.descriptors[0] == 0).all()
    total = sum(getattr(keypoints, name).square().sum() for name in FIELDS if name != "valid")
    (gradient,) = torch.autograd.grad(total + keypoints.descriptors[..., ::5].sum(), volumes)
    assert gradient.isfinite().all()
    assert gradient[1].abs().sum() > 0


@pytest.mark.parametrize("shape", [(8, 8, 8), (1, 8, 8, 8)])
def test_volumes_must_be_a_batch(shape):
    with pytest.raises(ValueError, match=r"images must be \(B, C, D, H, W\), got"):
        detector()(torch.zeros(shape))


def test_an_empty_batch_of_volumes():
    assert detector(7)(torch.zeros(0, 2, 8, 8, 8)).descriptors.shape == (0, 7, 768)


@pytest.mark.parametrize("size", [(1, 32, 32), (2, 32, 32), (32, 32, 2)])
def test_volumes_must_not_be_too_thin(size):
    with pytest.raises(ValueError, match="at least 3 voxels along every axis"):
        detector()(torch.rand(1, 1, *size))
    thinnest = tuple(max(3, n) for n in size)
    for spacing in (None, (8.0, 1.0, 1.0)):
        keypoints = detector(spacing=spacing)(torch.rand(1, 1, *thinnest))
        assert keypoints.positions.isfinite().all()


@checks_values
def test_volumes_must_be_finite():
    volume = torch.rand(2, 1, 8, 8, 8)
    volume[1, 0, 2, 3, 4] = float("inf")
    with pytest.raises(ValueError, match=r"samples=\[1\]"):
        detector()(volume)


@pytest.mark.parametrize("spacing", [(0, 1, 1), (1, 1, -2.0), (1, float("nan"), 1), (1, float("inf"), 1)])
def test_spacing_must_be_positive(spacing):
    with pytest.raises(ValueError, match="spacing must be positive and finite"):
        detector(spacing=spacing)


@pytest.mark.parametrize(
    "options", [{"spatial_dims": 3, "spacing": (1, 1)}, {"spacing": (1, 1)}, {"spacing": (1,) * 3}]
)
def test_spacing_is_of_volumes(options):
    with pytest.raises(ValueError, match="spacing must be three distances"):
        SIFTDetector(**options)


@pytest.mark.parametrize("options", [{"upscale": "opencv"}, {"orientations": "all"}])
def test_options_of_images_alone(options):
    with pytest.raises(ValueError, match="upscale and orientations are for images alone, got"):
        detector(**options)
    with pytest.raises(ValueError, match="spatial_dims must be 2 or 3"):
        SIFTDetector(spatial_dims=1)
