"""Kornia's local affine frames, there and back, against Kornia's own conventions and OpenCV's."""

import kornia.feature as KF
import pytest
import torch
from common import random_keypoints
from torch import Tensor

from kaf_layer import GridDetector, Keypoints, SIFTDetector
from kaf_layer.interop import keypoints_from_lafs, to_lafs

SIZE = (44, 58)
NAN = float("nan")


def described(**options: object) -> Keypoints:
    """Padded slots hold NaN everywhere."""
    keypoints = random_keypoints(SIZE, (7, 0, 4), **options)
    generator = torch.Generator().manual_seed(1)
    shape, dtype = keypoints.valid.shape, keypoints.positions.dtype
    scales = 1 + 5 * torch.rand(shape, generator=generator, dtype=dtype)
    angles = torch.pi * (2 * torch.rand(shape, generator=generator, dtype=dtype) - 1)
    scores = torch.rand(shape, generator=generator, dtype=dtype)
    fields = {"scales": scales, "angles": angles, "scores": scores}
    padded = {name: value.masked_fill(~keypoints.valid, NAN) for name, value in fields.items()}
    return Keypoints(keypoints.positions, keypoints.valid, SIZE, **padded)


@pytest.mark.parametrize("magnification", [6.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_round_trip(magnification: float, dtype: torch.dtype) -> None:
    keypoints = described(dtype=dtype)
    lafs = to_lafs(keypoints, magnification=magnification)
    assert lafs.dtype == dtype
    assert lafs[~keypoints.valid].eq(0).all()
    back = keypoints_from_lafs(lafs, keypoints.scores, image_size=SIZE, magnification=magnification)
    assert back.valid.equal(keypoints.valid)
    for name in ("positions", "scales", "angles", "scores"):
        actual, expected = (getattr(kp, name)[keypoints.valid] for kp in (back, keypoints))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        if name != "scores":
            assert getattr(back, name).isfinite().all()
    torch.testing.assert_close(to_lafs(back, magnification=magnification), lafs, atol=1e-4, rtol=1e-5)


def test_frames_are_those_of_a_loop() -> None:
    """A point of the patch turns by the angle from the x axis towards the y axis, and grows by the scale."""
    keypoints = described()
    lafs = to_lafs(keypoints)
    for sample, slot in keypoints.valid.nonzero().tolist():
        x, y = keypoints.positions[sample, slot]
        scale, angle = keypoints.scales[sample, slot], keypoints.angles[sample, slot]
        along = torch.stack([x + 6 * scale * angle.cos(), y + 6 * scale * angle.sin()])
        torch.testing.assert_close(lafs[sample, slot] @ torch.tensor([1.0, 0.0, 1.0]).double(), along)
        across = torch.stack([x - 6 * scale * angle.sin(), y + 6 * scale * angle.cos()])
        torch.testing.assert_close(lafs[sample, slot] @ torch.tensor([0.0, 1.0, 1.0]).double(), across)


def test_frames_are_those_of_opencv_in_kornia() -> None:
    cv2 = pytest.importorskip("cv2")
    integrated = pytest.importorskip("kornia.feature.integrated")
    convert = getattr(integrated, "laf_from_opencv_SIFT_kpts", None) or _as_kornia_moons
    keypoints = described(dtype=torch.float32)
    valid = keypoints.valid[0]
    fields = zip(keypoints.positions[0][valid], keypoints.scales[0][valid], keypoints.angles[0][valid], strict=True)
    theirs = [cv2.KeyPoint(*p.tolist(), 2 * s.item(), a.rad2deg().item() % 360) for p, s, a in fields]
    torch.testing.assert_close(to_lafs(keypoints)[:1, valid], convert(theirs), atol=1e-3, rtol=1e-4)


def _as_kornia_moons(points: list, magnification: float = 6.0) -> Tensor:
    """What Kornia's documentation does with cv2.KeyPoint: half of its size times 6, its angle negated."""
    xy = torch.tensor([point.pt for point in points]).view(1, -1, 2)
    scales = torch.tensor([magnification * point.size for point in points]).view(1, -1, 1, 1)
    angles = torch.tensor([-point.angle for point in points]).view(1, -1, 1)
    return KF.scale_laf(KF.laf_from_center_scale_ori(xy, scales, angles), 0.5)


def test_without_scales_and_angles() -> None:
    keypoints = GridDetector(20)(torch.zeros(2, 1, *SIZE))
    lafs = to_lafs(keypoints, magnification=3.0)
    assert lafs[..., :2].equal((3 * torch.eye(2)).expand(*keypoints.valid.shape, 2, 2))
    assert lafs[..., 2].equal(keypoints.positions)


def test_differentiable_and_padding_takes_no_gradient() -> None:
    keypoints = described()
    inputs = [getattr(keypoints, name).clone().requires_grad_() for name in ("positions", "scales", "angles")]
    positions, scales, angles = inputs
    lafs = to_lafs(Keypoints(positions, keypoints.valid, SIZE, scales=scales, angles=angles))
    for gradient in torch.autograd.grad(lafs.sin().sum(), inputs):
        assert gradient[keypoints.valid].abs().sum() > 0
        assert gradient[~keypoints.valid].eq(0).all()


def test_frames_that_are_none_are_padding() -> None:
    lafs = to_lafs(described())
    lafs[0, 0] = NAN
    lafs[0, 1] = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 3.0]])  # a line
    back = keypoints_from_lafs(lafs, image_size=SIZE)
    assert not back.valid[0, :2].any()
    assert back.positions.isfinite().all()


