"""Compares SIFTDetector in volumes with maxima of the Laplacian and a grid: repeatability, matches, time.

python -m benchmarks.detection.volumes [--data ../shared/data] [--only judged speed] [--volumes 10]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from scipy.spatial.transform import Rotation
from tqdm import tqdm

from benchmarks.common.harness import ROOT, Row, parser, report
from benchmarks.common.measuring import compare
from benchmarks.detection.volumetric import LIMIT, Points, Volume, grid, laplacian, laplacian_turned, load, sift
from kaf_layer import SIFTDetector
from kaf_layer.detection.sift.voxels import Voxels

PARTS = ("judged", "speed")
PACKAGES = ("numpy", "scipy", "scikit-image", "nibabel")
# Degrees, scale, and noise as a fraction of the range between the volume's 1st and 99th percentile.
DISTURBANCES = [(0, 1.0, 0.05), (15, 1.0, 0.0), (15, 1.0, 0.05), (15, 1.0, 0.1), (45, 1.0, 0.05), (120, 1.0, 0.05)]
DISTURBANCES += [(0, 0.8, 0.05), (0, 1.25, 0.05), (15, 0.8, 0.05)]

SIGMAS = {"hippocampus": 2.0, "Sunnybrook": 3.0}  # the most precise of 1, 2 and 3 that gives more than 100 maxima
AXES = {"hippocampus": (0.48, 0.64, 0.6), "Sunnybrook": (1.0, 0.0, 0.0)}  # (z, y, x)

JUDGED_NOTES = """Each volume is compared with itself after rotation, scaling and noise (as a fraction of its range
between the percentiles 1 and 99), resampled by cubic splines and mirrored at its borders. Hippocampus is rotated about
an oblique axis. Sunnybrook, whose slices are 8 mm apart and whose pixels have 1.25 mm, is rotated about the slices'
normal. There are at most 512 keypoints. All values are means over volumes.

Repeatability: of the keypoints that lie in both volumes, the share that have one of the other volume within 2 voxels.
Only positions at least one voxel apart count. Precision: the share of mutual nearest descriptors that lie within 3
voxels of their true position; "right" is their number.

SIFT has its default thresholds and is given the spacing. Laplacian: local maxima (3x3x3) of the magnitude of scipy's
gaussian_laplace, with a sigma of 2 voxels for hippocampus and 3 for Sunnybrook. "patch": described by upright,
normalised patches of 8x8x8 samples 1.7 voxels apart, from the volume blurred by 1.6 voxels. "turned": the same points
with SIFTDetector's descriptor at that scale. Grid: as many keypoints as SIFT finds."""

SPEED_NOTES = """Seconds on one thread, medians of alternating runs: SIFTDetector with 512 keypoints, without and with
descriptors; its scale space alone; and the same Gaussian layers (6 in each octave, the first doubled) by
scipy.ndimage.gaussian_filter, which scikit-image's pyramids call. scikit-image's pyramid_gaussian blurs once in each
octave, not 6 times, and does not double. MB: how far detection raises the peak memory of a fresh process."""


Detect = Callable[[Volume], Points]


class Motion(NamedTuple):
    """A linear map of voxels (z, y, x) about the volume's centre."""

    matrix: np.ndarray
    centre: np.ndarray

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        return (positions - self.centre) @ self.matrix.T + self.centre

    def inverse(self) -> Motion:
        return Motion(np.linalg.inv(self.matrix), self.centre)


def disturbed(
    volume: Volume, axis: np.ndarray, degrees: float, scale: float, noise: float, generator: np.random.Generator
) -> tuple[Volume, Motion]:
    turn = scale * Rotation.from_rotvec(np.deg2rad(degrees) * axis / np.linalg.norm(axis)).as_matrix()
    spacing = np.array(volume.spacing)
    motion = Motion(turn * spacing / spacing[:, None], (np.array(volume.values.shape) - 1) / 2)
    back = motion.inverse()
    offset = back.centre - back.matrix @ back.centre
    moved = ndimage.affine_transform(volume.values, back.matrix, offset=offset, mode="mirror")
    low, high = np.percentile(volume.values, [1, 99])
    moved = moved + generator.normal(0, noise * (high - low), moved.shape)
    return Volume(moved.astype(np.float32), volume.spacing), motion


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


def distinct(positions: np.ndarray) -> np.ndarray:
    """Returns the positions, of those within a voxel of each other only the first."""
    kept: list[int] = []
    for i, position in enumerate(positions):
        if not kept or np.linalg.norm(positions[kept] - position, axis=1).min() >= 1:
            kept.append(i)
    return positions[kept]


def repeatability(a: np.ndarray, b: np.ndarray, motion: Motion, shape: tuple[int, ...]) -> float:
    a, b = distinct(a), distinct(b)
    moved, back = motion(a), motion.inverse()(b)
    last = np.array(shape) - 1
    seen, seen_back = (((p >= 0) & (p <= last)).all(1) for p in (moved, back))
    near = distances(moved[seen], b[seen_back]) < 2
    return (near.any(1).sum() + near.any(0).sum()) / max(sum(near.shape), 1)


def matches(a: Points, b: Points, motion: Motion) -> tuple[float, int]:
    """Returns the precision and the number of right matches."""
    similarity = a.descriptors @ b.descriptors.T
    partner = similarity.argmax(1)
    mutual = similarity.argmax(0)[partner] == np.arange(len(partner))
    error = np.linalg.norm(motion(a.positions) - b.positions[partner], axis=1)
    right = (error < 3) & mutual
    return right.sum() / max(mutual.sum(), 1), int(right.sum())


