"""The package of benchmarks: no file imports a command, and a mistake ends with one line that says what to do."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.missing import message

ROOT = Path(__file__).parents[2]
FILES = [path for path in (ROOT / "benchmarks").rglob("*.py") if path.parent.name != "benchmarks"]


def scripts() -> set[str]:
    """The modules that are commands: they have a block for __main__."""
    return {name_of(path) for path in FILES if '\nif __name__ == "__main__":\n' in path.read_text()}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nothing_imports_a_script(path: Path) -> None:
    assert not imported(path) & scripts()


def test_paths_are_edited_only_in_the_two_short_files() -> None:
    edits = {path.name for path in (ROOT / "benchmarks").rglob("*.py") if "sys.path" in path.read_text()}
    assert edits == {"flops.py", "memory.py"}
    assert all(len((ROOT / "benchmarks" / name).read_text().splitlines()) < 10 for name in edits)


@pytest.mark.parametrize(
    ("command", "library", "package"),
    [
        ("-m benchmarks.detection.images", "cv2", "opencv-python-headless"),
        ("benchmarks/flops.py", "tqdm", "tqdm"),
    ],
)
def test_a_missing_library(command: str, library: str, package: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(f"import sys\nsys.modules[{library!r}] = None\n")
    arguments, variables = [sys.executable, *command.split()], {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(arguments, cwd=ROOT, env=variables, text=True, capture_output=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(f"error: this benchmark needs {library}: pip install {package}, or ")


def test_a_mistake_ends_with_a_line() -> None:
    arguments = [sys.executable, "-m", "benchmarks.context.reruns", "nowhere.json", "nowhere.json"]
    done = subprocess.run(arguments, cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert "nowhere.json" in line


def test_other_errors_keep_their_traceback() -> None:
    assert message(ModuleNotFoundError("no", name="cv2.sub")) is not None
    for error in (
        ValueError("no"),
        ModuleNotFoundError("no", name="benchmarks.nothing"),
        ImportError("no", name="cv2"),
    ):
        assert message(error) is None
