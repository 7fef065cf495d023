"""The documentation: every command and code block runs, generated pages are fresh, and links lead somewhere.

Commands run in this process, in a folder of their own for each page, in the order of the page. To fit into the time of
a test they are cut by the rules of `shortened`, and nothing else; what cannot run here is listed in SKIPPED with why.
"""

import contextlib
import importlib.util
import io
import os
import re
import shlex
import shutil
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import yaml

from samplerbench import registry
from samplerbench.cli.app import main

ROOT = Path(__file__).resolve().parents[1]
# The commands' help last, since what ran on another page need not run again there.
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"), key=lambda page: (page.name == "cli.md", page.name))
FOLDERS_WITH_PAGES = (".github", "benchmarks", "docs", "plugins", "samplerbench")
LINKING = [*ROOT.glob("*.md"), *(page for name in FOLDERS_WITH_PAGES for page in (ROOT / name).rglob("*.md"))]
"""Every page of the repository, those of networks and examples included."""
LONG = {
    "README",
    "choosing",
    "cli",
    "first-hour",
    "flows",
    "inverse-problems",
    "latency",
    "lectures",
    "likelihood",
    "models",
    "plugins",
    "python",
    "reading-a-table",
    "schedules",
    "text-to-image-metrics",
    "tuning",
    "tutorial",
}
"""Pages with many commands, half a minute of them."""
LANGUAGES = {"bash", "python", "toml", "text", "diff"}

SKIPPED = {
    r"python3? -m venv |\. \.venv/bin/activate": "makes an environment; the first command of CI is the README's",
    r"^\.venv/bin/samplerbench": "is in the environment that the line before it makes",
    r"pip install (?!.*samplerbench-(two-step|my-solver))": "installs packages",
    r"-m pytest": "runs tests, this one among them; tests/test_new.py runs those of a new distribution",
    r"-m (ruff|mypy)": "CI runs it",
    r"^pre-commit install": "changes the hooks of the clone; tests/test_workflows.py compares them with CI",
    r"^accelerate launch": "starts processes; tests/test_resume.py runs two",
    r"^torchrun": "starts processes on two machines; tests/test_accelerate.py runs two launchers on one",
    r"^python docs/generate.py": "the page's freshness has a test of its own here",
    r"^python docs/(pictures|transcripts).py": "takes minutes; tests/test_site.py tests the scripts",
    r"^python -m mkdocs": "tests/test_site.py builds the site",
    r"suites/inverse-": "takes minutes; tests/test_inverse_runs.py runs small ones",
    r"ddim-table1-cifar10.toml": "needs a checkpoint of the hub",
    r"stable-diffusion-v1-5|--prompts prompts.csv": "needs a checkpoint of the hub",
    r"--prompts parti.tsv": "needs a checkpoint of the hub; test_text_suites.py runs the suites on small ones",
    r"--data mnist --channels|stats mnist": "needs MNIST's files; tests/test_mnist_model.py measures without them",
    r"^samplerbench likelihood --model mnist": "needs MNIST's files; the same command on the digits is run",
    r"cifar10-32x32.npz": "needs Inception's weights and published statistics",
    r"figure pareto pareto.png": "needs latencies of the same folder; docs/latency.md measures them first",
    r"--model FOLDER|coco/|^samplerbench export": "needs a text-to-image model; test_text_metrics.py, test_export.py",
    r"^samplerbench convert edm": "needs a published network; tests/test_edm_convert.py converts small ones",
    r"check my-metric my-model": "stands for plugins of one's own; tests/test_new.py checks two of these names",
}
"""Commands that are not run, by what they match, and why."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text and where it begins."""

    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", page.read_text("utf-8"), re.S | re.M)
    return [Block(m[1], m[2], m.string.count("\n", 0, m.start()) + 1) for m in found]


