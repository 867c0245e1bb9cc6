"""Volumes come to one orientation, labels lie where their images are, and affines that say otherwise are refused."""

import argparse
import gzip
import struct
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="the extra train is not here")
pytest.importorskip("monai", reason="the extra train is not here")
from test_data import write  # noqa: E402  # after the skip

from examples.protocol.options import Options, parse  # noqa: E402
from examples.protocol.options.choices import axes  # noqa: E402
from examples.protocol.volumes.loading import load_volumes  # noqa: E402
from examples.protocol.volumes.nifti import Nifti, codes_of, distance, in_plane, read_nifti, reorient  # noqa: E402

SPACING = (1.5, 2.0, 8.0)  # along R, A and S
WORLD = ("LR", "PA", "IS")
ALL = ["".join(letters) for order in permutations(WORLD) for letters in product(*order)]


def body(shape: tuple[int, int, int] = (5, 4, 3)) -> np.ndarray:
    """An array along R, A and S of numbers that are all different."""
    return np.random.default_rng(0).permutation(np.prod(shape)).reshape(shape).astype(np.float32)


def stored(array: np.ndarray, codes: str) -> Nifti:
    """An array along R, A and S as a file whose axes point elsewhere has it."""
    order = [next(i for i, pair in enumerate(WORLD) if code in pair) for code in codes]
    flips = tuple(axis for axis, code in enumerate(codes) if code not in "RAS")
    affine = np.diag([0.0, 0.0, 0.0, 1.0])
    for axis, world in enumerate(order):
        affine[world, axis] = -SPACING[world] if axis in flips else SPACING[world]
        affine[world, 3] = SPACING[world] * (array.shape[world] - 1) if axis in flips else 0
    return Nifti(np.flip(array.transpose(order), flips), affine)


def write_pair(path: Path, name: str, image: Nifti, label: Nifti) -> None:
    write(path / "images" / f"{name}.nii.gz", image.array, image.affine)
    write(path / "labels" / f"{name}.nii.gz", label.array, label.affine)


def write_bodies(path: Path, *codes: str) -> Path:
    """The same body, and as its label where it is bright, stored in several ways."""
    bright = (body() > 40).astype(np.uint8)
    for code in codes:
        write_pair(path, code, stored(body(), code), stored(bright, code))
    return path


@pytest.mark.parametrize("codes", ALL)
def test_voxels_stay_where_they_are(tmp_path: Path, codes: str) -> None:
    oblique = stored(body(), codes)
    oblique.affine[:3, :3] += 0.03
    write(tmp_path / "a.nii.gz", *oblique)
    file = read_nifti(tmp_path / "a.nii.gz")
    assert codes_of(file.affine) == codes
    for target in ("RAS", "PIL", codes):
        turned = reorient(file, target)
        assert (turned.array == stored(body(), target).array).all()
        where, before = (np.argwhere(each.array == 7)[0] for each in (turned, file))
        place, place_before = turned.affine @ [*where, 1], file.affine @ [*before, 1]
        np.testing.assert_allclose(place, place_before, atol=1e-5)
        assert (reorient(turned, codes).array == file.array).all()


@pytest.mark.parametrize("codes", ALL)
def test_slices_stay_slices(codes: str) -> None:
    """The axis across them stays the last, and the two others are in one order, whatever the file's."""
    assert in_plane(codes) == {"LR": "ASR", "PA": "RSA", "IS": "RAS"}[next(w for w in WORLD if codes[2] in w)]


@pytest.mark.parametrize("codes", [code for code in ALL if code[2] in "IS"])
def test_mirror_images_are_brought_to_one_orientation(tmp_path: Path, codes: str) -> None:
    volumes = load_volumes(write_bodies(tmp_path, "RAS", codes))
    assert {v.file_axes for v in volumes} == {"RAS", codes}
    for v in volumes:
        assert (v.label.numpy() == (body() > 40).T).all()
        np.testing.assert_allclose(v.image.numpy(), (body().T - body().mean()) / body().std(ddof=1), atol=1e-5)
        assert v.spacing == pytest.approx((8.0, 2.0, 1.5))


def test_mixed_planes_are_refused_unless_an_orientation_is_given(tmp_path: Path) -> None:
    write_bodies(tmp_path, "LPS", "PIL")
    with pytest.raises(
        ValueError, match=r"slices of .*LPS\.nii\.gz and .*PIL\.nii\.gz .* RAS and ASR: give --orientation RAS to"
    ):
        load_volumes(tmp_path)
    for v in load_volumes(tmp_path, orientation="RAS"):
        assert (v.label.numpy() == (body() > 40).T).all()
    for v in load_volumes(tmp_path, orientation="stored"):
        assert (v.label.numpy() == (stored(body(), v.subject).array > 40).T).all()
        assert v.file_axes is None


