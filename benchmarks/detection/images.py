"""Compares SIFTDetector with OpenCV and Kornia: agreement, matching under known homographies, speed on a CPU.

python -m benchmarks.detection.images [--data ../shared/data] [--only agreement matching speed]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import cv2
import kornia.feature
import numpy as np
import torch

from benchmarks.common.harness import ROOT, Row, parser, report
from benchmarks.common.measuring import compare, for_each
from benchmarks.detection.sifts import (
    NAMES,
    Points,
    Upscale,
    best_positions,
    detect_opencv,
    detect_ours,
    first_orientations,
    mri_slices,
    natural_images,
    opencv,
)
from kaf_layer.detection import SIFTDetector

EVERYTHING = 20_000
UPSCALES: tuple[Upscale, ...] = ("precise", "opencv")


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None] - b[None], axis=-1)


def agreement(sets: dict[str, list[np.ndarray]]) -> None:
    rows = []
    for name, images in sets.items():
        for upscale in UPSCALES:
            row: Row = {"images": f"{len(images)} {name}", "upscale": upscale}
            pairs = [(detect_opencv(i, 0, upscale), detect_ours(i, EVERYTHING, upscale)) for i in images]
            for limit in (EVERYTHING, 512):
                near = [distances(*(best_positions(points, limit) for points in pair)) < 0.5 for pair in pairs]
                label = "all" if limit == EVERYTHING else f"best {limit}"
                theirs = sum(n.any(1).sum() for n in near) / sum(n.shape[0] for n in near)
                ours = sum(n.any(0).sum() for n in near) / sum(n.shape[1] for n in near)
                row |= {f"{label}: OpenCV's found": f"{theirs:.4f}", f"{label}: ours confirmed": f"{ours:.4f}"}
            row["keypoints"] = sum(len(best_positions(ours, EVERYTHING)) for _, ours in pairs)
            rows.append(row)
    notes = "Distinct positions within 0.5 px of each other. Both have the same thresholds and doubling."
    report("detection-agreement", rows, notes=f"{notes} OpenCV {cv2.__version__}.", packages=PACKAGES)


def homographies(shape: tuple[int, ...], count: int, seed: int) -> Iterator[np.ndarray]:
    """Draws homographies: rotation by up to 180 degrees and scale 0.7 to 1.3 about the centre, a little perspective."""
    generator = np.random.default_rng(seed)
    height, width = shape
    for _ in range(count):
        matrix = np.eye(3)
        angle, scale = generator.uniform(-180, 180), generator.uniform(0.7, 1.3)
        matrix[:2] = cv2.getRotationMatrix2D((width / 2, height / 2), angle, scale)
        matrix[2, :2] = generator.uniform(-1, 1, 2) * 0.1 / max(shape)
        yield matrix


def disturbed(image: np.ndarray, matrix: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Returns the warped image with another contrast and noise."""
    warped = cv2.warpPerspective(image.astype(np.float32), matrix, image.shape[::-1], flags=cv2.INTER_CUBIC)
    values = 127.5 + (warped - 127.5) * generator.uniform(0.7, 1.3) + generator.normal(0, 4, image.shape)
    return values.clip(0, 255).round().astype(np.uint8)


