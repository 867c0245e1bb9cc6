"""SIFTDetector: OpenCV's SIFT, batched, differentiable and on the images' device; and its counterpart for volumes."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from contextlib import nullcontext
from numbers import Integral
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kaf_layer.checks import check_counts, check_tensors
from kaf_layer.detection.sift.channels import ChannelRule, check_channels, one_channel, stretch
from kaf_layer.detection.sift.dimensions import DIMENSIONS
from kaf_layer.detection.sift.extrema import Extrema, find_extrema, select
from kaf_layer.detection.sift.pyramid import ScaleSpace
from kaf_layer.detection.sift.refinement import locate, refine
from kaf_layer.detection.sift.voxels import Voxels
from kaf_layer.keypoints import Keypoints
from kaf_layer.precision import exact_products, without_autocast

__all__ = ["SIFTDetector"]

CANDIDATES = 4096  # of an octave of an image, where shapes are static


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _exports_onnx() -> bool:
    """Asked while tracing: the compiler itself takes torch's function for a constant that is false."""
    return torch.onnx.is_in_onnx_export()


class SIFTDetector(nn.Module):
    """The scale-invariant feature transform (Lowe 2004), with OpenCV's options and defaults.

    It finds the keypoints of ``cv2.SIFT_create`` in whole batches, on the device of the images, and describes them. The
    result always has ``max_keypoints`` slots, by descending score. Slots that an image does not
    fill are not ``valid`` and hold zeros. Images do not influence each other.

    Which pixels are keypoints, and in which order, is piecewise constant in the image. The rest is differentiable.
    Positions, scores and scales have the gradient of the quadratic that is fitted to the differences of
    Gaussians (with ``normalize`` also through the minimum and maximum). Descriptors have the gradient of their samples,
    including the positions and scales of the keypoints. Angles have none. On CUDA the order in which gradients are
    summed is not fixed, unless ``torch.use_deterministic_algorithms`` is on.

    There are two paths to the same result. On a CPU, images are searched one by one, and all extrema are candidates.
    On other devices, and under ``torch.compile`` and ``torch.export``, all shapes are static and nothing
    waits for the device. There the candidates are the 4096 strongest extrema of each octave of an image, or twice
    ``max_keypoints`` if that is more, but at most one for 64 pixels of a layer (white noise has one in 1500).

    With ``spatial_dims=3`` it finds keypoints in volumes in the same way, after Rister et al. (2017). Their
    orientation is a frame of three axes, and their descriptors count gradients towards the vertices of an
    icosahedron. Distances are physical: with a ``spacing``, axes with coarser voxels are blurred less, and are
    neither doubled nor halved until the others are as coarse. Voxels are compared with their
    6 neighbours and with themselves in the layers below and above, and moved by at most half a voxel. The doubled scale
    space of a volume of 64x128x128 cubic voxels takes 0.23 GB.

    Blurring and fitting use matrix products in float32, even where ``torch.set_float32_matmul_precision`` allows less.
    Only compiled code on a GPU may then round them to TF32: by the blurs about one keypoint in fifteen differs, and the
    others are off by about 0.02 pixels. The fits add little.

    Args:
        max_keypoints: the number of slots of the result. An image with more keypoints keeps the strongest.
        contrast_threshold: the least contrast, times ``octave_layers``, for intensities between 0 and 1.
        edge_threshold: the largest ratio r of the principal curvatures. In volumes, curvatures are at most as unequal
            as r, 1 and 1, measured by ``trace^3 / determinant``.
        sigma: the blur of the first layer, in pixels of the doubled image (of the finest axis).
        octave_layers: the number of scales in each octave in which keypoints are searched.
        upscale: how the image is doubled first. ``"precise"`` is OpenCV's ``enable_precise_upscale``. ``"opencv"``
            is OpenCV's default, whose keypoints all lie a quarter of a pixel too far right and down; for images only.
        normalize: whether to stretch each image from its minimum and maximum to 0 and 1, as the paper does. Otherwise
            uint8 images range from 0 to 255 and others from 0 to 1.
        channel: the number of the channel to search. ``"mean"`` is the mean of all channels; with ``normalize`` each
            is stretched to 0 and 1 first, so that constant ones change nothing. ``"rgb"`` is grey by OpenCV's weights.
            None means RGB for three channels, and the mean for any other number.
        orientations: ``"strongest"`` gives one keypoint per position. ``"all"`` repeats it for every
            direction of at least 80 % of the strongest, as OpenCV does; for images only.
        descriptors: whether to describe the keypoints.
        root: RootSIFT (Arandjelovic and Zisserman 2012) instead of SIFT; both have length 1 and, in two dimensions,
            OpenCV's order.
        spatial_dims: 2 for images, 3 for volumes.
        spacing: the distances between the voxels of a volume in tensor order (z, y, x), in any unit; None for cubes.

    Raises:
        ValueError: if an argument is out of range.

    Example:
        >>> y, x = torch.meshgrid(torch.arange(48.0), torch.arange(64.0), indexing="ij")
        >>> blob = torch.exp(-((x - 40.25) ** 2 + (y - 20.5) ** 2) / (2 * 3.0**2))
        >>> keypoints = SIFTDetector(max_keypoints=8)(blob[None, None])
        >>> keypoints.valid.sum().item(), keypoints.descriptors.shape
        (1, torch.Size([1, 8, 128]))
        >>> [round(v, 1) for v in keypoints.positions[0, 0].tolist()]
        [40.2, 20.5]
    """

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
        channel: ChannelRule = None,
        orientations: Literal["strongest", "all"] = "strongest",
        descriptors: bool = True,
        root: bool = True,
        spatial_dims: Literal[2, 3] = 2,
        spacing: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        check_counts(max_keypoints=max_keypoints, octave_layers=octave_layers)
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma=}")
        if spatial_dims not in DIMENSIONS:
            raise ValueError(f"spatial_dims must be 2 or 3, got {spatial_dims=}")
        if upscale not in ("precise", "opencv"):
            raise ValueError(f'upscale must be "precise" or "opencv", got {upscale=}')
        if orientations not in ("strongest", "all"):
            raise ValueError(f'orientations must be "strongest" or "all", got {orientations=}')
        self._dims = DIMENSIONS[spatial_dims]
        if upscale not in self._dims.upscale or orientations not in self._dims.orientations:
            raise ValueError(
                f"upscale and orientations are for images alone, got {upscale=}, {orientations=} and {spatial_dims=}"
            )
        if channel not in (None, "rgb", "mean") and not (isinstance(channel, Integral) and channel >= 0):
            raise ValueError(f'channel must be a number from 0, "rgb", "mean" or None, got {channel=}')
        self.max_keypoints = int(max_keypoints)  # NumPy's numbers become Python's, which compilers treat as constants
        self.contrast_threshold = float(contrast_threshold)
        self.edge_threshold = float(edge_threshold)
        self.sigma = float(sigma)
        self.octave_layers = int(octave_layers)
        self.upscale = upscale
        self.normalize = normalize
        self.channel: ChannelRule = int(channel) if isinstance(channel, Integral) else channel
        self.orientations = orientations
        self.descriptors = descriptors
        self.root = root
        self.spatial_dims = spatial_dims
        self.spacing = None if spacing is None else tuple(float(step) for step in spacing)
        self._voxels = Voxels.spaced(self.spacing, spatial_dims)

    def forward(self, images: Annotated[Tensor, "B C *S"]) -> Keypoints:
        """Detects and describes the keypoints of every image.

        Args:
            images: (B, C, H, W), or (B, C, D, H, W) with ``spatial_dims=3``; float or integer, of any range (see
                ``normalize``) and any number of channels (see ``channel``).

        Returns:
            Keypoints with ``scores`` (the magnitude of the contrast), ``scales`` (the blur in pixels of the finest
            axis; half of OpenCV's size), in two dimensions ``angles``, and ``descriptors`` of 128 values, or 768 in
            three dimensions, unless they are turned off. They are float64 for float64 images and float32 for all
            others, also under autocast.

        Raises:
            TypeError: if ``images`` is not a tensor.
            RuntimeError: under ``torch.onnx.export``.
            ValueError: if images are not (B, C, *S), lack the channels that ``channel`` needs, are smaller than 6
                pixels or 3 voxels, or are not finite. Values are checked on a CPU only; elsewhere an image that is
                not finite has no keypoints.
        """
        check_tensors(images=images)
        if _exports_onnx():
            raise RuntimeError(
                "SIFTDetector has no ONNX operators: detect outside of the graph, whose input keypoints are"
            )
        if images.ndim != 2 + self.spatial_dims:
            raise ValueError(f"images must be {self._dims.axes}, got {images.shape=}")
        check_channels(self.channel, images)
        if min(images.shape[2:]) < self._dims.smallest:
            raise ValueError(f"{self._dims.too_small}, got {images.shape=}")
        if images.shape[0] == 0:
            return self(F.pad(images, (0, 0) * (images.ndim - 1) + (0, 1)))[:0]
        if not torch.compiler.is_compiling() and hasattr(images, "as_tensor"):  # a MetaTensor of MONAI
            images = images.as_tensor()
        static = images.device.type != "cpu" or torch.compiler.is_compiling()
        # Compiled code cannot change the settings of PyTorch.
        exact = nullcontext() if torch.compiler.is_compiling() else exact_products()
        with without_autocast(images.device), exact:
            grey = self._grey(images, static=static)
            # A CPU is faster with one image at a time, whose scale space may stay in its cache.
            batches = [grey] if static else grey.split(1)
            parts = [self._detect(batch, static=static) for batch in batches]
        values: dict[str, Any] = parts[0]
        if len(parts) > 1:
            values = {name: torch.cat([part[name] for part in parts]) for name in values}
        return Keypoints(**values, image_size=tuple(images.shape[2:]))

    def extra_repr(self) -> str:
        """The maximal number of keypoints, and all options that differ from their defaults."""
        defaults = {name: option.default for name, option in inspect.signature(SIFTDetector).parameters.items()}
        values = {name: getattr(self, name) for name in defaults}
        shown = [name for name in defaults if name == "max_keypoints" or values[name] != defaults[name]]
        return ", ".join(f"{name}={values[name]!r}" for name in shown)

    def _grey(self, images: Tensor, *, static: bool) -> Annotated[Tensor, "B *S"]:
        values = images.to(torch.promote_types(images.dtype, torch.float32))
        grey = one_channel(values, self.channel, normalize=self.normalize)
        finite = grey.isfinite().flatten(1).all(1)
        if not static and not finite.all():
            samples = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"images must be finite, got NaN or infinity in {samples=} of {images.shape=}")
        grey = torch.where(finite.view(-1, *(1,) * self.spatial_dims), grey, 0.0)
        if self.normalize:
            return stretch(grey, 1)
        return grey / 255 if images.dtype == torch.uint8 else grey

    def _detect(self, grey: Annotated[Tensor, "B *S"], *, static: bool) -> dict[str, Tensor]:
        space = self._voxels.scale_space(
            grey, self.upscale, layers=self.octave_layers, sigma=self.sigma, border=self._dims.border
        )
        with torch.no_grad():
            extrema, valid = self._search(space, static=static)
        place = locate(space, extrema, valid)
        if self._dims.orient is not None:
            every = self.orientations == "all"
            extrema, valid, place = self._dims.orient(
                space, extrema, valid, place, every=every, slots=self.max_keypoints
            )
        strides = zip(extrema.stride.unbind(-1), self._voxels.factors, strict=True)
        pixel = torch.stack([stride / factor for stride, factor in strides], dim=-1)
        values = {
            "positions": place.centre * pixel.flip(-1),
            "scores": place.contrast.abs(),
            "scales": place.scale * pixel[..., self._voxels.finest],
        }
        if place.angle is not None:
            values["angles"] = place.angle
        if self.descriptors:
            values["descriptors"] = self._dims.describe(space, extrema, place, root=self.root)
        for name, value in values.items():
            values[name] = torch.where(valid if value.ndim == 2 else valid[..., None], value, 0.0)
        values["valid"] = valid
        missing = self.max_keypoints - valid.shape[1]
        if missing:
            values = {name: F.pad(value, (0, 0) * (value.ndim - 2) + (0, missing)) for name, value in values.items()}
        return values

    def _search(self, space: ScaleSpace, *, static: bool) -> tuple[Extrema, Annotated[Tensor, "B N"]]:
        # OpenCV rounds this threshold down to whole grey levels.
        threshold = math.floor(0.5 * self.contrast_threshold / self.octave_layers * 255) / 255
        room = max(CANDIDATES, 2 * self.max_keypoints) if static else None
        extrema, valid = find_extrema(space, threshold=threshold, room=room)
        extrema, valid, response = refine(
            space,
            extrema,
            valid,
            contrast_threshold=self.contrast_threshold,
            edge_threshold=self.edge_threshold,
            follow=self._dims.follow,
            static=static,
        )
        slots = self.max_keypoints if static else min(self.max_keypoints, int(valid.sum()))
        return select(extrema, valid, response, slots=slots)
