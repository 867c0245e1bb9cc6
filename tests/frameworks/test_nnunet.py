"""nnU-Net plans, trains two short epochs with the trainer on the page, and predicts, in two and three dimensions."""

import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from pages import blocks

SHORT = """

class nnUNetTrainerKAFShort(nnUNetTrainerKAF):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 2, 1
        super().initialize()
"""
DATASET = """
{"channel_names": {"0": "MR"}, "labels": {"background": 0, "ball": 1}, "numTraining": 5, "file_ending": ".nii.gz"}
"""


def volume(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A ball in noise, and where it is."""
    random = np.random.default_rng(seed)
    centre = random.uniform(8, 12, 3)
    distance = np.sqrt(((np.indices((16, 20, 20)) - centre[:, None, None, None]) ** 2).sum(0))
    label = (distance < 5).astype(np.uint8)
    return (label + random.normal(0, 0.2, label.shape)).astype(np.float32), label


def save(array: np.ndarray, path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), path)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A planned and preprocessed data set, and the trainer in a folder of its own."""
    root = tmp_path_factory.mktemp("nnunet")
    (raw := root / "raw" / "Dataset001_Ball").mkdir(parents=True)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (raw / folder).mkdir()
    (raw / "dataset.json").write_text(DATASET)
    for seed in range(5):
        image, label = volume(seed)
        save(image, raw / "imagesTr" / f"case{seed}_0000.nii.gz")
        save(label, raw / "labelsTr" / f"case{seed}.nii.gz")
    save(volume(5)[0], raw / "imagesTs" / "case5_0000.nii.gz")
    (root / "trainers").mkdir()
    (root / "trainers" / "nnUNetTrainerKAF.py").write_text(blocks("nnunet") + SHORT)
    variables = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed", "results")}
    variables |= {"nnUNet_extTrainer": str(root / "trainers"), "nnUNet_compile": "f", "nnUNet_n_proc_DA": "1"}
    variables |= {"nnUNet_def_n_proc": "1", "OMP_NUM_THREADS": "1"}
    run(variables, "nnUNetv2_plan_and_preprocess", "-d", "1", "-c", "2d", "3d_fullres", "-np", "1", "-npfp", "1")
    return root, variables


def run(variables: dict[str, str], *command: str) -> str:
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run(
        [sys.executable, program, *command[1:]], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_trains_and_predicts(configuration: str, environment: tuple[Path, dict[str, str]]) -> None:
    root, variables = environment
    trainer = ("-tr", "nnUNetTrainerKAFShort", "-device", "cpu")
    run(variables, "nnUNetv2_train", "1", configuration, "0", *trainer)
    folder = root / "results" / "Dataset001_Ball" / f"nnUNetTrainerKAFShort__nnUNetPlans__{configuration}" / "fold_0"
    weights = torch.load(folder / "checkpoint_final.pth", weights_only=False)["network_weights"]
    gains = [value for name, value in weights.items() if name.startswith("layers.") and name.endswith("gain")]
    assert len(gains) == 3
    assert all(gain.any() for gain in gains), "the layers are trained"
    images, output = root / "raw" / "Dataset001_Ball" / "imagesTs", root / f"predicted_{configuration}"
    where = ("-i", str(images), "-o", str(output), "-d", "1", "-c", configuration, "-f", "0")
    run(variables, "nnUNetv2_predict", *where, *trainer, "-npp", "1", "-nps", "1")
    predicted = nibabel.load(output / "case5.nii.gz").get_fdata()
    assert predicted.shape == (16, 20, 20)
    assert set(np.unique(predicted)) <= {0, 1}

    if configuration == "2d":  # a plain nnU-Net's weights go into the network inside
        prefix = "backbone."
        plain = {name.removeprefix(prefix): v for name, v in weights.items() if name.startswith(prefix)}
        torch.save({"network_weights": plain}, root / "plain.pth")
        again = variables | {"KAF_PLAIN_WEIGHTS": str(root / "plain.pth")}
        run(again, "nnUNetv2_train", "1", configuration, "1", *trainer)
