"""The how-to pages of frameworks run as scripts, as a user starts them, in one process and in two."""

import os
import re
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from pages import ROOT, blocks

from kaf_layer import GridDetector, TokenGrid, attach

BUNDLE = ROOT / "examples" / "bundle"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def run(*arguments: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def numbers(text: str, after: str) -> list[float]:
    return [float(number) for number in re.findall(rf"{after} ([\d.]+)", text)]


def test_lightning_fits_resumes_and_loads(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(blocks("lightning"))
    assert numbers(run("script.py", folder=tmp_path), "accuracy")[0] > 0


def test_lightning_in_two_processes(tmp_path: Path) -> None:
    code = blocks("lightning")
    assert code.count('"devices": 1') == 1
    (tmp_path / "script.py").write_text(code.replace('"devices": 1', '"devices": 2, "strategy": "ddp"'))
    run("script.py", folder=tmp_path)


def test_hugging_faces_trainer_evaluates(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(blocks("huggingface"))
    (before,) = numbers(printed := run("script.py", folder=tmp_path), "eval_loss")
    (after,) = numbers(printed, "before,")
    assert after < 0.5 < before


def test_save_pretrained_of_the_network_alone_warns(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    vit = transformers.ViTModel(transformers.ViTConfig(image_size=(32, 48), patch_size=8, **size))
    plain = {name: value.clone() for name, value in vit.state_dict().items()}
    model = attach(vit, {"layers.0": 32}, tokens=TokenGrid(patch=8, prefix=1), detector=GridDetector(8), depth=1)
    with pytest.warns(UserWarning, match="without its KAF layers"):
        model.backbone.save_pretrained(tmp_path)
    loaded = transformers.ViTModel.from_pretrained(tmp_path).state_dict()
    torch.testing.assert_close(loaded, plain, atol=0, rtol=0)
    model.remove_layers().save_pretrained(tmp_path)


@pytest.mark.parametrize("how", [(), TWO_PROCESSES])
def test_accelerate(how: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(blocks("accelerate"))
    printed = run(*how, "script.py", folder=tmp_path)
    assert f"processes {len(how) // 4 + 1}" in printed


def test_monais_engines_train_and_evaluate(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(blocks("monai"))
    (dice,) = numbers(run("script.py", folder=tmp_path), "Dice")
    assert dice > 0.5


def test_monai_runs_the_bundle_from_images_to_a_dice(tmp_path: Path) -> None:
    """A bright cavity in a ring on a dark ground, four times."""
    for index in range(4):
        y, x = np.indices((80, 100))
        distance = np.hypot(y - 40 - index, x - 50 + index)
        noise = np.random.default_rng(index).normal(0, 10, distance.shape)
        image = 200 * (distance < 14) + 90 * ((distance >= 14) & (distance < 20)) + noise
        label = (distance < 14).astype(np.uint8)
        for name, array in (("image", image.astype(np.float32)), ("label", label)):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / f"{index}_{name}.nii.gz")
    configs = [str(BUNDLE / "configs" / f"{name}.json") for name in ("inference", "evaluate")]
    meta = ("--meta_file", str(BUNDLE / "configs" / "metadata.json"), "--bundle_root", str(BUNDLE))
    data = ("--dataset_dir", str(tmp_path))
    printed = run("-m", "monai.bundle", "run", "--config_file", str(configs), *meta, *data, folder=ROOT)
    (dice,) = numbers(printed, "Dice")
    assert 0 < dice <= 1
