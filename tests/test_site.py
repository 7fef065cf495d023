"""The documentation as a site, and the scripts that make its pictures and transcripts."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
MKDOCS = "mkdocs-material is not installed: pip install -e '.[docs]'"


def script(name: str, folder: Path = DOCS) -> ModuleType:
    """A script of docs, or of another folder, as a module."""
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def settings() -> dict[str, Any]:
    """mkdocs.yml. Its one tag names a function of Python, and becomes None."""
    loader = type("Settings", (yaml.SafeLoader,), {})
    loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda *_: None)  # type: ignore[attr-defined]
    read: dict[str, Any] = yaml.load((ROOT / "mkdocs.yml").read_text("utf-8"), loader)
    return read


def pages_of(navigation: Any) -> list[str]:
    """The pages of a navigation, in its order."""
    if isinstance(navigation, str):
        return [navigation]
    values = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for value in values for page in pages_of(value)]


# --- The site --------------------------------------------------------------------------------------------------------


def test_the_navigation_has_every_page_once_and_begins_with_the_three_doors() -> None:
    sections = settings()["nav"]
    pages = pages_of(sections)
    outside = {"index.md", "contributing.md", "changelog.md", "benchmarks.md"}
    assert sorted(pages) == sorted({page.name for page in DOCS.glob("*.md")} | outside)
    names = [name for section in sections for name in section]
    assert names[:4] == ["Start", "Benchmark a checkpoint", "Write a sampler", "Follow the lectures"]
    screen = (ROOT / "README.md").read_text("utf-8").split("\n## ")[0]
    doors = re.findall(r"^- \*\*\[(.*?)\]\(docs/(.*?)\)\*\*", screen, re.M)
    assert doors == [(name, pages_of(section)[0]) for section in sections[1:4] for name in section]


def test_warnings_are_errors() -> None:
    read = settings()
    assert read["strict"] is True
    assert set(read["validation"]["links"].values()) == {"warn"}
    assert set(read["validation"]["nav"].values()) == {"warn"}
    for file in (".ci/run", ".github/workflows/ci.yml"):
        (command,) = re.findall(r"-m mkdocs .*", (ROOT / file).read_text("utf-8"))
        assert not re.search(r" (-q|--quiet|--no-strict)\b", command), "MkDocs would not count its warnings"
    assert "/site/" in (ROOT / ".gitignore").read_text("utf-8").split()


class Links(HTMLParser):
    """The addresses and the ids of a page, and what its browser loads."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.loaded: list[str] = []
        self.ids: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        address = values.get("href") or values.get("src")
        if address:
            self.addresses.append(address)
            if tag in ("script", "img") or (tag == "link" and values.get("rel") in ("stylesheet", "icon")):
                self.loaded.append(address)


@pytest.mark.slow
def test_the_site_is_built_strictly_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason=MKDOCS)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    read = {}
    for file in tmp_path.rglob("*.html"):
        read[file] = Links()
        read[file].feed(file.read_text("utf-8"))
    assert {file.stem for file in read} == {page.partition(".")[0] for page in pages_of(settings()["nav"])} | {"404"}
    for file, page in read.items():
        assert [address for address in page.loaded if urlsplit(address).netloc] == [], f"{file.name}: another host"
        for address in page.addresses:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc or file.stem == "404":
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path not in ("", ".") else file
            assert target.is_file(), f"{file.name}: {address}"
            fragment = unquote(parts.fragment)
            if fragment and target.suffix == ".html" and not fragment.startswith("__"):
                assert fragment in read[target].ids, f"{file.name}: {address}"


@pytest.mark.slow
def test_a_broken_link_fails_the_build(tmp_path: Path) -> None:
    pytest.importorskip("material", reason=MKDOCS)
    for name in ("docs", "examples", "benchmarks/README.md", "mkdocs.yml", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy(ROOT / name, tmp_path / name)
    for file in [*ROOT.glob("*.md"), ROOT / "CITATION.cff"]:
        shutil.copyfile(file, tmp_path / file.name)
    with (tmp_path / "docs" / "speed.md").open("a", encoding="utf-8") as page:
        page.write("\n[a](nothing.md) [b](models.md#no-heading) [c](../NOTHING.md) [d](#no-heading)\n")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300, check=False)
    assert ended.returncode == 1
    links = ("'nothing.md'", "'models.md#no-heading'", "../NOTHING.md", "'#no-heading'")
    assert [link for link in links if link not in ended.stderr] == []


