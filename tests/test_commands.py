"""Every command of the pages runs as a user types it: in a process of its own, outside pytest, at its smallest size.

Each worker copies what git tracks into a folder, and runs the commands there with the environment's Python first in the
path. Afterwards git must find nothing in the copy that it would commit.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

nibabel = pytest.importorskip("nibabel", reason="the extra train is not here")
pytest.importorskip("matplotlib", reason="the extra plot is not here")

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "examples/protocol/README.md")
COMMAND = r"(?:\.venv/bin/)?(?:python|pytest|pip|make|torchrun|accelerate|pre-commit|git|cd) [^`\n]+"
NET = "--patch 32 32 --width 4 --depth 1 --embed-dim 8"
SMALL = f"{NET} --limit 3 --folds 3 --steps-per-epoch 1 --epochs 1 --batch 2"
OWN = f"{SMALL} --data FOLDER --classes 2 --detector grid"

# In the order of the page: later commands read what earlier ones wrote. Behind each is what makes it small, of which
# the last value of an option counts.
PROTOCOL = {
    "python -m examples.protocol.data FOLDER": "",
    "python -m examples.protocol.demo": "--subjects 2 --steps 1 --batch 2 --width 4 --seeds 0",
    "python -m examples.protocol.pretrain --output outputs/pretrained": SMALL,
    "python -m examples.protocol.finetune --labelled 2 --pretrained outputs/pretrained/weights.pt "
    "--output outputs/M2": f"{SMALL} --detector grid",
    "python -m examples.protocol.cross_validate --methods unet kaf-unet kaf-unet+kaf --labelled 1 2 "
    "--output outputs/table": (
        f'{OWN.replace("grid", "sift")} --pretrain "--epochs 1 --batch 2" --test-folds 0 --labelled 1'
    ),
    "python -m examples.protocol.curves outputs/table": "",
    "python -m examples.protocol.figures segmentations --table outputs/table --output outputs/figures": (
        "--volumes 1 --data FOLDER"
    ),
    "python -m examples.protocol.figures --output outputs/figures": (
        f"{NET} --volumes 1 --limit 2 --data FOLDER --classes 2"
    ),
    "python -m examples.protocol.predict --weights outputs/M2/weights.pt --output outputs/predicted": "--limit 1",
    "torchrun --nproc-per-node 2 -m examples.protocol.finetune ...": (
        f"{OWN} --labelled 1 --fusion add --output outputs/two"
    ),
}
BENCHMARKS = {
    "python benchmarks/flops.py": "--edges 32 --attentions 8",
    "python benchmarks/memory.py": "--edges 32 --attentions 8",
    "python -m benchmarks.cost.figure": "",
    "python -m benchmarks.cost.alternatives": "",
    "python -m benchmarks.cost.launches": "",
    "python -m benchmarks.cost.roofline": "",
    "python -m benchmarks.speed.layers": "--parts flops --edges 64",
    "python -m benchmarks.speed.fusion": "--edges 64 --batch 1 --repeats 1",
    "python -m benchmarks.speed.allocator": "--edge 64 --repeats 1",
    "python -m benchmarks.speed.gpu": "diffusion --small",
    "python -m benchmarks.context.synthetic": "--steps 1 --images 8 --tested 8 --networks UNet",
    "python -m benchmarks.context.by_field": (
        "sunnybrook --results benchmarks/results/sunnybrook-few-shot.json --levels 3"
    ),
    "python -m benchmarks.context.attached": "--data FOLDER --steps 1 --folds 0 --labelled 1",
    "python -m benchmarks.context.reruns": (
        "benchmarks/results/sunnybrook-few-shot.json benchmarks/results/sunnybrook-methods.json"
    ),
    "python -m benchmarks.context.addition": "--steps 1 --images 8",
    "python -m benchmarks.context.added_maps": "outputs/two --data FOLDER",  # of the protocol's last command
    "python -m benchmarks.detection.images": "--only agreement --images 1 --data FOLDER",
    "python -m benchmarks.detection.volumes": "--only judged --volumes 1 --data FOLDER",
    "python -m benchmarks.detection.matching": "--only sinkhorn --points 8 --repeats 1",
    "python -m benchmarks.detection.kornia_parts": "--repeats 1",
}
AFTER_OTHERS = ("python -m benchmarks.cost.figure", "python -m benchmarks.context.added_maps")  # need their results
OTHERS = {
    "python -m benchmarks.speed.gpu --help": "",
    ".venv/bin/pre-commit install": "",
}
EXAMPLES = {
    "python examples/attach_monai.py": "--steps 1",
    "python examples/attach_smp.py": "",
    "python examples/attach_timm.py": "",
    "python examples/pretrain.py": "--steps 1 --output outputs/encoder.pt",
}
# Not run here, and why: each is a line of .ci/run, or makes what runs this test, or cannot be run by it.
ELSEWHERE = {
    "make test": "ci",
    "make lint types build": "ci",
    "make frameworks": "ci",
    "pytest --device cuda": "needs a GPU",
    "pytest tests/test_laws.py --device meta": "tests, which run in a minute of their own",
    "make docs": "its parts are tests/test_pages.py and a line of .ci/run",
    "make demo": "its command is examples.protocol.demo, which runs here",
    "make benchmarks": "its commands are scripts that run here",
    "make gpu": "needs a GPU; benchmarks.speed.gpu is rehearsed here",
    "make gpu PART=diffusion": "as make gpu",
    "make mutants": "takes hours",
    "pip install .": "make build installs the wheel",
    'pip install -e ".[dev]"': "make builds the environment so",
    'pip install -e ".[train,plot]"': "a part of the extra dev",
    "pip download --no-deps -d wheels kornia kornia-rs einops ...": "needs a network",
    "pip install --no-deps wheels/*": "needs what the command before has fetched",
}


def documented(page: str) -> list[str]:
    """The commands on a page, in code spans, blocks and indented lines, without comments."""
    text = (ROOT / page).read_text()
    found = re.findall(rf"`({COMMAND})`|^(?: {{4}})?({COMMAND})$", text, flags=re.MULTILINE)
    return [re.sub(r"\s+#.*", "", span or line).strip() for span, line in found]


@pytest.mark.parametrize("page", PAGES)
def test_every_documented_command_is_known_here(page: str) -> None:
    found = documented(page)
    assert found
    assert set(found) <= {*PROTOCOL, *BENCHMARKS, *OTHERS, *ELSEWHERE}, (
        "add what is new to the commands that this test runs"
    )


def test_every_command_here_is_documented() -> None:
    found = [command for page in PAGES for command in documented(page)]
    assert {*PROTOCOL, *BENCHMARKS, *OTHERS, *ELSEWHERE} <= set(found)
    assert all((ROOT / command.split()[1]).is_file() for command in EXAMPLES)


def test_what_make_runs_is_run() -> None:
    ci, makefile = (ROOT / ".ci/run").read_text(), (ROOT / "Makefile").read_text()
    targets = set(" ".join(re.findall(r"^make (.*)$", ci, flags=re.MULTILINE)).split())
    assert {target for line, why in ELSEWHERE.items() if why == "ci" for target in line.split()[1:]} <= targets
    scripts = re.findall(r"^\t\$\(BIN\)/(python (?:-m )?benchmarks\S+)", makefile, flags=re.MULTILINE)
    assert scripts
    assert set(scripts) <= set(BENCHMARKS)


class Clone:
    """A copy of what git tracks, in which a user types commands."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in git("ls-files", "--cached", "--others", "--exclude-standard", at=ROOT).splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, folder / name)
        git("init", "--quiet", at=folder)
        git("add", "--all", at=folder)
        git("-c", "user.name=x", "-c", "user.email=x@x", "commit", "--quiet", "-m", "x", at=folder)

    def run(self, command: str, more: str = "", *, status: int = 0) -> str:
        """Runs a command of a page, made small; returns what it printed, errors if it is to fail."""
        words = shlex.split(command.replace("...", "").replace(".venv/bin/", "") + " " + more)
        words = [str(self.folder.parent / "volumes") if word == "FOLDER" else word for word in words]
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "COV"))}
        variables["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), variables["PATH"]])
        done = subprocess.run(words, cwd=self.folder, env=variables, text=True, capture_output=True, timeout=300)
        assert done.returncode == status, f"{shlex.join(words)}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
        assert git("status", "--porcelain", at=self.folder) == "", f"{shlex.join(words)} changed what git tracks"
        return done.stderr if status else done.stdout


def git(*arguments: str, at: Path) -> str:
    return subprocess.run(["git", *arguments], cwd=at, check=True, text=True, capture_output=True).stdout


def write_volumes(folder: Path) -> None:
    """Subjects as Sunnybrook's folder has them."""
    draw, rows = np.random.default_rng(0), ["subject,image,label"]
    for subject in range(6):
        label = np.zeros((64, 56, 8), np.uint8)
        label[20:40, 10 + subject : 30, 1:-1] = 1
        image = (100 * label + 20 * draw.standard_normal(label.shape)).astype(np.float32)
        names = [f"sunnybrook/s{subject}/s{subject}_{end}.nii.gz" for end in ("ED", "ED_gt")]
        rows.append(",".join([f"s{subject}", *names]))
        for name, values in zip(names, (image, label), strict=True):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(values, np.diag([1.25, 1.25, 8.0, 1.0])), folder / name)
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Clone:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs git, and a clone")
    folder = tmp_path_factory.mktemp("user")
    write_volumes(folder / "volumes")
    return Clone(folder / "clone")


