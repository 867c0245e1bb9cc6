"""SuperPoint with random weights: against loops, in batches, and in the protocol."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from examples.superpoint import SuperPoint, describe, suppress
from kaf_layer import KAFLayer, KeypointDetector


def images(height: int = 41, width: int = 58) -> Tensor:
    """Three of noise, in ranges of their own."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(3, 1, height, width, generator=generator) * torch.tensor([1.0, 30, 0.1]).view(3, 1, 1, 1)


@pytest.fixture
def detector() -> SuperPoint:
    torch.manual_seed(0)
    return SuperPoint(40, threshold=0.0)


def greedy(heatmap: Tensor, radius: int) -> Tensor:
    """The strongest first; those near one that is kept are dropped."""
    height, width = heatmap.shape
    order = sorted(range(height * width), key=lambda i: (-heatmap.flatten()[i].item(), i))
    kept: list[tuple[int, int]] = []
    for i in order:
        y, x = divmod(i, width)
        if all(max(abs(y - a), abs(x - b)) > radius for a, b in kept):
            kept.append((y, x))
    result = torch.zeros_like(heatmap)
    for y, x in kept:
        result[y, x] = heatmap[y, x]
    return result


@pytest.mark.parametrize("radius", [1, 4])
def test_suppression_is_the_greedy_one(radius: int) -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(19, 27, generator=generator)
    ramp = torch.arange(19 * 27).view(19, 27) / 600.0  # each pixel depends on the one before
    ties = torch.randint(1, 4, (19, 27), generator=generator) / 4.0
    maps = torch.stack([noise, ramp, ties])
    assert suppress(maps, radius).equal(torch.stack([greedy(m, radius) for m in maps]))


def cubic(t: float) -> list[float]:
    """Keys' kernel with a = -0.75 at the distances 1 + t, t, 1 - t and 2 - t."""
    a = -0.75
    near = [(a + 2) * d**3 - (a + 3) * d**2 + 1 for d in (t, 1 - t)]
    far = [a * (d**3 - 5 * d**2 + 8 * d - 4) for d in (1 + t, 2 - t)]
    return [far[0], near[0], near[1], far[1]]


