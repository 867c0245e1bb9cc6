"""GridDetector against a loop over its definition."""

import itertools

import numpy as np
import pytest
import torch

from kaf_layer.detection import GridDetector, KeypointDetector, SIFTDetector


@pytest.mark.parametrize(
    ("size", "spacing"),
    [((32, 24), 8), ((33, 17), 4.5), ((3, 40), 16), ((8, 12, 10), 4), ((8, 12, 10), (2, 6, 5)), ((7,), 2)],
)
def test_grid_is_its_definition(size, spacing):
    steps = spacing if isinstance(spacing, tuple) else (spacing,) * len(size)
    counts = [max(1, round(s / step)) for s, step in zip(size, steps, strict=True)]
    expected = [
        [(i + 0.5) * s / n - 0.5 for i, n, s in zip(index, counts, size, strict=True)][::-1]
        for index in itertools.product(*(range(n) for n in counts))
    ]
    keypoints = GridDetector(spacing)(torch.zeros(2, 3, *size, dtype=torch.float64))
    assert keypoints.image_size == size
    assert keypoints.valid.all()
    assert not keypoints.padded
    assert keypoints.positions.dtype == torch.float64
    torch.testing.assert_close(keypoints.positions, torch.tensor(expected, dtype=torch.float64).expand(2, -1, -1))


def test_grid_is_symmetric_and_inside():
    positions = GridDetector(5)(torch.zeros(1, 1, 23, 37)).positions[0]
    mirrored = (torch.tensor([36.0, 22.0]) - positions).flip(0)
    torch.testing.assert_close(positions, mirrored)
    assert (positions >= 0).all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16])
def test_low_precision_images_get_float32_positions(dtype):
    assert GridDetector(4)(torch.zeros(1, 1, 16, 16, dtype=dtype)).positions.dtype == torch.float32


def test_compile_and_export():
    images, detector = torch.zeros(2, 1, 30, 20), GridDetector((3, 7))
    expected = detector(images).positions
    compiled = torch.compile(detector, fullgraph=True, backend="eager")(images)
    exported = torch.export.export(detector, (images,)).module()(images)
    assert compiled.positions.equal(expected)
    assert exported.positions.equal(expected)
    assert not exported.padded


def test_exported_for_any_batch_size():
    images, shapes = torch.zeros(2, 1, 30, 20), ({0: torch.export.Dim("batch")},)
    exported = torch.export.export(GridDetector(4), (images,), dynamic_shapes=shapes).module()
    for batch in (1, 2, 5):
        actual, expected = (detect(torch.zeros(batch, 1, 30, 20)) for detect in (exported, GridDetector(4)))
        assert actual.positions.equal(expected.positions)
        assert actual.valid.equal(expected.valid)


@pytest.mark.parametrize("spacing", [np.float32(4), np.int64(4), np.array([4, 6]), (np.float64(4), 6)])
def test_spacing_of_numpy(spacing):
    detector = GridDetector(spacing)
    expected = GridDetector(spacing.tolist() if isinstance(spacing, (np.ndarray, np.generic)) else (4, 6))
    assert detector(torch.zeros(1, 1, 30, 20)).positions.equal(expected(torch.zeros(1, 1, 30, 20)).positions)
    assert "np." not in repr(detector)


@pytest.mark.parametrize("spacing", [0, -1.0, (4, 0), ()])
def test_spacing_must_be_positive(spacing):
    with pytest.raises(ValueError, match="spacing must be positive"):
        GridDetector(spacing)


@pytest.mark.parametrize(("shape", "spacing"), [((2, 1), 4), ((2, 1, 8, 8), (2, 2, 2))])
def test_axes_must_fit(shape, spacing):
    with pytest.raises(ValueError, match=r"images\.shape="):
        GridDetector(spacing)(torch.zeros(shape))


def test_detectors_keep_to_the_protocol():
    assert isinstance(GridDetector(4), KeypointDetector)
    assert isinstance(SIFTDetector(), KeypointDetector)
