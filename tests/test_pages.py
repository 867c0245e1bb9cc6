"""The code on the pages runs as pasted, page by page; the site is built by `make docs`."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE))


PAGES = {str(page.relative_to(ROOT)): page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]}


@pytest.mark.parametrize("name", [name for name, page in PAGES.items() if blocks(page)])
def test_pages_run_as_pasted(name: str) -> None:
    exec(compile(blocks(PAGES[name]), name, "exec"), {"__name__": name})


def test_every_how_to_page_has_code() -> None:
    assert all(blocks(page) for name, page in PAGES.items() if name.startswith("docs/howto/"))