def test_descriptors_are_bicubic_and_of_length_one() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 5, 4, 6)
    positions = torch.rand(2, 7, 2) * torch.tensor([48.0, 32.0]) - 0.5
    positions[0, 0], positions[1, 0] = torch.tensor([3.5, 3.5]), torch.tensor([47.0, 31.0])  # a cell's centre; a corner
    found = describe(maps, positions)
    for b in range(2):
        for n in range(7):
            x, y = ((positions[b, n] + 0.5) / 8 - 0.5).tolist()
            left, top = int(x // 1), int(y // 1)
            total = torch.zeros(5)
            for i, wy in enumerate(cubic(y - top)):
                for j, wx in enumerate(cubic(x - left)):
                    row, column = min(max(top - 1 + i, 0), 3), min(max(left - 1 + j, 0), 5)
                    total += wy * wx * maps[b, :, row, column]
            torch.testing.assert_close(found[b, n], total / total.norm(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0, 0], maps[0, :, 0, 0] / maps[0, :, 0, 0].norm())


def test_a_pixel_of_a_cell_is_a_channel(detector: SuperPoint) -> None:
    """Channel 8 i + j is row i and column j of the cell, and the last one is none of them."""
    with torch.no_grad():
        detector.convPb.weight.zero_()
        detector.convPb.bias.zero_()
        detector.convPb.bias[8 * 5 + 2] = 9.0
    (heatmap, *_), _ = detector.maps(torch.rand(1, 1, 16, 24))
    expected = torch.full((64,), 1 / (64 + torch.tensor(9.0).exp()))
    expected[42] *= torch.tensor(9.0).exp()
    for cell in heatmap.unfold(0, 8, 8).unfold(1, 8, 8).reshape(-1, 64):
        torch.testing.assert_close(cell, expected)
    with torch.no_grad():
        detector.convPb.bias[64] = 50.0
    assert detector.maps(torch.rand(1, 1, 16, 24))[0].max() < 1e-10


def test_keypoints_are_padded_and_of_each_image_alone(detector: SuperPoint) -> None:
    found: KeypointDetector = detector
    batch = images()
    keypoints = found(batch)
    assert keypoints.positions.shape == (3, 40, 2)
    assert keypoints.descriptors.shape == (3, 40, 256)
    assert keypoints.image_size == (41, 58)
    assert keypoints.scores.equal(keypoints.scores.sort(dim=1, descending=True).values)
    for i in range(3):
        valid = keypoints.valid[i]
        assert 10 < valid.sum() <= 40
        positions = keypoints.positions[i][valid]
        assert (positions >= 0).all()
        assert (positions <= torch.tensor([57, 40])).all()
        apart = (positions[:, None] - positions).abs().amax(-1) + 100 * torch.eye(len(positions))
        assert apart.min() > 4
        # Neither the range, nor a third of the same channel, nor the rest of the batch makes a difference.
        alone = found(7 * batch[i : i + 1].expand(-1, 3, -1, -1) - 2)
        assert (alone.positions[0] == keypoints.positions[i]).float().mean() > 0.95
    few = SuperPoint(9, threshold=0.0)
    few.load_state_dict(detector.state_dict())
    assert few(batch).positions.equal(keypoints.positions[:, :9])
    KAFLayer(4, embed_dim=8, depth=1)(torch.randn(3, 4, 21, 29), keypoints)


def test_images_without_structure_and_too_small(detector: SuperPoint) -> None:
    flat = detector(torch.full((1, 1, 5, 6), 3.0))  # fewer pixels than slots
    assert flat.positions.shape == (1, 40, 2)
    assert flat.descriptors.isfinite().all()
    assert not SuperPoint(40, threshold=1.0)(images()).valid.any()
    with pytest.raises(ValueError, match=r"got images.shape=torch.Size\(\[1, 2, 8, 8\]\)"):
        detector(torch.zeros(1, 2, 8, 8))


def test_the_layout_of_the_published_weights() -> None:
    names = [f"conv{n}{letter}" for n in "1234" for letter in "ab"] + ["convPa", "convPb", "convDa", "convDb"]
    state = SuperPoint().state_dict()
    assert list(state) == [f"{name}.{kind}" for name in names for kind in ("weight", "bias")]
    assert state["conv1a.weight"].shape == (64, 1, 3, 3)
    assert state["convPb.weight"].shape == (65, 256, 1, 1)
    assert sum(value.numel() for value in state.values()) == 1_300_865


def test_in_the_protocol_with_weights_from_a_file(tmp_path: Path) -> None:
    detectors = pytest.importorskip("examples.protocol.models.detectors", reason="the extra train is not here")
    options_of = pytest.importorskip("examples.protocol.options")
    torch.manual_seed(1)
    state = SuperPoint().state_dict()
    file = tmp_path / "superpoint.pth"
    torch.save(state, file)
    arguments = ["--output", "x", "--detector", "superpoint", "--detector-weights", str(file), "--max-keypoints", "20"]
    options = options_of.parse(options_of.Options, arguments)
    detector = detectors.build_detector(options)
    assert detector(images()).positions.shape == (3, 20, 2)
    assert all(value.equal(state[key]) for key, value in detector.state_dict().items())
    for wrong in ({"conv1a.weight": state["conv1a.weight"]}, {**state, "conv1a.bias": torch.zeros(3)}, [state], {}):
        torch.save(wrong, file)
        with pytest.raises(ValueError, match=r"superpoint\.pth holds no weights of --detector superpoint"):
            detectors.build_detector(options)
    with pytest.raises(
        ValueError, match=r"--detector-weights are for disk, .*superpoint, which need them, got superpoint"
    ):
        options_of.parse(options_of.Options, ["--output", "x", "--detector", "superpoint"])