def commands(block: Block) -> list[str]:
    """One string per command; `\\` joins lines, `&&` parts them."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [part.strip() for line in lines for part in line.split("&&") if part.strip() and not line.startswith("#")]


def excuse(command: str) -> str | None:
    return next((pattern for pattern in SKIPPED if re.search(pattern, command)), None)


# --- Cutting -------------------------------------------------------------------------------------------------------

MOST_STEPS, MOST_IMAGES = 2, 5


def shortened(arguments: list[str]) -> list[str]:
    """The command with less to do.

    At most two numbers of steps, each at most MOST_STEPS, or of evaluations, at most 2 * MOST_STEPS; at most
    MOST_IMAGES images a block (two, where they are sampled one by one; 20 for `kid`, which needs two of each class)
    and two blocks; no more than five Langevin steps a level. `gap` solves one image of one block, to two digits,
    and so does `rk45`. Schedules are learned on four images. A latency is that of two batches.
    Suites are listed (--dry-run, small batches), not run.
    Training takes two steps, that of a classifier or of features on the reader's own images instead of all digits. A
    report leaves out its plots, and a figure has two rows and few columns: both have tests of their own.
    """
    command, rest = arguments[0], [re.sub(r"T=\d\d+", "T=5", a) for a in arguments]
    rest = [re.sub(r"solver=rk45$", "solver=rk45,rtol=0.01,atol=0.01", a) for a in rest]
    rest = [re.sub(r"^gits$", "gits:points=9,images=4", a) for a in rest]
    rest = [re.sub(r"^gap-optimal$", "gap-optimal:images=4,runs=2,tol=0.01", a) for a in rest]
    suite = any(a.endswith(".toml") and not before.startswith("-") for before, a in pairwise(rest))
    if command in ("run", "sample"):
        solved, alone = "gap" in " ".join(rest), "--batch-size 1 " in " ".join([*rest, ""])
        rest = [re.sub(r"^gap(:images=\d+)?$", "gap:images=1,tol=0.01", a) for a in rest]
        _cap_list(rest, "--steps", MOST_STEPS, add=not suite and "--nfe" not in rest)
        _cap_list(rest, "--nfe", 2 * MOST_STEPS)
        pairs = command == "run" and "kid" in rest and "--labels" not in rest  # it needs two images of each class
        if suite and "--dry-run" not in rest:
            rest.append("--dry-run")
        if "--dry-run" not in rest:  # it takes no longer for more images, and refuses what is too few for a metric
            _cap(rest, "--n", 2 if alone else 20 if pairs else MOST_IMAGES, add=True)
        _cap(rest, "--blocks", 1 if solved else 2)
        if "--dry-run" in rest:
            rest += ["--batch-size", str(MOST_IMAGES)]
    elif command == "likelihood":
        _cap_list(rest, "--steps", MOST_STEPS, add="elbo" not in rest)
        _cap(rest, "--n", 2, add=True)
    elif command in ("tune", "recommend"):  # with few images and one sampler, if the page names none
        if "--time" in rest:
            place = rest.index("--time")
            del rest[place : place + 2]
        if "--budget" in rest:  # how many evaluations fit into a time depends on the machine
            place = rest.index("--budget")
            rest[place : place + 2] = ["--nfe", "6"]
        _cap(rest, "--evaluations", 400, add="--no-search" not in rest)
        _cap_list(rest, "--nfe", 6, add=True)
        _cap(rest, "--n", 8, add=True)
        rest += [] if "-s" in rest or "--sampler" in rest else ["-s", "ddim"]
        rest += [] if "--spacing" in rest else ["--spacing", "karras"]
    elif command == "schedule":
        rest = [
            {"gap-optimal": "gap-optimal:images=4,runs=4", "gits": "gits:images=8,points=9"}.get(a, a) for a in rest
        ]
        _cap_list(rest, "--nfe", 2 * MOST_STEPS, add=True)
    elif command == "latency":
        _cap_list(rest, "--steps", MOST_STEPS)
        _cap_list(rest, "--nfe", 2 * MOST_STEPS)
        _cap(rest, "--repeats", 2, add=True)
        rest += [] if "--steps" in rest or "--nfe" in rest else ["--steps", str(MOST_STEPS)]
    elif command == "train":
        _cap(rest, "--steps", 2, add=True)
        _cap(rest, "--batch-size", 8, add=True)
        _cap(rest, "--sample-every", 0)
        if arguments[1] in ("classifier", "features"):
            rest = ["my-images" if a == "digits" else a for a in rest]
    elif command == "report" and "--format" not in rest:
        rest += ["--format", "md,latex,csv,json,html"]
    elif command == "figure" and arguments[1] != "pareto":
        _cap_list(rest, "--steps", MOST_STEPS, add=arguments[1] != "forward")
        _cap(rest, "--n", 2, add=True)
        _cap(rest, "--points", 2, add=arguments[1] == "interpolate")
        _cap_list(rest, "--round-trip", MOST_STEPS, add=arguments[1] == "interpolate")
    return rest


def _cap(arguments: list[str], flag: str, most: int, add: bool = False) -> None:
    if flag in arguments:
        place = arguments.index(flag) + 1
        arguments[place] = str(min(int(arguments[place]), most))
    elif add:
        arguments += [flag, str(most)]


def _cap_list(arguments: list[str], flag: str, most: int, add: bool = False) -> None:
    if flag in arguments:
        place = arguments.index(flag) + 1
        numbers = sorted({min(int(n), most) for n in re.findall(r"\d+", arguments[place])})
        if numbers:
            arguments[place] = ",".join(map(str, numbers[-2:]))
    elif add:
        arguments += [flag, str(most)]


def shortened_python(text: str) -> str:
    """`n=500` and `steps=50`, and lists of the latter, as in `shortened`."""
    text = re.sub(r"\bn=(\d+)", lambda m: f"n={min(int(m[1]), MOST_IMAGES)}", text)
    text = re.sub(r"\bsteps=(\d+)", lambda m: f"steps={min(int(m[1]), MOST_STEPS)}", text)
    return re.sub(r"\b(steps|nfe)=\[[\d, ]+\]", lambda m: f"{m[1]}=[{MOST_STEPS}, {2 * MOST_STEPS}]", text)


# --- What a reader has ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages take for granted: a folder of images, a checkpoint, a class in a file, the committed results."""
    from PIL import Image

    from samplerbench.assets import asset
    from samplerbench.data import load_data

    place = tmp_path_factory.mktemp("given")
    digits = load_data("digits")
    assert digits.labels is not None
    for i in range(2 * MOST_IMAGES):
        image = place / "my-images" / str(int(digits.labels[i])) / f"{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[i, 0].numpy()).save(image)
    (place / "runs").mkdir()
    # Copied, as all that a page may write to: a command must never reach the repository.
    shutil.copytree(asset("digits"), place / "runs" / "mine")
    (readme,) = (b.text for b in blocks(ROOT / "README.md") if b.language == "python")
    (place / "my_sampler.py").write_text(readme.replace("class DDIM(", "class MySampler("), "utf-8")
    shutil.copytree(ROOT / "benchmarks" / "suites", place / "benchmarks" / "suites")
    shutil.copytree(ROOT / "benchmarks" / "results" / "digits", place / "benchmarks" / "results" / "digits")
    return place


