"""The options of the protocol: they need nothing slow to load, and earlier runs still compare equal."""

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import get_args

import pytest

from examples.protocol.options import FinetuneOptions, Options, PretrainOptions, choices, parse, read_settings

ROOT = Path(__file__).parent.parent
COMMANDS = ("finetune", "pretrain", "cross_validate", "predict", "demo", "figures", "curves", "comparison", "data")
SLOW = {"torch", "numpy", "scipy", "monai", "kornia", "matplotlib", "accelerate", "kaf_layer"}
# What the version before the options were dataclasses wrote as settings, for the arguments in the tests, but for what
# came later: --position, --channels-last, and more epochs of the spines.
SHARED = {
    "channels_last": False, "classes": 6, "depth": 2, "detector": "sift", "drop_keypoints": 0.0, "embed_dim": 64,
    "folds": 5, "fusion": "concat",
    "ignore_affine": False, "levels": 5, "limit": None, "max_keypoints": 256, "mixed_precision": None,
    "model": "kaf-unet", "normalise": "volume", "orientation": None, "patch": [224, 224], "position": "absolute",
    "preset": "lumbar", "resize": 1.0, "scales": [0, 1, 2, 3], "seed": 0, "share_attention": False, "spacing": 12.0,
    "spatial_dims": 2, "steps_per_epoch": 10, "token_loss": 0.0, "width": 8, "window": 7, "window_level": None,
}  # fmt: skip
FINETUNING = {"batch": 6, "epochs": 120, "fold": 0, "labelled": 2, "loss": "dice_ce", "lr": 0.003}
PRETRAINING = {
    "batch": 32, "epochs": 50, "fold": 0, "lr": 0.002, "max_distance": 30.0, "method": "kaf", "optimizer": "sgd",
    "temperature": 0.1, "threshold": 0.35, "weights": [1.0, 1.0, 0.01],
}  # fmt: skip


def test_help_and_mistakes_load_nothing_slow() -> None:
    """In a process that has loaded nothing yet, all commands print their help and refuse a mistake."""
    code = f"""
import contextlib, importlib, io, sys
for name in {COMMANDS}:
    main = importlib.import_module(f"examples.protocol.{{name}}").main
    for arguments, status in (["--help"], 0), (["--no-such-option"], 2):
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
            try:
                main(arguments)
            except SystemExit as end:
                assert end.code == status, (name, end.code)
        assert "usage:" in (err if status else out).getvalue()
try:
    importlib.import_module("examples.protocol.finetune").main(["--levels", "2", "--output", "x"])
except ValueError as error:
    assert "--levels must be 3 or more" in str(error)
assert not {SLOW} & set(sys.modules), {SLOW} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("cls", "own"), [(Options, {}), (FinetuneOptions, FINETUNING), (PretrainOptions, PRETRAINING)])
def test_the_settings_are_those_of_earlier_runs(cls: type[Options], own: dict[str, object]) -> None:
    arguments = ["--preset", "lumbar", "--position", "absolute", "--output", "x", "--resume", "--data", "y"]
    options = parse(cls, [*arguments, "--save-every", "2", "--cache", "z", "--workers", "2"])
    assert options.settings() == dict(sorted((SHARED | own).items()))


def test_an_earlier_run_is_read_again() -> None:
    """An option that it did not know has its default, and what is no option is left out."""
    before = SHARED | FINETUNING | {"lr": 0.5, "scales": [1], "digest": None}
    del before["fusion"]
    options = read_settings(FinetuneOptions, before, output=Path("x"))
    assert options.settings() == SHARED | FINETUNING | {"lr": 0.5, "scales": [1]}
    assert options.scales == (1,)


def test_options_do_not_change() -> None:
    options = parse(FinetuneOptions, ["--output", "x"])
    with pytest.raises(FrozenInstanceError):
        options.lr = 1.0


def test_the_names_are_those_of_the_library() -> None:
    """The options repeat them, since the library is slow to load."""
    pytest.importorskip("monai", reason="the extra train is not here")
    from examples.protocol.experiments.pretraining import OPTIMIZERS
    from examples.protocol.methods import METHODS
    from examples.protocol.models.detectors import FEATURES
    from kaf_layer.layer import FusionMode
    from kaf_layer.positions import PositionType

    assert tuple(METHODS) == tuple(choices.METHODS)
    assert tuple(FEATURES) == choices.LEARNT
    assert tuple(OPTIMIZERS) == choices.OPTIMIZERS
    assert get_args(choices.Fusion) == get_args(FusionMode)
    assert get_args(choices.Position) == get_args(PositionType)


def test_no_library_imports_a_command_or_a_lower_folder() -> None:
    """In the order of the table in README.md."""
    folder = ROOT / "examples" / "protocol"
    order = re.findall(r"^\| `(\w+)/` \|", (folder / "README.md").read_text(), flags=re.MULTILINE)
    assert {path.name for path in folder.iterdir() if (path / "__init__.py").is_file()} == set(order)
    for file in folder.glob("*/*.py"):
        imported = re.findall(r"^\s*from examples\.protocol\.(\w+)", file.read_text(), flags=re.MULTILINE)
        allowed = {*order[: order.index(file.parent.name) + 1], "files"}
        assert set(imported) <= allowed, file