def judge(name: str, volumes: list[Volume]) -> Iterator[Row]:
    sigma, generator = SIGMAS[name], np.random.default_rng(0)
    methods: dict[str, Detect] = {
        "SIFT": sift,
        "Laplacian, patch": partial(laplacian, sigma=sigma),
        "Laplacian, turned": partial(laplacian_turned, sigma=sigma),
    }
    before = [{method: detect(volume) for method, detect in methods.items()} for volume in volumes]
    for degrees, scale, noise in DISTURBANCES:
        values: dict[str, list[float]] = {}
        for volume, points in zip(tqdm(volumes, desc=f"{name} {degrees} {scale} {noise}"), before, strict=True):
            other, motion = disturbed(volume, np.array(AXES[name]), degrees, scale, noise, generator)
            found: dict[str, float] = {"SIFT: keypoints": len(points["SIFT"].positions)}
            uniform = grid(volume, len(points["SIFT"].positions))
            repeated = {"Grid": repeatability(uniform, uniform, motion, volume.values.shape)}
            for method, detect in methods.items():
                again = detect(other)
                pair = points[method].positions, again.positions
                repeated[method.split(",")[0]] = repeatability(*pair, motion, volume.values.shape)
                precision, right = matches(points[method], again, motion)
                found |= {f"{method}: precision": precision, f"{method}: right": right}
            for key, value in (found | {f"{key}: repeatability": value for key, value in repeated.items()}).items():
                values.setdefault(key, []).append(float(value))
        row: Row = {"volumes": f"{len(volumes)} {name}", "turned": f"{degrees}°", "scaled": f"{scale}"}
        row |= {"noise": f"{noise:.0%}"} | {key: float(np.mean(value)) for key, value in sorted(values.items())}
        yield row


def gaussians(volume: np.ndarray) -> None:
    """Computes the layers of SIFT's scale space by scipy, for cubic voxels."""
    first = ndimage.zoom(volume, 2, order=1)
    first = ndimage.gaussian_filter(first, 1.25, mode="mirror")
    while min(first.shape) > 2:
        layers = [first]
        for i in range(1, 6):
            layers.append(ndimage.gaussian_filter(layers[-1], 1.6 * 2 ** (i / 3) * (1 - 2 ** (-2 / 3)) ** 0.5))
        first = layers[3][::2, ::2, ::2]


def speed(repeats: int) -> Iterator[Row]:
    from skimage.transform import pyramid_gaussian

    def layers_of_pyramid(volume: np.ndarray) -> list[np.ndarray]:
        return list(pyramid_gaussian(volume, max_layer=4))

    torch.set_num_threads(1)
    for size in ((32, 64, 64), (64, 128, 128)):
        volume = ndimage.gaussian_filter(np.random.default_rng(0).random(size, dtype=np.float32), 1.0)
        tensor = torch.from_numpy(volume)[None, None]
        bare, full = (SIFTDetector(LIMIT, spatial_dims=3, descriptors=descriptors) for descriptors in (False, True))
        voxels = Voxels.spaced(None, 3)
        seconds = compare(
            {
                "detection": partial(bare, tensor),
                "with descriptors": partial(full, tensor),
                "our scale space": partial(voxels.scale_space, tensor[0], "precise", layers=3, sigma=1.6, border=1),
                "scipy's": partial(gaussians, volume),
                "scikit-image's pyramid": partial(layers_of_pyramid, volume),
            },
            repeats=repeats,
            warmup=1,
        )
        row: Row = {"volume": "x".join(map(str, size))} | {f"{k}, s": v for k, v in seconds.items()}
        row["detection / scipy's"] = seconds["detection"] / seconds["scipy's"]
        row["our scale space / scipy's"] = seconds["our scale space"] / seconds["scipy's"]
        command = [sys.executable, "-m", "benchmarks.detection.volumes", "--grow", *map(str, size)]
        row["memory, MB"] = float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)
        yield row


def grow(size: list[int]) -> float:
    """Returns how many MB detection adds to this process's peak memory. Needs Linux."""
    detector = SIFTDetector(LIMIT, spatial_dims=3)
    detector(torch.rand(1, 1, 8, 8, 8))
    volume = torch.nn.functional.avg_pool3d(torch.rand(1, 1, *size), 3, 1, 1)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, which a process inherits from its parent
    before = peak_kilobytes()
    detector(volume)
    return (peak_kilobytes() - before) * 1024 / 1e6


def peak_kilobytes() -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1])


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    own.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    own.add_argument("--volumes", type=int, default=10, help="number of volumes of each data set")
    own.add_argument("--repeats", type=int, default=5, help="how often each run is timed; the median counts")
    own.add_argument("--grow", type=int, nargs=3, help=argparse.SUPPRESS)
    arguments = own.parse_args()
    torch.set_grad_enabled(False)
    if arguments.grow:
        print(grow(arguments.grow))
        return
    if "judged" in arguments.only:
        files = {"hippocampus": "hippocampus/images/*.nii.gz", "Sunnybrook": "sunnybrook/*/*_ED.nii.gz"}
        found = {name: sorted(arguments.data.glob(pattern)) for name, pattern in files.items()}
        sets = {name: load(paths, arguments.volumes) for name, paths in found.items() if paths}
        rows = (row for name, volumes in sets.items() for row in judge(name, volumes))
        report("volumes-judged", rows, notes=JUDGED_NOTES, packages=PACKAGES)
    if "speed" in arguments.only:
        report("volumes-speed", speed(arguments.repeats), notes=SPEED_NOTES, packages=PACKAGES)


if __name__ == "__main__":
    main()
