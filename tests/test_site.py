"""What docs/hooks.py and docs/docstrings.py make of pages, figures and signatures."""

from pathlib import Path
from types import SimpleNamespace

import pytest


def test_figures_link_to_themselves_and_links_leave_docs() -> None:
    hooks = pytest.importorskip("docs.hooks", reason="the extra docs is not here")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="when.md"))
    text = hooks.on_page_markdown("![What](../benchmarks/results/context.png)\n\n[code](../examples/unet.py)", page)
    figure = "repository/benchmarks/results/context.png"
    assert text == f"[![What]({figure})]({figure})\n\n[code](repository/examples/unet.py.md)"


@pytest.mark.parametrize(("url", "kept"), [("", False), ("https://example.org/", True)])
def test_an_empty_sitemap_is_taken_away(url: str, kept: bool, tmp_path: Path) -> None:
    hooks = pytest.importorskip("docs.hooks", reason="the extra docs is not here")
    (tmp_path / "sitemap.xml").touch()
    hooks.on_post_build(SimpleNamespace(site_url=url, site_dir=str(tmp_path)))
    assert (tmp_path / "sitemap.xml").exists() == kept


def test_signatures_write_out_types() -> None:
    griffe = pytest.importorskip("griffe", reason="the extra docs is not here")
    docstrings = pytest.importorskip("docs.docstrings")
    root = Path(__file__).parents[1]
    package = griffe.load("kaf_layer", search_paths=[root], extensions=griffe.load_extensions(docstrings.Docstrings))
    parameters = package["layer.KAFLayer.__init__"].parameters
    assert str(parameters["fusion"].annotation).replace("'", '"') == 'Literal["concat", "add"]'
    assert str(parameters["out_channels"].annotation) == "int | None"
    assert "Points" not in str(package["augmentation.move_keypoints"].parameters["move"].annotation)
