"""Volumes, and the detectors that are compared on them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage

from kaf_layer import GridDetector, SIFTDetector
from kaf_layer.detection.sift.extrema import Extrema
from kaf_layer.detection.sift.refinement import Place
from kaf_layer.detection.sift.volume import describe
from kaf_layer.detection.sift.voxels import Voxels

LIMIT = 512


class Points(NamedTuple):
    """The keypoints of one volume: positions (N, 3) in voxels, (z, y, x), and descriptors (N, K) of length 1."""

    positions: np.ndarray
    descriptors: np.ndarray


class Volume(NamedTuple):
    values: np.ndarray
    spacing: tuple[float, float, float]


def load(files: list[Path], count: int) -> list[Volume]:
    import nibabel

    volumes = []
    for file in files[:: max(1, len(files) // count)][:count]:
        image = nibabel.Nifti1Image.from_filename(file)
        x, y, z = (float(step) for step in image.header.get_zooms()[:3])
        volumes.append(Volume(np.asarray(image.dataobj, dtype=np.float32).T, (z, y, x)))
    return volumes


def sift(volume: Volume) -> Points:
    detector = SIFTDetector(LIMIT, spatial_dims=3, spacing=volume.spacing)
    keypoints = detector(torch.from_numpy(volume.values)[None, None])[0]
    chosen = (
        value[keypoints.valid].double().numpy() for value in (keypoints.positions.flip(-1), keypoints.descriptors)
    )
    return Points(*chosen)


def laplacian_peaks(volume: Volume, sigma: float) -> np.ndarray:
    ratio = np.array(volume.spacing) / min(volume.spacing)
    response = np.abs(ndimage.gaussian_laplace(volume.values, sigma / ratio))
    inner = tuple(slice(1, -1) for _ in range(3))
    peaks = np.argwhere((response == ndimage.maximum_filter(response, 3))[inner]) + 1
    return peaks[np.argsort(-response[tuple(peaks.T)], kind="stable")][:LIMIT].astype(float)


def laplacian(volume: Volume, *, sigma: float) -> Points:
    """Returns the local maxima with upright patches as descriptors."""
    peaks = laplacian_peaks(volume, sigma)
    ratio = np.array(volume.spacing) / min(volume.spacing)
    offsets = np.stack(np.meshgrid(*[np.linspace(-6, 6, 8) / r for r in ratio], indexing="ij")).reshape(3, -1)
    smooth = ndimage.gaussian_filter(volume.values, 1.6 / ratio)
    patches = ndimage.map_coordinates(smooth, peaks.T[:, :, None] + offsets[:, None], order=1, mode="nearest")
    patches = patches - patches.mean(1, keepdims=True)
    return Points(peaks, patches / np.maximum(np.linalg.norm(patches, axis=1, keepdims=True), 1e-12))


def laplacian_turned(volume: Volume, *, sigma: float) -> Points:
    """Returns the same maxima with our descriptor, from the layer of the first octave with the nearest blur."""
    peaks = torch.from_numpy(laplacian_peaks(volume, sigma))[None]
    voxels = Voxels.spaced(volume.spacing, 3)
    values = torch.from_numpy(volume.values)[None]
    values = (values - values.min()) / (values.max() - values.min())
    space = voxels.scale_space(values, "precise", layers=3, sigma=1.6, border=1)
    scale = torch.full(peaks.shape[:2], 2 * sigma)
    centre = peaks * torch.tensor(voxels.factors)
    layer = torch.full_like(centre[..., :1], min(5, round(3 * np.log2(2 * sigma / 1.6))))
    start, _, step, size, stride, pitch = (rows[0].expand(*peaks.shape[:2], -1) for rows in space.tables())
    extrema = Extrema(start[..., 0], step, size, stride, pitch, torch.cat([layer, centre], dim=-1).long())
    described = describe(space, extrema, Place(centre.flip(-1).float(), scale, scale), root=True)
    return Points(peaks[0].numpy(), described[0].double().numpy())


def grid(volume: Volume, count: int) -> np.ndarray:
    step = (volume.values.size / max(count, 1)) ** (1 / 3)
    keypoints = GridDetector(step)(torch.empty(1, 1, *volume.values.shape))
    return keypoints.positions[0].flip(-1).double().numpy()
