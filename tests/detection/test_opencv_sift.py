"""The adapter in examples: it keeps to the protocol and finds what SIFTDetector finds."""

import pytest
import torch

from kaf_layer.detection import KeypointDetector, SIFTDetector

pytest.importorskip("cv2")


def test_adapter_agrees_with_our_detector():
    from examples.opencv_sift import OpenCVSIFT

    detector = OpenCVSIFT(200)
    assert isinstance(detector, KeypointDetector)
    y, x = torch.meshgrid(torch.arange(60.0), torch.arange(80.0), indexing="ij")
    blobs = [torch.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * s**2)) for cx, cy, s in ((20, 15, 3), (50, 40, 5))]
    images = torch.stack([blobs[0] + blobs[1], torch.zeros(60, 80)])[:, None]
    theirs, ours = detector(images), SIFTDetector(200)(images)
    assert theirs.image_size == (60, 80)
    assert not theirs.valid[1].any()
    assert (theirs.scores[0].diff() <= 0).all()
    distance = torch.cdist(theirs.positions[0], ours.positions[0][ours.valid[0]])
    assert (distance.amin(0) < 0.05).all()
    assert (distance.amin(1) < 0.05).all()
    assert detector(images.expand(-1, 3, -1, -1)).positions.allclose(theirs.positions, atol=0.05)
