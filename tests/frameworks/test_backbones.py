"""attach on networks of five libraries: what docs/compatibility.md says of each."""

import pytest
from backbones import BEGIN, CASES, END, PAGE, Case, attempt, row


def test_the_page_has_every_network() -> None:
    rows = PAGE.read_text().split(BEGIN)[1].split(END)[0].splitlines()[2:]
    assert len(rows) == len(CASES)
    works = [line for line in rows if line.endswith("| works |")]
    assert len(works) >= 24
    assert {line.split()[1] for line in works} == {"timm", "smp", "torchvision", "MONAI", "transformers"}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.library}-{case.network}")
def test_what_the_page_says(case: Case) -> None:
    assert row(case, attempt(case)) in PAGE.read_text()