def test_links_of_a_page_are_those_of_the_site(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs", reason=MKDOCS)
    site_links = script("site_links")
    addresses = {
        "README.md": "index.md",
        "docs/models.md": "models.md",
        "docs/figures/steps.png": "figures/steps.png",
        "benchmarks/README.md": "benchmarks.md",
    }
    for address in (None, "https://example.org/samplerbench"):
        monkeypatch.setattr(site_links, "repository", lambda address=address: address)
        assert {file: site_links.address_of(file) for file in addresses} == addresses
        prefix = f"{address}/blob/main/" if address else ""
        assert site_links.address_of("CITATION.cff") == f"{prefix}CITATION.cff"
    assert site_links.origin_of("benchmarks.md") == "benchmarks/README.md"
    assert site_links.origin_of("models.md") == "docs/models.md"


def test_the_description_on_pypi_has_no_relative_links() -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    description = script("hatch_build", ROOT).description
    readme = (ROOT / "README.md").read_text("utf-8")
    address = r"(?:\]\(|src=\")(?!https://)"
    assert re.search(address, readme)
    for repository in (None, "https://example.org/samplerbench"):
        assert not re.search(address, description(readme, repository))
    text = 'See [a page](docs/a.md#b), [below](#c) and [x](https://x.org).\n<img src="d.png" alt="e">\n\n'
    text += "```\n[a](b)\n```\n"
    assert description(text, None) == "See a page, below and [x](https://x.org).\n```\n[a](b)\n```\n"
    assert description(text, "https://r.org") == (
        "See [a page](https://r.org/blob/main/docs/a.md#b), [below](https://r.org#c) and [x](https://x.org).\n"
        '<img src="https://r.org/raw/main/d.png" alt="e">\n\n```\n[a](b)\n```\n'
    )


# --- Pictures and transcripts ----------------------------------------------------------------------------------------


def test_every_picture_of_the_documentation_is_made_by_the_script() -> None:
    names = script("pictures").names()
    assert len(set(names)) == len(names)
    assert set(names) == {file.name for file in DOCS.rglob("*.png")}


def test_the_script_compares_a_picture_with_the_committed_one(tmp_path: Path) -> None:
    from PIL import Image

    pictures = script("pictures")
    for name, grey, size in (("a", 10, 4), ("b", 13, 4), ("c", 10, 5)):
        Image.new("L", (size, 4), grey).save(tmp_path / f"{name}.png")
    a, b, c, d = (tmp_path / f"{name}.png" for name in "abcd")
    assert pictures.difference(a, b) == "mean difference 3.000, largest 3"
    assert pictures.difference(a, c) == "4×4 pixels; the committed picture has 5×4"
    assert pictures.difference(a, d) == "new"


def test_the_first_hour_has_the_output_and_the_time_of_each_command() -> None:
    transcripts = script("transcripts")
    text = transcripts.PAGE.read_text("utf-8")
    sections = re.split(r"^## ", text, flags=re.M)[1:]
    assert [section.splitlines()[0] for section in sections][1:] == [
        "A researcher with a checkpoint",
        "A production engineer",
        "A student",
        "The author of a plugin",
    ]
    for section in sections:
        title = section.splitlines()[0]
        run = [block for block in transcripts.BLOCK.finditer(section) if block[2].strip() != transcripts.ACTIVATION]
        assert len(run) == 1 if title == "Installation" else 5 <= len(run) <= 8, title
        for block in run:
            assert re.search(r"^(Output after|No output;) [\d.]+ (s|min)[:.]$", block[0], re.M), block[2]
            assert block[0].count("\n") - block[2].count("\n") < transcripts.LONGEST + 12
        assert f"| [{title}](#{title.lower().replace(' ', '-')}) | {len(run)} | " in text
    assert not re.search(r"/(tmp|home|work|root)/", text)


def test_a_long_output_is_cut_and_an_empty_one_is_named() -> None:
    transcripts = script("transcripts")
    assert transcripts.below("\n", 0.84) == "\nNo output; 0.8 s.\n"
    assert transcripts.below("a  \nb\n", 48.4) == "\nOutput after 48 s:\n\n```text\na\nb\n```\n"
    lines = transcripts.below("\n".join(map(str, range(40))), 210.0).splitlines()
    assert lines[1] == "Output after 3.5 min:"
    assert lines[4:-1] == [*map(str, range(22)), "…", *map(str, range(36, 40))]
    page = "```bash\nx\n```\n" + transcripts.below("a", 1.0) + "\nNext.\n"
    assert transcripts.BLOCK.sub(lambda m: f"{m[2]}", page) == "x\n\nNext.\n"
