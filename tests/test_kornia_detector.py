"""Kornia's local features as a KeypointDetector: random weights, as nothing is downloaded."""

from pathlib import Path

import kornia.feature as KF
import pytest
import torch
from torch import Tensor, nn

from examples.kornia_detector import KorniaDetector
from kaf_layer import KAFLayer, KeypointDetector, Keypoints

CORNER = (21, 9)  # x, y


def images() -> Tensor:
    """Three of 44x58 pixels, of noise, in ranges of their own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, 44, 58, generator=generator) * torch.tensor([1.0, 30, 0.1]).view(3, 1, 1, 1)


FEATURES = {
    "disk": KF.DISK,
    "aliked": lambda: KF.ALIKED(detection_threshold=0.0, max_num_keypoints=40),
    "dog": lambda: KF.SIFTFeature(30),
}


@pytest.mark.parametrize("name", FEATURES)
def test_keypoints_of_every_kind(name: str) -> None:
    torch.manual_seed(0)
    detector: KeypointDetector = KorniaDetector(FEATURES[name](), 25)
    batch = images()
    keypoints = detector(batch)
    assert len(keypoints) == 3
    assert keypoints.image_size == (44, 58)
    assert 0 < keypoints.valid.sum() <= 3 * 25
    for i in range(3):
        kept = keypoints.valid[i]
        positions, scores = keypoints.positions[i][kept], keypoints.scores[i][kept]
        assert scores.equal(scores.sort(descending=True).values)
        assert (positions >= -0.5).all()
        assert (positions < torch.tensor([58, 44]) - 0.5).all()
        # Neither the range, nor a third of the same channel, nor the rest of the batch makes a difference.
        alone = detector(7 * batch[i : i + 1].expand(-1, 3, -1, -1) - 2)
        torch.testing.assert_close(alone.positions[0][alone.valid[0]], positions, atol=1e-2, rtol=0)
    KAFLayer(4, embed_dim=8, depth=1)(torch.randn(3, 4, 22, 29), keypoints)


class Peak(KF.DISK):
    """DISK whose heatmap is the image itself."""

    def heatmap_and_dense_descriptors(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images[:, :1], images.new_ones(len(images), 8, *images.shape[2:])


def test_positions_are_pixels() -> None:
    """Of each kind, at the pixel where the only structure is."""
    image = torch.zeros(1, 1, 44, 58)
    image[0, 0, CORNER[1], CORNER[0]] = 1
    disk = KorniaDetector(Peak())(image)
    assert disk.positions[0].tolist() == [list(CORNER)]
    with torch.device("meta"):  # its networks are large, and not what is tested
        dedode = KF.DeDoDe(descriptor_model="B")
    dedode.detector, dedode.descriptor, dedode.normalizer = First(), First(), nn.Identity()
    assert KorniaDetector(dedode, 1)(image).positions[0, 0].tolist() == pytest.approx(CORNER, abs=1e-4)
    aliked = KF.ALIKED()
    aliked.extract_dense_map = lambda images: (images.new_ones(1, 128, 44, 58), images[:, :1])
    (position,) = KorniaDetector(aliked)(image).positions[0].tolist()
    assert position == pytest.approx(CORNER, abs=1e-3)


class First(nn.Module):
    """The first channel, as a network's logits."""

    def forward(self, images: Tensor) -> Tensor:
        return 50 * images[:, :1]


def test_angles_run_from_x_to_y() -> None:
    class Fixed(nn.Module):
        def forward(self, images: Tensor, mask: None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
            frames = torch.zeros(1, 3, 2, 3)
            frames[0, 1] = torch.tensor([[0.0, -4.0, 21.0], [4.0, 0.0, 9.0]])  # its x axis points along the image's y
            return frames, torch.tensor([[0.0, 0.5, 0.0]])

    found = KorniaDetector(KF.LocalFeature(Fixed(), KF.LAFDescriptor(KF.TFeat(pretrained=False), 32)))(images()[:1])
    assert found.positions.tolist() == [[[21.0, 9.0]]]  # without the slots that were not filled
    assert found.angles.item() == pytest.approx(torch.pi / 2, abs=1e-4)
    assert found.scales.item() == pytest.approx(4.0, abs=1e-4)


def test_an_image_without_structure() -> None:
    keypoints = KorniaDetector(KF.DISK())(torch.stack([torch.full((1, 32, 40), 3.0), images()[0, :, :32, :40]]))
    assert isinstance(keypoints, Keypoints)
    assert keypoints.positions.isfinite().all()


def test_errors() -> None:
    with pytest.raises(ValueError, match="feature must be Kornia's"):
        KorniaDetector(nn.Conv2d(1, 1, 1))
    with pytest.raises(ValueError, match=r"got images.shape=torch.Size\(\[1, 2, 8, 8\]\)"):
        KorniaDetector(KF.DISK())(torch.zeros(1, 2, 8, 8))


@pytest.mark.parametrize("name", ["disk", "aliked", "keynet"])
def test_in_the_protocol_with_weights_from_a_file(tmp_path: Path, name: str) -> None:
    detectors = pytest.importorskip("examples.protocol.models.detectors", reason="the extra train is not here")
    options_of = pytest.importorskip("examples.protocol.options")
    torch.manual_seed(1)
    state = detectors.FEATURES[name](20).state_dict()
    torch.save({"extractor": state} if name == "disk" else state, tmp_path / "weights.pth")
    arguments = ["--output", "x", "--detector", name, "--detector-weights", str(tmp_path / "weights.pth")]
    options = options_of.parse(options_of.Options, [*arguments, "--max-keypoints", "20"])
    detector = detectors.build_detector(options)
    assert detector.max_keypoints == 20
    assert all(value.equal(state[key]) for key, value in detector.feature.state_dict().items())
    torch.save({"extractor": {}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth holds no weights of --detector {name}"):
        detectors.build_detector(options)
