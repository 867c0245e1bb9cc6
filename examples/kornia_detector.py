"""A KeypointDetector from any local feature of Kornia: DISK, DeDoDe, ALIKED, or a LocalFeature such as KeyNet.

keypoints = KorniaDetector(kornia.feature.DISK.from_pretrained("depth"))(images)
"""

from typing import Any

import kornia.feature as KF
import torch
from torch import Tensor, nn

from kaf_layer import Keypoints


class KorniaDetector:
    """Detects keypoints in images (B, C, H, W) of any range, with one channel or RGB.

    The keypoints are in descending order of their scores. They have no gradients.

    Args:
        feature: DISK, DeDoDe, ALIKED, or a LocalFeature such as KeyNetHardNet, of ``kornia.feature``.
        max_keypoints: the largest number of keypoints in an image. The strongest are kept.
    """

    def __init__(self, feature: nn.Module, max_keypoints: int = 512) -> None:
        if not isinstance(feature, KF.DISK | KF.DeDoDe | KF.ALIKED | KF.LocalFeature):
            raise ValueError(f"feature must be Kornia's DISK, DeDoDe, ALIKED or a LocalFeature, got {type(feature)}")
        self.feature, self.max_keypoints = feature.eval(), max_keypoints

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Keypoints:
        """Detects image by image, since the number of keypoints differs between images, and this needs less memory."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"images must be (B, 1, H, W) or (B, 3, H, W), got {images.shape=}")
        return Keypoints.stack([self.detect(image) for image in images])

    def detect(self, image: Tensor) -> Keypoints:
        """The keypoints of one image (C, H, W), without a batch axis."""
        low, high = image.aminmax()
        image = ((image - low) / (high - low).clamp(min=1e-6))[None].float()
        found = local_frames(self.feature, image) if isinstance(self.feature, KF.LocalFeature) else self.points(image)
        strongest = found["scores"].argsort(descending=True, stable=True)[: self.max_keypoints]
        found = {name: value[strongest] for name, value in found.items()}
        valid = torch.ones_like(found["scores"], dtype=torch.bool)
        return Keypoints(found.pop("positions"), valid, tuple(image.shape[2:]), **found)

    def points(self, image: Tensor) -> dict[str, Any]:
        """The keypoints of a network for RGB images."""
        rgb = image.expand(-1, 3, -1, -1)
        if isinstance(self.feature, KF.DeDoDe):
            positions, scores, descriptors = (value[0].float() for value in self.feature(rgb, n=self.max_keypoints))
            return {
                "positions": positions - 0.5,
                "scores": scores,
                "descriptors": descriptors,
            }  # DeDoDe's pixels begin at integers
        (found,) = self.feature(rgb, **({"pad_if_not_divisible": True} if isinstance(self.feature, KF.DISK) else {}))
        scores = found.detection_scores if isinstance(self.feature, KF.DISK) else found.keypoint_scores
        return {"positions": found.keypoints.float(), "scores": scores, "descriptors": found.descriptors}


def local_frames(feature: KF.LocalFeature, image: Tensor) -> dict[str, Any]:
    """Positions, scales and angles of local affine frames, without empty slots."""
    frames, scores, descriptors = feature(image.mean(dim=1, keepdim=True))
    filled = KF.laf_is_filled(frames)[0]
    frames = frames[:, filled]
    # Kornia's angles are in degrees and have the opposite direction.
    return {
        "positions": KF.get_laf_center(frames)[0],
        "scores": scores[0, filled],
        "scales": KF.get_laf_scale(frames)[0].flatten(),
        "angles": -torch.deg2rad(KF.get_laf_orientation(frames)[0].flatten()),
        "descriptors": descriptors[0, filled],
    }
