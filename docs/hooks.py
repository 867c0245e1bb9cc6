"""What the pages need beyond MkDocs: links to files of the repository, formulas without JavaScript, large figures.

The pages are read in the repository too, where a link such as ``../examples/unet.py`` leads to the file. On the site it
leads to a copy of that file, under ``repository/``; of source code or a folder, to a page that shows it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)[^()\s#]+")
IMAGE = re.compile(r"^!\[[^\]]*\]\(([^)\s]+)\)$", flags=re.MULTILINE)
FORMULA = re.compile(r"^```math\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Publishes the files of the repository that the pages link to, and those that these link to."""
    in_nav = re.findall(r"repository/(\S+?)'", str(config.nav))
    waiting = [publish(path, files, config, InclusionLevel.INCLUDED) for path in in_nav]
    waiting += files.documentation_pages()
    while waiting:
        page = waiting.pop()
        for link in LINK.findall(page.content_string):
            path = target(page.src_uri, link)
            if (ROOT / path).exists() and files.get_file_from_path(published(path)) is None:
                new = publish(path, files, config, InclusionLevel.NOT_IN_NAV)
                waiting += [new] if new.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Leads links that leave ``docs/`` to the published copies, links figures to themselves, makes formulas MathML."""

    def redirect(match: re.Match[str]) -> str:
        path = target(page.file.src_uri, match[0])
        if not (ROOT / path).exists():
            return match[0]
        return posixpath.relpath(published(path), posixpath.dirname(page.file.src_uri))

    def formula(match: re.Match[str]) -> str:
        return f'<div class="formula">{convert(match[1].strip(), display="block")}</div>'

    return FORMULA.sub(formula, IMAGE.sub(r"[\g<0>](\1)", LINK.sub(redirect, markdown)))


def on_post_build(config: Any, **_: Any) -> None:
    """Takes away the sitemap where it is empty, since nobody said where the site will be."""
    if not config.site_url:
        for name in ("sitemap.xml", "sitemap.xml.gz"):
            (Path(config.site_dir) / name).unlink(missing_ok=True)


def target(page: str, link: str) -> str:
    """The path in the repository that a link on a page of the site means."""
    home = page.removeprefix("repository/") if page.startswith("repository/") else f"docs/{page}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(home), link))


def published(path: str) -> str:
    """Where a path of the repository is on the site."""
    if path.endswith(".py") or (ROOT / path).is_dir():
        return f"repository/{path}.md"
    return path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"


def publish(path: str, files: Files, config: Any, inclusion: InclusionLevel) -> File:
    """Adds a file of the repository to the site; source code and folders become pages."""
    source, name = ROOT / path, published(path)
    if path.endswith(".py"):
        text = f"# {source.name}\n\n`{path}`\n\n````python\n{source.read_text()}````\n"
        file = File.generated(config, name, content=text, inclusion=inclusion)
    elif source.is_dir():
        inside = [found.relative_to(source.parent) for found in sorted(source.rglob("*.*")) if found.suffix != ".pyc"]
        text = f"# {source.name}/\n\n" + "".join(f"- [`{found}`]({found})\n" for found in inside)
        file = File.generated(config, name, content=text, inclusion=inclusion)
    else:
        file = File.generated(config, name, abs_src_path=str(source), inclusion=inclusion)
    files.append(file)
    return file
