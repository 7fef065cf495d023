"""Run the commands of docs/first-hour.md, and write their outputs and times into the page.

python docs/transcripts.py                      # in a new environment, made for this run
python docs/transcripts.py --environment .venv  # in this one; the time of the installation stays as it is

The commands run in the order of the page, in a new folder. An output stands below its block; the prose of the page is
edited by hand. If a command fails, the script prints its output and leaves the page as it is.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "first-hour.md"
COLUMNS = 100
LONGEST, HEAD, TAIL = 30, 22, 4
"""An output of more than LONGEST lines is cut to its first HEAD and last TAIL lines."""
QUIET = {"PIP_QUIET": "2", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
"""pip does not print warnings about its configuration; one thread, since the other cores may be busy."""
BLOCK = re.compile(
    r"^```(bash|python)\n(.*?)^```\n(?:\n(?:Output after [^\n]*:\n\n```text\n.*?^```|No output;[^\n]*)\n)?", re.S | re.M
)
PROGRESS = re.compile(r"\d%\|.*it/s\]|\d%\|.*\?it")
TABLE = re.compile(r"(?<=<!-- times -->\n).*?(?=<!-- /times -->)", re.S)
INSTALLATION = "python3 -m venv .venv"
ACTIVATION = ". .venv/bin/activate"


@dataclass
class Transcript:
    """What ran: the environment's folder of programs, the working folder, and the times of each section."""

    programs: Path
    folder: Path
    times: dict[str, list[float]] = field(default_factory=dict)

    def run(self, section: str, language: str, text: str) -> str:
        """Run a block, and return what stands below it."""
        command = ["bash", "-euc", text] if language == "bash" else [str(self.programs / "python"), "-c", text]
        path = f"{self.programs}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "COLUMNS": str(COLUMNS), **QUIET}
        print(f"{section}: {text.splitlines()[0]}", flush=True)
        start = time.perf_counter()
        ended = subprocess.run(
            command,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            check=False,
        )
        seconds = time.perf_counter() - start
        if ended.returncode:
            raise SystemExit(f"exit code {ended.returncode}\n{ended.stdout}")
        self.times.setdefault(section, []).append(seconds)
        return below(ended.stdout.replace(f"{self.folder}/", ""), seconds)


def below(output: str, seconds: float) -> str:
    """The lines below a block: the time, and the output without progress bars and spaces at the ends of lines."""
    lines = [line.rstrip() for line in output.strip("\n").splitlines() if not PROGRESS.search(line)]
    if not lines:
        return f"\nNo output; {shown(seconds)}.\n"
    if len(lines) > LONGEST:
        lines = [*lines[:HEAD], "…", *lines[-TAIL:]]
    return "\n".join([f"\nOutput after {shown(seconds)}:\n", "```text", *lines, "```", ""])


def shown(seconds: float) -> str:
    """`0.8 s`, `48 s`, `3.5 min`."""
    if seconds < 100:
        return f"{seconds:.{1 if seconds < 10 else 0}f} s"
    return f"{seconds / 60:.1f} min"


def install(environment: Path) -> float:
    """Make an environment as the page does, and return the time in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    subprocess.run([environment / "bin" / "python", "-m", "pip", "install", "-q", "-e", ROOT], check=True)
    return time.perf_counter() - start


def table(times: dict[str, list[float]], programs: Path, page: str) -> str:
    """The time of each section, and where it was measured. The row of a section that did not run is that of `page`."""
    read = "import torch; print(torch.__version__.partition('+')[0])"
    torch = subprocess.run([programs / "python", "-c", read], capture_output=True, encoding="utf-8", check=True).stdout
    rows = ["| section | commands | time |", "| --- | ---: | ---: |"]
    for section in re.findall(r"^## (.*)$", page, re.M):
        name = f"| [{section}](#{section.lower().replace(' ', '-')}) |"
        seconds = times.get(section)
        old = re.search(rf"^{re.escape(name)}.*$", page, re.M)
        if seconds:
            rows.append(f"{name} {len(seconds)} | {shown(sum(seconds))} |")
        elif old:
            rows.append(old[0])
    cores = {1: "one virtual core", 2: "two virtual cores"}.get(os.cpu_count() or 1, f"{os.cpu_count()} virtual cores")
    where = (
        f"Measured on {datetime.date.today():%Y-%m-%d} on {cores} ({platform.machine()}, no GPU), with one thread, "
        f"Python {platform.python_version()} and\ntorch {torch.strip()}. The machine was also running other work, so "
        "the times are upper bounds."
    )
    return "\n".join(["", *rows, "", where, ""])


def write(environment: Path | None, temporary: Path) -> None:
    """Run all blocks of the page and write it."""
    text = PAGE.read_text("utf-8")
    programs = (environment or temporary / "environment").resolve() / "bin"
    folder = temporary / "work"
    folder.mkdir()
    transcript = Transcript(programs, folder)
    parts: list[str] = []
    for part in re.split(r"(?=^## )", text, flags=re.M):
        section = part.splitlines()[0].removeprefix("## ")

        def replaced(match: re.Match[str], section: str = section) -> str:
            language, block = match[1], match[2]
            fence = f"```{language}\n{block}```\n"
            if block.strip() == ACTIVATION:
                return fence
            if block.startswith(INSTALLATION):
                if environment is not None:
                    return match[0]
                transcript.times[section] = [install(programs.parent)]
                return fence + below("", transcript.times[section][0])
            return fence + transcript.run(section, language, block)

        parts.append(BLOCK.sub(replaced, part))
    rows = table(transcript.times, programs, text)
    PAGE.write_text(TABLE.sub(lambda _: rows, "".join(parts)), "utf-8", newline="\n")


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description="Run the commands of docs/first-hour.md and write their outputs.")
    parser.add_argument("--environment", type=Path, help="an environment with samplerbench; default: a new one")
    given = parser.parse_args()
    temporary = Path(tempfile.mkdtemp())
    try:
        write(given.environment, temporary)
    finally:
        shutil.rmtree(temporary)


if __name__ == "__main__":
    main()
