"""The workflows of .github: what they run exists, and they try the versions that pyproject.toml allows."""

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml")
tomllib = pytest.importorskip("tomllib", reason="comes with Python 3.11")
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(path.read_text())["jobs"]
    return loaded


def test_every_target_is_one_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)[0].split())
    matrix = jobs(ROOT / ".github/workflows/ci.yml")["checks"]["strategy"]["matrix"]["target"]
    runs = [step.get("run", "") for path in FILES for job in jobs(path).values() for step in job["steps"]]
    called = [*matrix, *(run.removeprefix("make ") for run in runs if re.match(r"make \w", run))]
    targets = {target for line in called for target in line.split()}
    assert {"lint", "types", "build", "test", "frameworks", "docs"} <= targets <= phony


def test_every_python_and_torch_that_the_package_allows_is_tried() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    rows = jobs(ROOT / ".github/workflows/ci.yml")["versions"]["strategy"]["matrix"]["include"]
    pythons = {c.rpartition(" ")[2] for c in project["classifiers"] if re.search(r":: 3\.\d+$", c)}
    assert pythons <= {row["python"] for row in rows}
    assert project["requires-python"] == f">={min((row['python'] for row in rows), key=lambda v: int(v[2:]))}"
    lowest = min((row["torch"] for row in rows), key=lambda v: [int(part) for part in v.split(".")])
    assert f"torch>={lowest.rpartition('.')[0]}" in project["dependencies"]