def warp(positions: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return cv2.perspectiveTransform(positions[:, None].astype(np.float64), matrix)[:, 0]


def score_pair(a: Points, b: Points, matrix: np.ndarray, shape: tuple[int, ...]) -> tuple[float, float, int]:
    """Returns repeatability, matching accuracy and the number of distinct correct matches, all at 3 px."""
    warped = warp(a.positions, matrix)
    seen = ((warped >= 0) & (warped <= np.array(shape[::-1]) - 1)).all(1)
    back = warp(b.positions, np.linalg.inv(matrix))
    seen_back = ((back >= 0) & (back <= np.array(shape[::-1]) - 1)).all(1)
    error = distances(warped, b.positions)
    near = error[np.ix_(seen, seen_back)] < 3
    repeatability = (near.any(1).sum() + near.any(0).sum()) / max(sum(near.shape), 1)
    similarity = a.descriptors @ b.descriptors.T
    partner = similarity.argmax(1)
    mutual = similarity.argmax(0)[partner] == np.arange(len(partner))
    correct = error[np.arange(len(partner)), partner][mutual] < 3
    distinct = np.unique(a.positions[mutual][correct], axis=0)
    return repeatability, correct.mean() if correct.size else 1.0, len(distinct)


def matching(sets: dict[str, list[np.ndarray]]) -> None:
    rows: list[Row] = []
    generator = np.random.default_rng(0)
    for name, images in sets.items():
        methods: dict[str, Callable[[np.ndarray, int], Points]] = {
            "OpenCV": detect_opencv,
            "OpenCV, one orientation": first_orientations,
            "ours": detect_ours,
            "ours, all orientations": partial(detect_ours, orientations="all"),
        }
        results: dict[str, list[tuple[float, float, int]]] = {method: [] for method in methods}
        for seed, image in enumerate(images):
            for matrix in homographies(image.shape, 4, seed):
                other = disturbed(image, matrix, generator)
                for method, detect in methods.items():
                    points = detect(image, 512), detect(other, 512)
                    results[method].append(score_pair(*points, matrix, image.shape))
        for method, values in results.items():
            repeatability, accuracy, correct = np.mean(values, axis=0)
            row: Row = {"images": f"{len(images)} {name}", "SIFT": method, "repeatability": f"{repeatability:.4f}"}
            rows.append(row | {"mean matching accuracy": f"{accuracy:.4f}", "correct matches": f"{correct:.1f}"})
    notes = (
        "The 512 best keypoints, 3 px, RootSIFT, mutual nearest neighbours. Matches count once per position. Each "
        "image has 4 homographies: rotation up to 180 degrees, scale 0.7 to 1.3, contrast 0.7 to 1.3, noise of 4 grey "
        "levels."
    )
    report("detection-matching", rows, notes=f"{notes} OpenCV {cv2.__version__}.", packages=PACKAGES)


def batches(images: list[np.ndarray], sides: tuple[int, ...], counts: tuple[int, ...]) -> Iterator[np.ndarray]:
    for side in sides:
        resized = [cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA) for image in images]
        for count in counts:
            yield np.stack([resized[i % len(resized)] for i in range(count)])


def speed(images: list[np.ndarray], repeats: int) -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    ours, theirs = SIFTDetector(512), opencv(512)
    pyramid = kornia.feature.SIFTFeatureScaleSpace(512, descriptor_backend="pyramid")
    default = kornia.feature.SIFTFeatureScaleSpace(512)
    rows = []
    for batch in batches(images, (512, 352), (1, 8)):
        tensor = torch.from_numpy(batch)[:, None]
        floats = (tensor / 255).split(1)
        seconds = compare(
            {
                "ours": partial(ours, tensor),
                "OpenCV": partial(for_each, partial(theirs.detectAndCompute, mask=None), batch),
                "Kornia's pyramid": partial(for_each, pyramid, floats),
                "Kornia's default": partial(for_each, default, floats),
            },
            repeats=repeats,
            warmup=1,
        )
        count, height, width = batch.shape
        row: Row = {"images": f"{count} of {height}x{width}"}
        row |= {f"{name}, ms/image": 1e3 * value / count for name, value in seconds.items()}
        row["ours / OpenCV"] = seconds["ours"] / seconds["OpenCV"]
        row |= {f"{name} / ours": seconds[name] / seconds["ours"] for name in list(seconds)[2:]}
        rows.append(row)
    notes = "512 keypoints with descriptors, one CPU thread, medians of alternating runs."
    report("detection-speed", rows, notes=f"{notes} OpenCV {cv2.__version__}.", packages=PACKAGES)


PACKAGES = ("kornia", "scikit-image")
PARTS = ("agreement", "matching", "speed")


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of sunnybrook, if any")
    own.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    own.add_argument("--images", type=int, default=len(NAMES), help="largest number of scikit-image's images")
    own.add_argument("--repeats", type=int, default=7, help="how often each run is timed")
    arguments = own.parse_args()
    natural = natural_images()[: arguments.images]
    sets = {"of scikit-image": natural}
    if slices := mri_slices(arguments.data):
        sets["MRI slices"] = slices
    torch.set_grad_enabled(False)
    if "agreement" in arguments.only:
        agreement(sets)
    if "matching" in arguments.only:
        matching(sets)
    if "speed" in arguments.only:
        speed(natural, arguments.repeats)


if __name__ == "__main__":
    main()