@pytest.fixture
def reader(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder with what a reader has, and nothing left of a plugin that a page installs."""
    shutil.copytree(given, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SAMPLERBENCH_DEBUG", "")
    yield tmp_path
    for module in ("samplerbench_two_step", "samplerbench_my_solver"):
        sys.modules.pop(module, None)
    registry.load.cache_clear()


BEFORE = {
    "cli": [
        "samplerbench train autoencoder --data digits --out runs/autoencoder --channels 16,32 --steps 2",
        "samplerbench train unet --data digits --latents runs/autoencoder --out runs/latent --steps 2",
    ]
}
"""What the examples of the commands' help take for granted beside that, each command by itself as they are."""
FOLDERS = {"cli": ["results", "results/before", "results/after"]}
"""The folders of results that they name."""
CHECKED: set[str] = set()
"""Plugins that `samplerbench check` has passed on an earlier page, which takes seconds."""
RUN: set[str] = set()
"""Commands that ran on an earlier page: the examples of the commands' help, which stand alone, are not run twice."""


@dataclass
class Reader:
    """Does what a page says, in the working folder."""

    page: Path
    monkeypatch: pytest.MonkeyPatch
    namespace: dict[str, Any]

    def follow(self, block: Block) -> None:
        if block.language == "bash":
            for command in commands(block):
                self.run(command, block)
        elif block.language == "python":
            code = compile(shortened_python(block.text), f"{self.page.name}:{block.line}", "exec")
            exec(code, self.namespace)
        elif block.language == "diff":
            patch(Path.cwd(), block.text)
        elif block.language == "toml":
            tomllib.loads(block.text)

    def run(self, command: str, block: Block) -> None:
        if excuse(command):
            return
        where = f"{self.page.name}:{block.line}: {command}"
        words = shlex.split(command, comments=True)
        if made := re.search(r"pip install .*-e '?(samplerbench-[a-z-]+)", command):
            installed(Path(made[1]), self.monkeypatch)
            return
        assert words[0] == "samplerbench", f"{where}\nis neither run nor listed in SKIPPED"
        if command in RUN and self.page.stem == "cli":
            return
        RUN.add(command)
        if words[1] == "check" and "two-step" not in words:
            words = [*words[:2], *(w for w in words[2:] if w.partition(":eta")[0] not in CHECKED)]
            CHECKED.update(w.partition(":eta")[0] for w in words[2:] if not w.startswith("-"))
            if not any(not w.startswith("-") for w in words[2:]):
                return
        wanted = re.search(r"# exit code (\d+)", command)
        told = io.StringIO()
        streams = contextlib.redirect_stdout(told), contextlib.redirect_stderr(told)
        # --no-plugins and --debug are told to the rest of their process, which here goes on.
        with mock.patch.dict(os.environ), streams[0], streams[1], pytest.raises(SystemExit) as ended:
            main(shortened(words[1:]))
        assert ended.value.code == (int(wanted[1]) if wanted else 0), f"{where}\n{told.getvalue()[-3000:]}"


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `pip install -e folder` leaves behind."""
    project: dict[str, Any] = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))["project"]
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head, "utf-8")
    lines = [
        line
        for group, points in project["entry-points"].items()
        for line in (f"[{group}]", *(f"{name} = {value}" for name, value in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join([*lines, ""]), "utf-8")
    monkeypatch.syspath_prepend(folder.resolve())


def patch(folder: Path, diff: str) -> None:
    """Apply a diff of one place in one file: `--- FILE`, then lines with a space, + or -."""
    head, *lines = diff.splitlines()
    file = folder / head.removeprefix("--- ")
    old = "\n".join(line[1:] for line in lines if not line.startswith("+"))
    new = "\n".join(line[1:] for line in lines if not line.startswith("-"))
    text = file.read_text("utf-8")
    assert text.count(old) == 1, f"{head}: what the diff changes is not there, once:\n{old}"
    file.write_text(text.replace(old, new), "utf-8")
    for module in [m for m in sys.modules.values() if getattr(m, "__file__", None) == str(file.resolve())]:
        del sys.modules[module.__name__]  # another process would read the edited file
    registry.load.cache_clear()


def names_of(page: Path, folder: Path) -> dict[str, Any]:
    """What the Python of a page takes for granted: in docs/diffusers.md, a pipeline."""
    if page.name != "diffusers.md":
        return {"__name__": "page"}
    from diffusers import DDIMScheduler
    from support.pipelines import tiny_stable_diffusion

    return {"__name__": "page", "pipe": tiny_stable_diffusion(folder, DDIMScheduler(clip_sample=False, steps_offset=1))}


# --- The tests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=p.stem, marks=[pytest.mark.slow] if p.stem in LONG else []) for p in PAGES]
)
def test_every_block_of_the_page_runs(page: Path, reader: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    follower = Reader(page, monkeypatch, names_of(page, reader))
    for command in BEFORE.get(page.stem, []):
        follower.run(command, Block("bash", command, 0))
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{page.name}:{block.line}: no language, or one that is not looked at"
        for folder in FOLDERS.get(page.stem, []):  # anew, since the examples of one command know nothing of another's
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree("benchmarks/results/digits", folder)
        follower.follow(block)


def test_ci_runs_what_is_slow() -> None:
    """What the README's command leaves out, a line of CI does not."""
    assert "-m pytest -q -n 2 -m slow\n" in (ROOT / ".ci" / "run").read_text("utf-8")
    assert {page.stem for page in PAGES} >= LONG


def test_what_is_skipped_is_there() -> None:
    found = [c for page in PAGES for block in blocks(page) if block.language == "bash" for c in commands(block)]
    for pattern in SKIPPED:
        assert any(re.search(pattern, c) for c in found), f"no page has a command like {pattern}: leave it out"
    ran = [c for c in found if not excuse(c)]
    assert len(ran) > 100
    assert len(ran) > 3 * (len(found) - len(ran))


@pytest.mark.parametrize(
    ("command", "cut"),
    [
        ("run -s ddim", "run -s ddim --steps 2 --n 5"),
        ("run -s ddim --steps 1,2,50 --n 4 --blocks 5", "run -s ddim --steps 1,2 --n 4 --blocks 2"),
        ("run -s ddim --nfe 3,10,20 --metric gap", "run -s ddim --nfe 3,4 --metric gap:images=1,tol=0.01 --n 5"),
        ("run -s ddim --steps 1 --n 50 --batch-size 1", "run -s ddim --steps 1 --n 2 --batch-size 1"),
        ("run a.toml --out b", "run a.toml --out b --dry-run --batch-size 5"),
        ("train features --data digits --seed 1", "train features --data my-images --seed 1 --steps 2 --batch-size 8"),
        ("check ddim", "check ddim"),
        ("report results", "report results --format md,latex,csv,json,html"),
        ("figure steps a.png -s ddim --n 1", "figure steps a.png -s ddim --n 1 --steps 2"),
    ],
)
def test_commands_are_cut_as_the_rules_say(command: str, cut: str) -> None:
    assert shortened(command.split()) == cut.split()


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_what_the_code_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLERBENCH_NO_PLUGINS", "1")
    pages = generator().pages()
    assert {file.name for file in pages} == {"cli.md", "api.md", "builtin.md", "coming-from.md"}
    for file, text in pages.items():
        assert file.read_text("utf-8") == text, f"docs/{file.name} is stale; run: python docs/generate.py"


def test_the_command_line_page_does_not_depend_on_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    page = generator().cli_page()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "dumb")
    assert generator().cli_page() == page
    assert str(ROOT) not in page
    # Typer itself knows the same commands and options.
    told = io.StringIO()
    monkeypatch.setenv("COLUMNS", "400")
    with contextlib.redirect_stdout(told), pytest.raises(SystemExit):
        main(["train", "unet", "--help"])
    section = page.split("\n## train unet\n")[1].split("\n## ")[0]
    options = set(re.findall(r"(?<![\w`])--[a-z][a-z-]*", told.getvalue())) - {"--help"}
    assert options == set(re.findall(r"^\| `(--[a-z-]+)`", section, re.M))


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return set(found)


def links(page: Path) -> list[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.S | re.M)
    return re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'<img src="([^"]+)"', text)


@pytest.mark.parametrize("page", sorted(LINKING), ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        if link.startswith("https://"):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(file), f"{page.name}: {link}"


def test_every_page_and_figure_is_linked_from_somewhere() -> None:
    linked = {(page.parent / link.partition("#")[0]).resolve() for page in PAGES for link in links(page)}
    for file in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs").rglob("*.png")]:
        assert file in linked, file


def test_the_readme_begins_with_the_two_commands_a_table_and_a_picture() -> None:
    text = (ROOT / "README.md").read_text("utf-8")
    screen = text.split("\n## ")[0]
    assert screen.count("\n") < 50
    assert re.search(r"<!-- test command -->\s*```\w*\n.*pytest.*```", screen, re.S)
    assert "samplerbench run --sampler ddim --steps 50" in screen
    assert re.search(r"^\| --- \|", screen, re.M)
    assert re.search(r"<img src=", screen)


def test_the_citation_is_one() -> None:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cff["cff-version"] == "1.2.0"
    assert {"message", "title", "authors"} <= set(cff)
    from samplerbench import __version__

    assert cff["version"] == __version__
    assert cff["license"] == "Apache-2.0"
