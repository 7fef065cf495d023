"""Make the pictures of the documentation: docs/figures/*.png, docs/report.png and docs/report-mnist.png.

python docs/pictures.py                       # makes them all again
python docs/pictures.py steps.png report.png  # some of them
python docs/pictures.py --out new             # writes them to another folder, to compare them

A figure is made by the command of the page that shows it. `fid-vs-nfe.png` is a plot of the report of
benchmarks/results/digits. `report.png` and `report-mnist.png` are the pages of the reports of benchmarks/results/digits
and benchmarks/results/mnist in headless Chromium. For every picture the
script prints the mean difference from the committed one, in levels of 0 to 255. All pictures take about two minutes on
one core.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
PAGES = {"report.png": "digits", "report-mnist.png": "mnist"}
"""Pictures of the pages of reports, with their folders of benchmarks/results."""
GENERATED = {"cli.md", "api.md", "builtin.md", "coming-from.md"}


def figure_commands() -> dict[str, list[str]]:
    """The arguments of `samplerbench figure` for each picture, from the page that shows the picture."""
    result = {}
    for page in sorted(HERE.glob("*.md")):
        if page.name in GENERATED:
            continue
        text = page.read_text("utf-8").replace("\\\n", " ")
        for command in re.findall(r"^samplerbench (figure .*)$", text, re.M):
            arguments = shlex.split(command, comments=True)
            if f"](figures/{arguments[2]})" in text:
                result[arguments[2]] = arguments
    return result


def schedule_commands() -> dict[str, list[str]]:
    """The arguments of `samplerbench schedule … --figure NAME` for each picture, from the page that shows it."""
    result = {}
    for page in sorted(HERE.glob("*.md")):
        text = page.read_text("utf-8")
        for command, name in re.findall(r"`samplerbench (schedule [^`]*--figure (\S+\.png))`", text):
            if f"]({name})" in text:
                result[name] = shlex.split(command)
    return result


def names() -> list[str]:
    """All pictures that this script makes."""
    return [*figure_commands(), *schedule_commands(), "fid-vs-nfe.png", *PAGES]


def make(name: str, folder: Path) -> Path | None:
    """Make one picture in `folder`, and return its path. None: no browser is installed for the screenshot."""
    commands = figure_commands() | schedule_commands()
    if name in commands:
        samplerbench(commands[name], folder)
        return folder / name
    results = PAGES.get(name, "digits")
    report = folder / f"report-{results}"
    if not (report / "report.html").exists():
        samplerbench(["report", str(ROOT / "benchmarks" / "results" / results), "--out", report.name], folder)
    if name == "fid-vs-nfe.png":
        return report / "plots" / name
    return screenshot(report / "report.html", folder / name, 1280, 1000)


def samplerbench(arguments: list[str], folder: Path) -> None:
    """Run a command of samplerbench in `folder`."""
    subprocess.run(
        [sys.executable, "-m", "samplerbench", *arguments], cwd=folder, check=True, stdout=subprocess.DEVNULL
    )


def screenshot(page: Path, out: Path, width: int, height: int, *options: str) -> Path | None:
    """Write what headless Chromium shows of a file, without scroll bars. None: Chromium is not installed."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        return None
    settings = ["--headless", "--disable-gpu", "--no-sandbox", "--hide-scrollbars", "--virtual-time-budget=5000"]
    size = [f"--window-size={width},{height}", f"--screenshot={out}"]
    command = [browser, *settings, *size, *options, page.resolve().as_uri()]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return out


def difference(new: Path, committed: Path) -> str:
    """The mean absolute difference of two pictures, or what else differs."""
    import numpy as np
    from PIL import Image

    if not committed.exists():
        return "new"
    a, b = (np.asarray(Image.open(file).convert("RGB"), dtype=np.float64) for file in (new, committed))
    if a.shape != b.shape:
        return f"{a.shape[1]}×{a.shape[0]} pixels; the committed picture has {b.shape[1]}×{b.shape[0]}"
    return f"mean difference {np.abs(a - b).mean():.3f}, largest {np.abs(a - b).max():.0f}"


def main() -> None:
    """Make the pictures that the command line names."""
    parser = argparse.ArgumentParser(description="Make the pictures of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(names())}")
    parser.add_argument("--out", type=Path, help="folder to write to; default: the places in docs")
    given = parser.parse_args()
    if unknown := set(given.names) - set(names()):
        parser.error(f"no picture {', '.join(sorted(unknown))}; the pictures are {', '.join(names())}")
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.names or names():
            place = Path(name if name in PAGES else f"figures/{name}")
            made = make(name, Path(temporary))
            if made is None:
                print(f"{place}: not made, because Chromium is not installed")
                continue
            print(f"{place}: {difference(made, HERE / place)}", flush=True)
            target = (given.out or HERE) / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(made, target)


if __name__ == "__main__":
    main()