def test_kornias_matchers_take_our_keypoints() -> None:
    """Matching with the geometry of the frames finds an image again that was moved."""
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.avg_pool2d(torch.rand(1, 1, 130, 150, generator=generator), 5, 1)
    a, b = (SIFTDetector(100, root=False)(x) for x in (image, image.roll((4, 6), (2, 3))))
    one, two = a.valid[0], b.valid[0]
    _, pairs = KF.match_smnn(a.descriptors[0][one], b.descriptors[0][two], 0.9)
    assert len(pairs) > 10
    moved = b.positions[0][two][pairs[:, 1]] - a.positions[0][one][pairs[:, 0]]
    assert ((moved - torch.tensor([6.0, 4.0])).abs() < 0.5).all(1).double().mean() > 0.9
    patches = KF.extract_patches_from_pyramid(image, to_lafs(a)[:, one], 32)
    assert KF.SIFTDescriptor(32)(patches.flatten(0, 1)).isfinite().all()


def test_our_layer_takes_kornias_keypoints() -> None:
    from kaf_layer import KAFLayer

    image = torch.rand(2, 1, *SIZE, generator=torch.Generator().manual_seed(0))
    lafs, responses = KF.ScaleSpaceDetector(num_features=30)(image)
    keypoints = keypoints_from_lafs(lafs, responses, image_size=SIZE)
    assert keypoints.valid.any(1).all()
    features, _ = KAFLayer(4, embed_dim=8, depth=1, num_heads=2)(torch.randn(2, 4, *SIZE), keypoints)
    assert features.isfinite().all()


def test_errors() -> None:
    volume = Keypoints(torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool), (4, 4, 4))
    with pytest.raises(ValueError, match="keypoints must be of images"):
        to_lafs(volume)
    with pytest.raises(TypeError, match="keypoints"):
        to_lafs(torch.zeros(1, 2, 2, 3))
    with pytest.raises(ValueError, match=r"lafs must be \(B, N, 2, 3\)"):
        keypoints_from_lafs(torch.zeros(2, 2, 3), image_size=SIZE)
    with pytest.raises(ValueError, match="scores"):
        keypoints_from_lafs(torch.zeros(2, 5, 2, 3), torch.zeros(2, 4), image_size=SIZE)
