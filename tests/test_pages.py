"""The code on the pages runs as pasted, page by page; the site is built by `make docs`."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE))


PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}


# Frameworks that are not in this environment; tests/frameworks runs these pages in another.
FRAMEWORKS = {"huggingface": "transformers", "lightning": "lightning", "monai": "ignite", "nnunet": "nnunetv2"}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # of torch.onnx itself
@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page)])
def test_pages_run_as_pasted(name: str) -> None:
    needed = FRAMEWORKS.get(PAGES[name].stem)
    if needed and find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed; make frameworks runs this page")
    exec(compile(blocks(PAGES[name]), name, "exec"), {"__name__": name})


def test_every_how_to_page_has_code() -> None:
    assert all(blocks(page) for name, page in PAGES.items() if name.startswith("docs/howto/"))