def test_an_image_and_its_label_that_lie_differently(tmp_path: Path) -> None:
    """A label that is mirrored in the file alone is refused, and a rounded header is not."""
    image, label = stored(body(), "RAS"), stored((body() > 40).astype(np.uint8), "LAS")
    write_pair(tmp_path, "a", image, label)
    message = (
        r"affines of .*images.a\.nii\.gz and .*labels.a\.nii\.gz differ by 4 voxels, .* RAS and LAS: .*--ignore-affine"
    )
    with pytest.raises(ValueError, match=message):
        load_volumes(tmp_path)
    (ignored,) = load_volumes(tmp_path, ignore_affine=True)
    assert (ignored.label.numpy() == label.array.T).all()
    write_pair(tmp_path, "a", image, Nifti(label.array, image.affine + 1e-5))
    (rounded,) = load_volumes(tmp_path)
    assert (rounded.label.numpy() == label.array.T).all()
    shifted = image.affine.copy()
    shifted[2, 3] += 1.6  # millimetres of 8
    write_pair(tmp_path, "a", image, Nifti(label.array, shifted))
    with pytest.raises(ValueError, match=r"differ by 0\.2 voxels"):
        load_volumes(tmp_path)


@pytest.mark.parametrize("broken", [np.zeros((4, 4)), np.diag([1.0, 1.0, 0.0, 1.0]), np.full((4, 4), np.nan)])
@pytest.mark.parametrize("which", ["images", "labels"])
def test_affines_that_cannot_be_used(tmp_path: Path, which: str, broken: np.ndarray) -> None:
    write_bodies(tmp_path, "LPS")
    file = tmp_path / which / "LPS.nii.gz"
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[252:256] = struct.pack("<2h", 0, 1)  # qform_code and sform_code
    content[280:328] = struct.pack("<12f", *broken[:3].reshape(-1))
    file.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=rf"{which}.LPS\.nii\.gz has an affine that cannot be used.*--ignore-affine"):
        load_volumes(tmp_path)
    (v,) = load_volumes(tmp_path, ignore_affine=True)
    assert (v.label.numpy() == (stored(body(), "LPS").array > 40).T).all()
    assert v.spacing == ((1, 1, 1) if which == "images" else pytest.approx((8.0, 2.0, 1.5)))


def test_distances_are_those_of_the_farthest_corner() -> None:
    turned = np.eye(4)
    turned[:2, :2] = [[np.cos(0.01), -np.sin(0.01)], [np.sin(0.01), np.cos(0.01)]]
    grid = np.stack(np.meshgrid(*map(np.arange, (50, 30, 3)), indexing="ij"), axis=-1).reshape(-1, 3)
    expected = max(np.abs(turned[:3, :3] @ voxel - voxel).max() for voxel in grid)
    assert distance(np.eye(4), turned, (50, 30, 3)) == pytest.approx(expected)


def test_a_window_of_intensities(tmp_path: Path) -> None:
    write_bodies(tmp_path, "RAS")
    (v,) = load_volumes(tmp_path, window=(10, 30))
    clipped = np.clip(body(), 10, 30).T
    np.testing.assert_allclose(v.image.numpy(), (clipped - clipped.mean()) / clipped.std(ddof=1), atol=1e-5)
    with pytest.raises(ValueError, match=r"RAS\.nii\.gz is flat within --window-level 100 200, it holds 0 to 59"):
        load_volumes(tmp_path, window=(100, 200))


def test_options(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("RAS", "LPI", "stored"):
        assert axes(text) == text
    for text in ("RA", "RRS", "ras", "RASX", "RAX"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"three letters such as RAS or LPS, .* got '{text}'"):
            axes(text)
    options = parse(Options, ["--output", "x", "--window-level", "-125", "275"])
    assert (options.window_level, options.orientation, options.ignore_affine) == ((-125, 275), None, False)
    with pytest.raises(ValueError, match="--window-level must be LOW HIGH, the lower end first, got 275 -125"):
        parse(Options, ["--output", "x", "--window-level", "275", "-125"])
    with pytest.raises(SystemExit):
        parse(Options, ["--output", "x", "--orientation", "up"])
    assert "argument --orientation: must be three letters" in capsys.readouterr().err
