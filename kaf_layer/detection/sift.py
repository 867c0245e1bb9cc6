"""SIFTDetector: OpenCV's SIFT, batched, differentiable, on the device."""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from kornia.color import rgb_to_grayscale
from torch import Tensor, nn

from kaf_layer.detection.descriptors import describe, orient
from kaf_layer.detection.extrema import find_extrema, fit, refine, select
from kaf_layer.detection.scale_space import BORDER, double, scale_space
from kaf_layer.keypoints import Keypoints

__all__ = ["SIFTDetector"]

SMALLEST = BORDER + 1  # doubled, such an image has a pixel within the border of the first octave
CAMERA_BLUR = 0.5  # what an image is assumed to be blurred by already, in its pixels
PEAKS = 4  # the most orientations of a keypoint


class SIFTDetector(nn.Module):
    def __init__(
        self,
        max_keypoints: int = 512,
        *,
        contrast_threshold: float = 0.04,
        edge_threshold: float = 10.0,
        sigma: float = 1.6,
        octave_layers: int = 3,
        upscale: Literal["precise", "opencv"] = "precise",
        normalize: bool = True,
        orientations: Literal["strongest", "all"] = "strongest",
        descriptors: bool = True,
        root: bool = True,
    ) -> None:
        super().__init__()
        self.max_keypoints = max_keypoints
        self.contrast_threshold = contrast_threshold
        self.edge_threshold = edge_threshold
        self.sigma = sigma
        self.octave_layers = octave_layers
        self.upscale = upscale
        self.normalize = normalize
        self.orientations = orientations
        self.descriptors = descriptors
        self.root = root

    def forward(self, images: Annotated[Tensor, "B C H W"]) -> Keypoints:
        static = images.is_cuda or torch.compiler.is_compiling()
        with torch.autocast(images.device.type, enabled=False):
            grey = self._grey(images)
            if static:
                values = self._detect(grey, static=True)
            else:
                # On a CPU one image's scale space still fits the cache.
                samples = [self._detect(image, static=False) for image in grey.split(1)]
                values = {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
        return Keypoints(**values, image_size=tuple(images.shape[-2:]))

    def _grey(self, images: Tensor) -> Annotated[Tensor, "B H W"]:
        dtype = torch.promote_types(images.dtype, torch.float32)
        grey = images.to(dtype)
        grey = (rgb_to_grayscale(grey) if images.shape[1] == 3 else grey)[:, 0]
        if self.normalize:
            low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
            return (grey - low) / torch.where(high > low, high - low, 1.0)
        return grey / 255 if images.dtype == torch.uint8 else grey

    def _detect(self, grey: Annotated[Tensor, "B H W"], *, static: bool) -> dict[str, Tensor]:
        space = scale_space(
            double(grey, self.upscale), layers=self.octave_layers, sigma=self.sigma, blurred=2 * CAMERA_BLUR
        )
        with torch.no_grad():
            # OpenCV rounds this threshold down to whole grey levels.
            threshold = math.floor(0.5 * self.contrast_threshold / self.octave_layers * 255) / 255
            extrema, valid = find_extrema(space, threshold=threshold, static=static)
            extrema, valid, response = refine(
                space,
                extrema,
                valid,
                contrast_threshold=self.contrast_threshold,
                edge_threshold=self.edge_threshold,
            )
            extrema, valid = select(extrema, valid, response, batch=len(grey), slots=self.max_keypoints, static=static)
        peak = fit(space, extrema, valid)
        s, y, x = (position + offset for position, offset in zip(extrema[5:], peak.offset.unbind(-1), strict=True))
        scale = self.sigma * 2 ** (s / self.octave_layers)
        centre = torch.stack([x, y], dim=-1)
        pixel = 2.0 ** (extrema.octave - 1)
        with torch.no_grad():
            angles, strength = orient(space, extrema, centre, scale)
            angle = angles.gather(-1, strength.argmax(-1, keepdim=True))[..., 0] % math.tau
        values = {
            "positions": centre * pixel[..., None],
            "scores": peak.contrast.abs(),
            "scales": scale * pixel,
            "angles": angle,
        }
        if self.descriptors:
            values["descriptors"] = describe(space, extrema, centre, scale, angle, root=self.root)
        return {"valid": self._pad(valid)} | {
            name: self._pad(torch.where(valid.view(*valid.shape, *(1,) * (value.ndim - 2)), value, 0.0))
            for name, value in values.items()
        }

    def _pad(self, value: Tensor) -> Tensor:
        return F.pad(value, (0, 0) * (value.ndim - 2) + (0, self.max_keypoints - value.shape[1]))
