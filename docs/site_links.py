"""A hook of MkDocs: pages of the repository outside docs are part of the site, and their links work in both places.

The Markdown files are written for GitHub: a link is relative to the file. The site has all pages in one folder, with
the README as its first page. This hook adds the pages of PAGES, and translates each link of each page. A link to
another file (a notebook, the citation) leads to the repository if `[project.urls]` of pyproject.toml names one, as
`Repository`; otherwise the file is copied into the site. A link to nothing is a warning, which fails a strict build.
"""

from __future__ import annotations

import logging
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from markdown import Extension, Markdown
from markdown.blockprocessors import build_block_parser
from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
}
"""Pages outside docs, and their names on the site."""
FENCED = re.compile(r"^(```.*?^```$)", re.S | re.M)
LINK = re.compile(r'(?<=\]\()([^)\s]+)(?=\))|(?<=src=")([^"]+)(?=")')
log = logging.getLogger("mkdocs.hooks.site_links")


class TwoSpaces(Extension):
    """Nested lists are indented by two spaces, as on GitHub."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802 (the name is that of the library)
        """Set the indentation of `md`. Its parser compiles the indentation, so it is made again."""
        md.tab_length = 2
        md.parser = build_block_parser(md)


def repository() -> str | None:
    """The address of the repository in pyproject.toml, without a slash at the end."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    address: str | None = project.get("urls", {}).get("Repository")
    return address.rstrip("/") if address else None


def on_config(config: Any) -> Any:
    """The link to the repository at the top of each page, and GitHub's indentation."""
    config.repo_url = repository()
    config.markdown_extensions.insert(0, TwoSpaces())  # before those that add to the parser
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs and, if there is no address of the repository, the other files that pages link to."""
    for origin, name in PAGES.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / origin)))
    if repository() is None:
        for file in sorted(linked_files(files)):
            added = File.generated(config, file, abs_src_path=str(ROOT / file), inclusion=InclusionLevel.NOT_IN_NAV)
            files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Translate the links of a page from the repository to the site."""
    origin = origin_of(page.file.src_uri)

    def translated(match: re.Match[str]) -> str:
        link: str = match[0]
        if urlsplit(link).scheme or link.startswith("#"):
            return link
        target, mark, anchor = link.partition("#")
        file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
        if not (ROOT / file).is_file():
            log.warning("%s links to %s, which is no file of the repository", origin, link)
            return link
        return address_of(file) + mark + anchor

    parts = FENCED.split(markdown)
    return "".join(part if i % 2 else LINK.sub(translated, part) for i, part in enumerate(parts))


def origin_of(src_uri: str) -> str:
    """The path of a page in the repository."""
    return next((origin for origin, name in PAGES.items() if name == src_uri), f"docs/{src_uri}")


def address_of(file: str) -> str:
    """What a page of the site calls a file of the repository. All pages are in one folder."""
    if file in PAGES:
        return PAGES[file]
    if file.startswith("docs/"):
        return file.removeprefix("docs/")
    address = repository()
    return f"{address}/blob/main/{file}" if address else file


def linked_files(files: Files) -> set[str]:
    """The files outside docs that are linked from a page and are no pages of the site."""
    result = set()
    for page in files.documentation_pages():
        origin = origin_of(page.src_uri)
        for match in LINK.finditer(FENCED.sub("", page.content_string)):
            target = match[0].partition("#")[0]
            file = posixpath.normpath(posixpath.join(posixpath.dirname(origin), target))
            own = file in PAGES or file.startswith("docs/")
            if target and not urlsplit(target).scheme and not own and (ROOT / file).is_file():
                result.add(file)
    return result