def test_commands_of_the_protocol(clone: Clone) -> None:
    printed = {command: clone.run(command, more) for command, more in PROTOCOL.items()}
    maps = "python -m benchmarks.context.added_maps"
    assert "|" in clone.run(maps, BENCHMARKS[maps])
    assert "6 volumes, 2 classes" in printed["python -m examples.protocol.data FOLDER"]
    assert (clone.folder / "outputs" / "demo.png").stat().st_size > 10_000
    assert (clone.folder / "outputs" / "table" / "curves.png").stat().st_size > 10_000
    assert list((clone.folder / "outputs" / "predicted").glob("*.nii.gz"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--fold 9", "--fold must be 0 to 2, got 9"),
        ("--split nowhere.json", "nowhere.json"),
        ("--embed-dim 6", "embed_dim must be a multiple of num_heads, got embed_dim=6 and num_heads=4"),
    ],
)
def test_mistakes_end_with_a_line_and_status_2_and_leave_no_folder(clone: Clone, options: str, message: str) -> None:
    errors = clone.run("python -m examples.protocol.finetune --output outputs/new/M2", f"{OWN} {options}", status=2)
    last = errors.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in errors
    assert not (clone.folder / "outputs" / "new").exists()


@pytest.mark.parametrize("command", [command for command in BENCHMARKS if command not in AFTER_OTHERS])
def test_benchmarks(clone: Clone, command: str) -> None:
    printed = clone.run(command, BENCHMARKS[command])
    assert "|" in printed
    assert "not measured" not in printed  # in this environment every peer is there
    if command == "python benchmarks/flops.py":
        assert len(set(re.findall(r"^\| ([^|]+) \| 8 \|", printed, flags=re.MULTILINE))) == 9
        clone.run(figure := "python -m benchmarks.cost.figure", BENCHMARKS[figure])
        assert (clone.folder / "outputs" / "benchmarks" / "attention.png").stat().st_size > 10_000


@pytest.mark.parametrize("command", [*OTHERS, *EXAMPLES])
def test_other_commands(clone: Clone, command: str) -> None:
    clone.run(command, (OTHERS | EXAMPLES)[command])
