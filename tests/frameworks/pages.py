"""The code on a how-to page."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> str:
    text = (ROOT / "docs" / "howto" / f"{page}.md").read_text()
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
