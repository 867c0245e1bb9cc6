"""Puts Kornia's parts in the place of SIFTDetector's, and measures their precision and time.

python -m benchmarks.detection.kornia_parts
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import kornia.feature as KF
import torch
from kornia.filters import gaussian_blur2d
from kornia.geometry import ScalePyramid, conv_quad_interp3d
from torch import Tensor

from benchmarks.common.harness import Row, parser, report
from benchmarks.common.measuring import Run
from benchmarks.detection.sifts import natural_images, opencv
from kaf_layer import Keypoints, SIFTDetector
from kaf_layer.detection.sift.blur import blur, gaussian_kernels
from kaf_layer.detection.sift.extrema import find_extrema
from kaf_layer.detection.sift.plane import describe, orient, peaks
from kaf_layer.detection.sift.pyramid import ScaleSpace, double, scale_space
from kaf_layer.detection.sift.refinement import locate, refine
from kaf_layer.interop import to_lafs

EDGE, COUNT = 256, 300
NOTES = f"""One photograph of {EDGE}x{EDGE} pixels, {COUNT} keypoints, one CPU thread, medians of the processor's
seconds in alternating runs. A part would be used if it kept OpenCV's keypoints (99 % within half a pixel) and took at
most 1.2 times our time. ScalePyramid doubles an image from corner to corner, not pixel by pixel. conv_quad_interp3d
examines every voxel, not only the candidates. SIFTDescriptor describes patches that were resampled first."""


def doubled(image: Tensor) -> Tensor:
    return double(image[:, 0], "precise")


def row(part: str, theirs: str, miss: str, ours: Run, other: Run, repeats: int) -> Row:
    """Compares the processor's seconds, which other programs on the machine do not change."""
    seconds: tuple[list[float], list[float]] = [], []
    for _ in range(repeats + 1):
        for values, run in zip(seconds, (ours, other), strict=True):
            start = time.process_time()
            run()
            values.append(time.process_time() - start)
    ratio = median(seconds[1][1:]) / median(seconds[0][1:])
    return {"part": part, "Kornia's": theirs, "precision": miss, "times ours": ratio}


def rows(image: Tensor, repeats: int) -> Iterator[Row]:
    first, sigma = doubled(image), 2.0
    kernels = [gaussian_kernels([sigma], first)] * 2
    taps = 2 * kernels[0].radii[0] + 1

    def theirs() -> Tensor:
        return gaussian_blur2d(first[:, None], (taps, taps), (sigma, sigma), "reflect")[:, 0]

    error = (next(blur(first, kernels)) - theirs()).abs().max()
    yield row("blur", "gaussian_blur2d", f"differs by {error:.0e}", lambda: list(blur(first, kernels)), theirs, repeats)

    space = scale_space(first, layers=3, sigma=1.6, blurred=1.0)
    pyramid = ScalePyramid(3, 1.6, 16, double_image=True)
    layers = pyramid(image)[0][0][0, 0]
    ours = space.octaves[0][0]
    error = (layers[: len(ours)] - ours).abs().max() if layers.shape[1:] == ours.shape[1:] else torch.tensor(torch.inf)
    yield row(
        "scale space", "ScalePyramid", f"differs by {error:.0e} of 1",
        lambda: scale_space(doubled(image), layers=3, sigma=1.6, blurred=1.0), lambda: pyramid(image), repeats,
    )  # fmt: skip

    extrema, valid = find_extrema(space, threshold=0.006, room=None)
    options: dict[str, Any] = {"contrast_threshold": 0.04, "edge_threshold": 10.0, "follow": True, "static": False}
    differences = [octave.diff(dim=1)[:, None] for octave in space.octaves]

    def interpolated() -> list[Tensor]:
        # It finds only maxima, so it runs twice to find minima too.
        return [conv_quad_interp3d(sign * values)[0] for values in differences for sign in (1, -1)]

    moved, kept, _ = refine(space, extrema, valid, **options)
    place = locate(space, moved, kept)
    maxima = (moved.stride[..., 0] == 1) & kept & (place.contrast > 0)
    layer, y, x = moved.pixel[maxima].unbind(-1)
    theirs_at = interpolated()[0][0, 0, 1:, layer, y, x].T  # x, y
    error = (theirs_at - place.centre[maxima]).norm(dim=-1)
    yield row(
        "quadratic", "conv_quad_interp3d", f"{(error < 0.05).double().mean():.1%} of maxima within 0.05 pixels of ours",
        lambda: refine(space, extrema, valid, **options), interpolated, repeats,
    )  # fmt: skip

    found = SIFTDetector(COUNT, root=False)(image)
    yield from patches(image, found, space, repeats)


def patches(image: Tensor, found: Keypoints, space: ScaleSpace, repeats: int) -> Iterator[Row]:
    """Compares orientations and descriptors of the same keypoints with OpenCV's."""
    import cv2

    kept = found.valid[0]
    assert found.scales is not None
    assert found.angles is not None
    assert found.descriptors is not None
    grey = (image[0, 0] * 255).round().byte().numpy()
    points = [
        cv2.KeyPoint(p[0].item(), p[1].item(), 2 * s.item(), a.rad2deg().item() % 360)
        for p, s, a in zip(found.positions[0][kept], found.scales[0][kept], found.angles[0][kept], strict=True)
    ]
    lafs = to_lafs(found)[:, kept]
    upright = to_lafs(Keypoints(found.positions, found.valid, found.image_size, scales=found.scales))[:, kept]
    estimate, describer = KF.LAFOrienter(19), KF.SIFTDescriptor(41, rootsift=False)
    turned = estimate(upright, image)
    difference = (-KF.get_laf_orientation(turned)[0, :, 0].deg2rad() - found.angles[0][kept] + torch.pi) % (
        2 * torch.pi
    )
    close = (difference - torch.pi).abs().rad2deg() < 15

    detector = SIFTDetector(COUNT, root=False)
    extrema, valid = detector._search(space, static=False)
    place = locate(space, extrema, valid)
    place = orient(space, extrema, valid, place, every=False, slots=COUNT)[2]
    yield row(
        "orientation", "LAFOrienter", f"{close.double().mean():.1%} within 15 degrees of ours",
        lambda: peaks(space, extrema, place), lambda: estimate(upright, image), repeats,
    )  # fmt: skip

    theirs = describer(KF.extract_patches_from_pyramid(image, lafs, 41)[0])
    theirs = KF.convert_sift_descriptor_layout(theirs, "kornia", "opencv")
    _, computed = opencv(COUNT).compute(grey, points)
    expected = torch.nn.functional.normalize(torch.from_numpy(computed), dim=-1)
    cosines = [(values * expected).sum(-1).median() for values in (theirs, found.descriptors[0][kept])]
    yield row(
        "descriptor", "SIFTDescriptor", "cosine to OpenCV's {:.3f}, ours {:.3f}".format(*cosines),
        lambda: describe(space, extrema, place, root=False),
        lambda: describer(KF.extract_patches_from_pyramid(image, lafs, 41)[0]), repeats,
    )  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    own = parser(__doc__)
    own.add_argument("--repeats", type=int, default=11, help="how often each run is timed; the median counts")
    options = own.parse_args(arguments)
    torch.set_num_threads(1)
    import cv2

    grey = cv2.resize(natural_images()[2], (EDGE, EDGE), interpolation=cv2.INTER_AREA)
    image = torch.from_numpy(grey)[None, None] / 255
    with torch.no_grad():
        report("kornia-parts", rows(image, options.repeats), notes=NOTES, packages=("kornia",))


if __name__ == "__main__":
    main()
