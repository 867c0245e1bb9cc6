"""Volumes are read as they are stored, and bad folders are refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from examples.protocol.options import Options, parse
from examples.protocol.volumes.loading import list_files, load_volumes, normalise, num_classes
from examples.protocol.volumes.phantom import phantom
from examples.protocol.volumes.stacks import prepare, say
from examples.protocol.volumes.volume import Volume
from kaf_layer import GridDetector, Keypoints

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"


def write(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    """Writes an (x, y, z) array."""
    nibabel = pytest.importorskip("nibabel")
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def volume(seed: int, shape: tuple[int, ...] = (5, 4, 3)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(100, 20, shape).astype(np.float32), rng.integers(0, 3, shape).astype(np.uint8)


@pytest.fixture
def decathlon(tmp_path: Path) -> Path:
    for seed, name in enumerate(("b.nii.gz", "a.nii.gz", "c.nii")):
        image, label = volume(seed)
        write(tmp_path / "imagesTr" / name, image)
        write(tmp_path / "labelsTr" / name, label)
    (tmp_path / "imagesTr" / "._a.nii.gz").write_bytes(b"of an archive")
    return tmp_path


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    lines = ["subject,phase,image,label"]
    for seed, (subject, phase) in enumerate((("s1", "ED"), ("s2", "ED"), ("s1", "ES"))):
        image, label = volume(seed)
        write(tmp_path / subject / f"{phase}.nii.gz", image)
        write(tmp_path / subject / f"{phase}_gt.nii.gz", label)
        lines.append(f"{subject},{phase},{subject}/{phase}.nii.gz,{subject}/{phase}_gt.nii.gz")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    return tmp_path


def test_no_path_gives_normalised_phantoms() -> None:
    first, second = load_volumes(limit=2)
    assert (first.subject, second.subject) == ("phantom-000", "phantom-001")
    assert first.label.equal(phantom(0).label)
    assert first.image.mean().abs() < 1e-4
    assert (first.image.std() - 1).abs() < 1e-4
    assert num_classes([first, second]) == 4


def test_a_constant_image_is_normalised_to_zero() -> None:
    assert normalise(torch.full((2, 3, 4), 7.0)).equal(torch.zeros(2, 3, 4))


def test_decathlon_folder(decathlon: Path) -> None:
    volumes = load_volumes(decathlon)
    assert [v.subject for v in volumes] == ["a", "b", "c"]
    image, label = volume(1)  # a
    for z, y, x in np.ndindex(3, 4, 5):
        assert volumes[0].label[z, y, x] == label[x, y, z]
        expected = (image[x, y, z] - image.mean()) / image.std(ddof=1)
        assert abs(volumes[0].image[z, y, x] - expected) < 1e-4
    assert volumes[0].image.dtype == torch.float32
    assert volumes[0].label.dtype == torch.int64
    assert num_classes(volumes) == 3


def test_images_and_labels(decathlon: Path) -> None:
    for name in ("images", "labels"):
        (decathlon / f"{name}Tr").rename(decathlon / name)
    assert [v.subject for v in load_volumes(decathlon)] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("names", "subjects"),
    [
        (
            ["1/patient001_frame01{}", "1/patient001_frame12{}", "2/patient002_frame01{}"],
            ["patient001", "patient001", "patient002"],
        ),
        (["ct_1001{}", "ct_1002{}"], ["ct_1001", "ct_1002"]),
        (["Training/{0}/{0}0001", "Training/{0}/{0}0002"], ["img0001", "img0002"]),
    ],
)
def test_files_named_as_in_the_archives(tmp_path: Path, names: list[str], subjects: list[str]) -> None:
    image_end, label_end = {"1": ("", "_gt"), "c": ("_image", "_label"), "T": ("img", "label")}[names[0][0]]
    for seed, name in enumerate(names):
        image, label = volume(seed)
        write(tmp_path / f"{name.format(image_end)}.nii.gz", image)
        write(tmp_path / f"{name.format(label_end)}.nii.gz", label)
    write(tmp_path / "1" / "patient001_4d.nii.gz", volume(0, (5, 4, 3, 2))[0])  # ACDC's movies
    volumes = load_volumes(tmp_path)
    assert [v.subject for v in volumes] == subjects
    for seed, v in enumerate(volumes):
        assert v.label.numpy().tolist() == volume(seed)[1].T.tolist()
    (tmp_path / f"{names[1].format(label_end)}.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=rf"{names[1].format(image_end)}\.nii\.gz has no labels"):
        load_volumes(tmp_path)
    assert not any(v.label.any() for v in load_volumes(tmp_path, labelled=False))


def test_manifest_keeps_a_subjects_volumes_together(manifest: Path) -> None:
    assert [v.subject for v in load_volumes(manifest)] == ["s1", "s2", "s1"]
    assert [v.subject for v in load_volumes(str(manifest), limit=1)] == ["s1", "s1"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_manifests_that_a_spreadsheet_saved(manifest: Path, encoding: str, delimiter: str) -> None:
    """With any delimiter and encoding, capitals, spaces, a comma in quotes, and lines that are empty."""
    (manifest / "s2").rename(manifest / "Müller, A")
    lines = [
        ["Subject", " image", "label ", "age"],
        ["Müller, A", "Müller, A/ED.nii.gz", "Müller, A/ED_gt.nii.gz", "1"],
    ]
    lines += [["", "", "", ""], ["s1", " s1/ES.nii.gz", "s1/ES_gt.nii.gz", ""]]
    quoted = [delimiter.join(f'"{cell}"' if delimiter in cell else cell for cell in line) for line in lines]
    text = "\r\n".join([*quoted, "", ""])
    (manifest / "manifest.csv").write_bytes(text.encode(encoding))
    first, second = load_volumes(manifest)
    assert (first.subject, second.subject) == ("Müller, A", "s1")
    assert first.label.numpy().tolist() == volume(1)[1].T.tolist()
    assert second.label.numpy().tolist() == volume(2)[1].T.tolist()


def test_manifests_without_labels(manifest: Path) -> None:
    path = manifest / "manifest.csv"
    path.write_text("subject;image\ns1;s1/ED.nii.gz\n")
    assert [v.subject for v in load_volumes(manifest, labelled=False)] == ["s1"]
    assert list_files(manifest, labelled=None) == [("s1", manifest / "s1" / "ED.nii.gz", None)]
    with pytest.raises(ValueError, match=r"manifest\.csv must have the columns subject, image, label, got .* without"):
        load_volumes(manifest)
    path.write_text("subject;image;label\n\ns1;;s1/ED_gt.nii.gz\n")
    with pytest.raises(ValueError, match=r"line 3 of .*manifest\.csv has no image: 's1', '', 's1/ED_gt\.nii\.gz'"):
        load_volumes(manifest)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"manifest\.csv must have the columns .* got \[\] without subject"):
        load_volumes(manifest)


def test_labels_where_there_are_any(decathlon: Path) -> None:
    (decathlon / "labelsTr" / "b.nii.gz").unlink()
    labels = {subject: label for subject, _, label in list_files(decathlon, labelled=None)}
    assert labels == {"a": decathlon / "labelsTr" / "a.nii.gz", "b": None, "c": decathlon / "labelsTr" / "c.nii"}
    assert len(list_files(decathlon / "imagesTr", labelled=None)) == 3  # any files do


def test_folders_without_data(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_volumes(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"manifest\.csv"):
        load_volumes(tmp_path)
    (tmp_path / "images").mkdir()
    with pytest.raises(FileNotFoundError, match="no volumes"):
        load_volumes(tmp_path)
    (tmp_path / "manifest.csv").write_text("subject,image\na,b\n")
    with pytest.raises(ValueError, match=r"manifest\.csv.*label"):
        load_volumes(tmp_path)
    (tmp_path / "manifest.csv").write_text("subject,image,label\na,b,c\nd,e\n")
    with pytest.raises(ValueError, match=r"manifest\.csv must have the columns .* 'd'"):
        load_volumes(tmp_path)
    with pytest.raises(ValueError, match="limit=0"):
        load_volumes(limit=0)


def test_missing_files(decathlon: Path, manifest: Path) -> None:
    (manifest / "s2" / "ED.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"ED\.nii\.gz"):
        load_volumes(manifest)
    (manifest / "manifest.csv").write_text("subject,image,label\ns1,s1/ED.nii.gz,\n")
    with pytest.raises(FileNotFoundError, match=r"ED\.nii\.gz has no labels"):
        load_volumes(manifest)
    (manifest / "manifest.csv").unlink()
    (decathlon / "labelsTr" / "b.nii.gz").unlink()
    with pytest.raises(FileNotFoundError, match=r"labelsTr.b\.nii\.gz"):
        load_volumes(decathlon)


@pytest.mark.parametrize("name", ["a.nii.gz", "c.nii"])
@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated_files(decathlon: Path, name: str, keep: float) -> None:
    file = decathlon / "imagesTr" / name
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content))])
    with pytest.raises(ValueError, match=name):
        load_volumes(decathlon)


@pytest.mark.parametrize(
    ("folder", "array"),
    [
        ("labelsTr", volume(0, (5, 4, 2))[1]),
        ("labelsTr", np.full((5, 4, 3), 0.5, np.float32)),
        ("labelsTr", np.full((5, 4, 3), -1, np.int16)),
        ("imagesTr", volume(0, (5, 4, 3, 2))[0]),
        ("imagesTr", np.full((5, 4, 3), np.nan, np.float32)),
        ("imagesTr", np.zeros((5, 4, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    ],
)
def test_files_that_are_no_volumes_or_labels(decathlon: Path, folder: str, array: np.ndarray) -> None:
    write(decathlon / folder / "a.nii.gz", array)
    with pytest.raises(ValueError, match=rf"{folder}.a\.nii\.gz"):
        load_volumes(decathlon)


def test_numbers_that_are_finite_in_the_file_alone(decathlon: Path) -> None:
    """Those of float64 that float32 does not hold, and those of float32 whose variance it does not hold."""
    file = decathlon / "imagesTr" / "a.nii.gz"
    write(file, np.where(volume(0)[1] > 1, 1e300, 1.0))
    with pytest.raises(ValueError, match=r"imagesTr.a\.nii\.gz must hold finite numbers of float32, .* 3\.4e38"):
        load_volumes(decathlon)
    large = np.full((5, 4, 3), -3e38, np.float32)
    large[0, 0, 0] = 3e38
    write(file, large)
    with pytest.raises(ValueError, match=r"a\.nii\.gz holds numbers too large .* --window-level LOW HIGH"):
        load_volumes(decathlon)
    assert load_volumes(decathlon, window=(0, 100))[0].image.isfinite().all()


def test_a_header_that_makes_no_sense(decathlon: Path) -> None:
    file = decathlon / "imagesTr" / "c.nii"
    content = bytearray(file.read_bytes())
    content[70:72] = b"\x37\x13"  # the code of the data type
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.nii cannot be read"):
        load_volumes(decathlon)


def test_remarks_name_the_file(decathlon: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (first, *_) = prepare(load_volumes(decathlon), GridDetector(3), patch=(4, 4))
    say(first, "is dark")
    assert str(decathlon / "imagesTr" / "a.nii.gz: is dark") in capsys.readouterr().err


def test_labels_outside_the_classes(decathlon: Path) -> None:
    assert len(load_volumes(decathlon, classes=3)) == 3
    with pytest.raises(ValueError, match=r"labelsTr.a\.nii\.gz must hold the labels 0 to 1 of classes=2, got 2"):
        load_volumes(decathlon, classes=2)
    with pytest.raises(ValueError, match="phantoms have 4 classes, give --data"):
        load_volumes(limit=1, classes=2)


def test_padding_and_cropping_carry_keypoints_and_labels() -> None:
    image, label = torch.randn(2, 7, 10), torch.randint(1, 3, (2, 7, 10))
    corners = torch.tensor([[0.0, 0.0], [2.0, 3.0], [6.0, 6.0], [7.0, 1.0], [9.0, 5.0]])
    valid = torch.tensor([[True] * 5, [False] * 5])
    detector = lambda images: Keypoints(corners.expand(2, -1, -1), valid, tuple(images.shape[2:]))  # noqa: E731
    (stack,) = prepare([Volume(image, label, "s")], detector, patch=(10, 5))  # 3 rows more, 5 columns less
    assert stack.images.shape == (2, 1, 10, 5)
    assert stack.positions.tolist() == [0, 0.5]
    points = stack.keypoints[0]
    moved = [(image[0, y, x], label[0, y, x]) for x, y in corners[[1, 2]].long().tolist()]  # the others are cropped
    assert points.valid.all()
    for (x, y), (value, kind) in zip(points.positions.long().tolist(), moved, strict=True):
        assert (stack.images[0, 0, y, x], stack.labels[0, y, x]) == (value, kind)
    assert not stack.keypoints[1].valid.any()
    restored = stack.restore(stack.labels)
    assert restored[..., 2:7].equal(label[..., 2:7])
    assert not restored[..., :2].any()
    assert not restored[..., 7:].any()
    assert stack.crop(label).equal(stack.labels)


def test_slices_on_scales_of_their_own() -> None:
    image = torch.randn(2, 9, 6) * torch.tensor([0.1, 50.0])[:, None, None] + 3
    volume, patch = Volume(image, torch.zeros(2, 9, 6).long(), "s"), (7, 6)
    (stack,) = prepare([volume], GridDetector(3), patch=patch, by_slice=True)
    (plain,) = prepare([volume], GridDetector(3), patch=patch)
    for one, other in zip(stack.images.numpy(), plain.images.numpy(), strict=True):
        np.testing.assert_allclose(one, (other - other.mean()) / other.std(ddof=1), atol=1e-5)
    assert parse(Options, ["--preset", "sunnybrook", "--output", "o"]).normalise == "slice"


@pytest.mark.skipif(not (SHARED / "sunnybrook").is_dir(), reason="../shared/data/sunnybrook is not here")
def test_sunnybrook() -> None:
    pytest.importorskip("nibabel")
    assert len(list_files(SHARED / "sunnybrook")) == 60
    volumes = load_volumes(SHARED / "sunnybrook", limit=1)
    assert [v.subject for v in volumes] == ["SC-HF-I-01"] * 2
    assert all(v.image.shape == (9, 256, 256) for v in volumes)
    assert int((volumes[0].label == 1).sum()) == 10816  # as its manifest says
    assert num_classes(volumes) == 2


@pytest.mark.skipif(not (SHARED / "hippocampus").is_dir(), reason="../shared/data/hippocampus is not here")
def test_hippocampus() -> None:
    pytest.importorskip("nibabel")
    volumes = load_volumes(SHARED / "hippocampus", limit=3)
    assert volumes[0].subject == "hippocampus_001"
    assert num_classes(volumes) == 3


def test_resizing() -> None:
    """Images by area, labels to the nearest, keypoints along, and predictions back in the volume's size."""
    image = torch.zeros(2, 24, 40)
    image[:, 8:12, 16:24] = 1
    label = (image > 0).long()
    blob = [Keypoints(torch.tensor([[[19.5, 9.5], [0.0, 23.0]]] * 2), torch.ones(2, 2).bool(), (24, 40))]
    (stack,) = prepare([Volume(image, label, "a")], lambda _: blob[0], patch=(16, 16), resize=0.5)
    # Half of 24x40 is 12x20; two rows are added above and below, two columns cut on the left and right.
    assert stack.resized == (12, 20)
    expected = torch.zeros(2, 1, 16, 16)
    expected[:, :, 6:8, 6:10] = 1
    assert torch.equal(stack.images, expected)
    assert torch.equal(stack.labels, expected[:, 0].long())
    assert stack.keypoints[0].positions.tolist() == [[7.5, 6.5]]  # between the middle pixels; the other is cut off
    assert torch.equal(stack.restore(stack.labels), label)
    assert torch.equal(stack.crop(label), stack.labels)
    speck = torch.zeros_like(label)
    speck[:, 8, 8] = 1
    with pytest.raises(ValueError, match=r"a has no foreground left at --resize 0\.2, give a factor nearer to 1"):
        prepare([Volume(image, speck, "a")], lambda _: blob[0], patch=(16, 16), resize=0.2)
    prepare([Volume(image, 0 * label, "a")], lambda _: blob[0], patch=(16, 16), resize=0.2)  # none was there before
