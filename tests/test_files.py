"""What may happen to a run's files: kills, full disks, folders that cannot be written or are taken, hostile pickles."""

import errno
import os
import pickle
import random
import signal
import time
from contextlib import redirect_stderr
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch

pytest.importorskip("examples.protocol.experiments.pretraining", reason="the extra train is not here")
from test_pretrain import run, volumes  # after the skip

from examples.protocol import files
from examples.protocol.training import checkpoints
from examples.protocol.volumes.stacks import Stack, prepare
from kaf_layer import GridDetector

KILLS = int(os.environ.get("KILLS", "3"))
EPOCHS = ["--model", "unet", "--epochs", "12", "--method", "pirl", "--patch", "64", "64"]  # PIRL has a memory too


def learn(folder: Path, *, resume: bool = True) -> None:
    """A run that a test may kill: of a process of its own."""
    torch.set_num_threads(1)
    stacks = prepare(volumes(), GridDetector(8), patch=(64, 64))
    run(folder, stacks, *EPOCHS, *(["--resume"] if resume else []))


@pytest.fixture(scope="module")
def stacks() -> list[Stack]:
    return prepare(volumes(), GridDetector(8), patch=(32, 32))


def test_killed_again_and_again(tmp_path: Path) -> None:
    """SIGKILL at random moments of the training: the run goes on to the weights of one that was not killed."""
    began = time.perf_counter()
    learn(tmp_path / "whole", resume=False)
    seconds = time.perf_counter() - began
    context, draw, kills = get_context("forkserver"), random.Random(0), 0
    context.set_forkserver_preload(["test_pretrain"])
    folder = tmp_path / "killed"
    for _ in range(20 * KILLS):
        process = context.Process(target=learn, args=(folder,))
        process.start()
        while process.is_alive() and not (folder / ".lock").exists():
            time.sleep(0.01)  # until it has begun
        process.join(draw.uniform(0, seconds / 2))
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        if process.exitcode == 0 or kills == KILLS:
            break
    learn(folder)
    print(f"{kills} kills")
    assert kills
    assert (folder / "weights.pt").read_bytes() == (tmp_path / "whole" / "weights.pt").read_bytes()
    whole, killed = (files.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    assert killed["losses"] == whole["losses"]
    assert all(value.equal(killed["module"][name]) for name, value in whole["module"].items())
    assert not list(folder.glob("*.tmp"))


def test_two_runs_in_one_folder(stacks: list[Stack], tmp_path: Path) -> None:
    with (
        files.claimed(tmp_path),
        pytest.raises(ValueError, match=r"another run is writing in .*: wait for its end, or choose another --output"),
    ):
        run(tmp_path, stacks)
    assert not (tmp_path / "checkpoint.pt").exists()
    run(tmp_path, stacks)  # the first has ended


def test_a_run_that_fails_at_once_leaves_no_folder(tmp_path: Path) -> None:
    def fail(folder: Path, *names: str) -> None:
        with files.claimed(folder):
            for name in names:
                (folder / name).write_text("")
            raise ValueError

    for names, left in (((), False), (("weights.pt",), True)):
        with pytest.raises(ValueError, match=r"^$"):
            fail(tmp_path / "new" / "run", *names)
        assert (tmp_path / "new").exists() == left
    (tmp_path / "old").mkdir()
    with pytest.raises(ValueError, match=r"^$"):
        fail(tmp_path / "old")
    assert (tmp_path / "old").is_dir()


def test_a_folder_that_cannot_be_written(stacks: list[Stack], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file/run cannot be written, choose another --output"):
        run(tmp_path / "file" / "run", stacks)
    if os.geteuid() == 0:
        return  # who may write everywhere
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OSError, match="locked cannot be written, choose another --output"):
        run(tmp_path / "locked", stacks)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
@pytest.mark.parametrize("name", ["weights.pt", "result.json"])
def test_a_full_disk(tmp_path: Path, name: str) -> None:
    """What a file held is still there, and nothing else."""
    path = tmp_path / name
    before = {"weight": torch.zeros(3)} if name == "weights.pt" else {"dice": 0.5}
    writer, reader = (
        (files.save, files.load) if name == "weights.pt" else (lambda *a: files.write_json(*a), files.read_json)
    )
    writer(before, path)
    (tmp_path / f"{name}.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=rf"{name} cannot be written, what it held is still there: .*No space left"):
        writer({"weight": torch.zeros(100_000)} if name == "weights.pt" else {"dice": 1.0}, path)
    assert str(reader(path)) == str(before)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_disk_that_fills_up_during_a_run(
    stacks: list[Stack], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends with a message, and goes on from its last checkpoint when there is space again."""
    whole = run(tmp_path / "whole", stacks)
    replace, written = os.replace, []

    def full(source: Path, target: Path) -> None:
        if target.name == "checkpoint.pt":
            written.append(target)
        if len(written) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match=r"checkpoint\.pt cannot be written.*No space left"):
            run(tmp_path / "full", stacks)
    assert len(files.load(tmp_path / "full" / "checkpoint.pt")["losses"]) == 1
    resumed = run(tmp_path / "full", stacks, "--resume")
    assert all(value.equal(resumed[name]) for name, value in whole.items())


def learn_without_space(folder: Path) -> None:
    """A run of a process of its own, in which no file may be longer than 200 bytes."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
    message = r"logs in .* cannot be written: .*File too large; then continue with --resume"
    # What is printed goes to a file, too.
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), pytest.raises(OSError, match=message):
        run(folder, prepare(volumes(), GridDetector(8), patch=(32, 32)), "--save-every", "1000")


@pytest.mark.skipif(os.name != "posix", reason="limits of files are of POSIX")
def test_a_disk_that_is_full_for_the_logs(tmp_path: Path) -> None:
    process = get_context("forkserver").Process(target=learn_without_space, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def plain(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("writer", [torch.save, plain])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, writer: object) -> None:
    path, made = tmp_path / "weights.pt", tmp_path / "made"
    writer({"encoder.weight": Hostile(made)}, path)
    with pytest.raises(ValueError, match=r"weights\.pt holds other things than plain tensors, such as code.* not run"):
        checkpoints.load_pretrained(torch.nn.Linear(2, 2), path)
    assert not made.exists()


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.999])
def test_a_checkpoint_cut_short(stacks: list[Stack], tmp_path: Path, share: float) -> None:
    run(tmp_path, stacks, "--epochs", "1")
    path = tmp_path / "checkpoint.pt"
    cut = path.read_bytes()[: int(share * path.stat().st_size)]
    path.write_bytes(cut)
    with pytest.raises(ValueError, match=r"checkpoint\.pt (cannot be read, it may be truncated|holds other things)"):
        run(tmp_path, stacks, "--epochs", "1", "--resume")
    assert path.read_bytes() == cut
    assert (tmp_path / "weights.pt").is_file()
