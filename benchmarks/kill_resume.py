"""Kill a suite with SIGKILL at random moments, resume it, and compare the results with an uninterrupted run.

python benchmarks/kill_resume.py benchmarks/suites/digits.toml --undisturbed results/digits --kills 20
python benchmarks/kill_resume.py benchmarks/suites/digits.toml --undisturbed results/small -- --n 100 --blocks 2
python benchmarks/kill_resume.py benchmarks/suites/digits.toml --undisturbed results/digits --tamper

With --tamper, the checkpoint of an unfinished cell is changed after every other kill: a bit is flipped, its end is cut
off, the checkpoint of another cell or a link to it is put in its place, or its digest is taken out. Each must be set
aside.

What stands after -- is given to every `samplerbench run`, beside the suite. The undisturbed run is made (or resumed)
first if its folder is not complete. The moments are uniform over the time that the undisturbed run took.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

SAME = ("sampler", "parameters", "guidance", "spacing", "steps", "nfe", "n", "blocks", "seed", "metrics", "protocol")


class Forked:
    """A command of samplerbench in a fork of this process, with the parts of subprocess.Popen's interface used here."""

    def __init__(self, arguments: list[str]) -> None:
        from samplerbench.cli.app import main

        reading, writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(writing, 2)
                sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
                main(arguments)
            except SystemExit as ended:
                code = int(ended.code or 0)
            finally:
                os._exit(code)
        os.close(writing)
        self.stderr = os.fdopen(reading, "r")

    def poll(self) -> int | None:
        """The exit code, or None while the process is running."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self) -> int:
        """Wait for the exit code."""
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def communicate(self) -> tuple[str, str]:
        """Wait for the end of the process, and return its stderr."""
        err = self.stderr.read()
        self.wait()
        return "", err

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


def start(suite: Path, out: Path, more: list[str], fork: bool) -> subprocess.Popen[str] | Forked:
    """`samplerbench run SUITE --out OUT` in a separate process."""
    arguments = ["run", str(suite), "--out", str(out), "--device", "cpu", *more]
    if fork:
        return Forked(arguments)
    command = [sys.executable, "-m", "samplerbench", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def warm_up() -> None:
    """Run one small cell in this process, so that its forks find everything imported."""
    import torch

    from samplerbench.cli.app import main

    torch.set_num_threads(1)  # threads do not survive a fork
    with (
        tempfile.TemporaryDirectory() as out,
        contextlib.suppress(SystemExit),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        main(
            ["run", "-m", "exact:mixture", "--data", "digits", "-s", "ddim", "--steps", "1", "--n", "20", "--out", out]
        )


def records(out: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder, by file name."""
    return {f.name: json.loads(f.read_text("utf-8")) for f in sorted(out.glob("*.json"))}


def differences(a: Any, b: Any, place: str = "") -> list[str]:
    """The differences of two values. Numbers may differ by a relative 1e-9."""
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [d for k in a for d in differences(a[k], b[k], f"{place}.{k}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{place}[{i}]")]
    if isinstance(a, float) and isinstance(b, float):
        return [] if abs(a - b) <= 1e-9 * max(abs(a), abs(b)) else [f"{place}: {a!r} and {b!r}"]
    return [] if a == b else [f"{place}: {a!r} and {b!r}"]


PARTIAL = ".partial.safetensors"


class Tamperer:
    """Changes the checkpoints in a folder, each time in another way, and counts those that must be set aside.

    left: inode and time of each file as it was left. counts: how often each way was used.
    """

    def __init__(self, out: Path, rng: random.Random) -> None:
        self.out, self.rng = out, rng
        self.kept = out.with_name(out.name + "-kept")
        self.left: dict[str, tuple[int, int]] = {}
        self.counts: dict[str, int] = {}
        self.ways = [self.flip, self.cut, self.exchange, self.unseal, self.link]

    def __call__(self) -> None:
        """Tamper with every intact checkpoint that is there, and keep a copy of it for other cells."""
        for file in sorted(self.out.glob(f"*{PARTIAL}")):
            stat = file.lstat()
            if self.left.get(file.name) == (stat.st_ino, stat.st_mtime_ns):
                continue  # it was tampered with before, and no run has come to it
            way = self.ways[sum(self.counts.values()) % len(self.ways)]
            copy = file.read_bytes()
            others = sorted(f for f in self.kept.glob("*") if f.name != file.name) if self.kept.exists() else []
            if way in (self.exchange, self.link) and not others:
                way = self.flip
            self.kept.mkdir(exist_ok=True)
            way(file, self.rng.choice(others) if others else file)
            if not (self.kept / file.name).exists():
                (self.kept / file.name).write_bytes(copy)
            self.counts[way.__name__] = self.counts.get(way.__name__, 0) + 1
            stat = file.lstat()
            self.left[file.name] = (stat.st_ino, stat.st_mtime_ns)

    def flip(self, file: Path, _: Path) -> None:
        """One bit anywhere."""
        data = bytearray(file.read_bytes())
        data[self.rng.randrange(len(data))] ^= 1 << self.rng.randrange(8)
        file.write_bytes(data)

    def cut(self, file: Path, _: Path) -> None:
        """The end is missing."""
        data = file.read_bytes()
        file.write_bytes(data[: self.rng.randrange(len(data))])

    def exchange(self, file: Path, other: Path) -> None:
        """The intact checkpoint of another cell under this one's name."""
        shutil.copyfile(other, file)

    def unseal(self, file: Path, _: Path) -> None:
        """The same content without its digest, and another number of images done."""
        from safetensors.torch import save_file

        from samplerbench.results.tensors import load_tensors

        found = load_tensors(file)
        progress = json.loads(found.metadata["progress"])
        progress["done"] += 1
        save_file(found.tensors, file, found.metadata | {"progress": json.dumps(progress)})

    def link(self, file: Path, other: Path) -> None:
        """A link to the intact checkpoint of another cell."""
        file.unlink()
        file.symlink_to(other.resolve())


def main() -> int:
    """Run the measurement and print the results. The exit code is 1 if they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", type=Path)
    parser.add_argument("--undisturbed", type=Path, required=True, help="folder of the uninterrupted run")
    parser.add_argument("--out", type=Path, default=Path("results/killed"), help="folder of the killed run")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tamper", action="store_true", help="change the checkpoints after every other kill")
    parser.add_argument(
        "--seconds", type=float, help="time over which the kills are spread; default: that of the uninterrupted run"
    )
    parser.add_argument(
        "--fork", action="store_true", help="fork the runs from this process, so that torch is imported once"
    )
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    chosen, more = parser.parse_args(words[:cut]), words[cut + 1 :]
    if any(chosen.out.glob("*.json")):
        raise SystemExit(f"{chosen.out} has results already; name an empty folder with --out.")
    process = start(chosen.suite, chosen.undisturbed, more, False)
    _, err = process.communicate()
    if process.returncode != 0:
        raise SystemExit(err)
    whole = records(chosen.undisturbed)
    seconds = sum(r["seconds"] + r["metric_seconds"] for r in whole.values())
    print(f"undisturbed: {len(whole)} results, {seconds:.0f} s of work", flush=True)
    seconds = chosen.seconds or seconds
    if chosen.fork:
        warm_up()
    rng, kills = random.Random(chosen.seed), 0
    tamper = Tamperer(chosen.out, rng) if chosen.tamper else None
    while kills < chosen.kills:
        # On the average one run does its share of the work before it is killed, so the kills are spread over all of it.
        wait = rng.uniform(0, 2 * seconds / (chosen.kills + 1))
        process = start(chosen.suite, chosen.out, more, chosen.fork)
        assert process.stderr is not None
        process.stderr.readline()  # the first cell is done or found: the imports are no interesting moment
        begun = time.monotonic()
        threading.Thread(target=process.stderr.read, daemon=True).start()  # so that a full pipe does not stop it
        while time.monotonic() - begun < wait and process.poll() is None:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        print(
            f"kill {kills:2d} after {time.monotonic() - begun:5.1f} s: {len(records(chosen.out))} results, "
            f"{len(list(chosen.out.glob('*.partial.safetensors')))} unfinished",
            flush=True,
        )
        if tamper is not None and kills % 2:
            tamper()
    process = start(chosen.suite, chosen.out, more, chosen.fork)
    _, err = process.communicate()
    if process.returncode != 0:
        raise SystemExit(err)
    again = records(chosen.out)
    lines = [line for line in (chosen.out / "run.log").read_text("utf-8").splitlines() if "earlier run" not in line]
    wrong = [f"{name} is not in both" for name in whole.keys() ^ again.keys()]
    for name in whole.keys() & again.keys():
        a, b = whole[name], again[name]
        wrong += [f"{name}{d}" for d in differences({k: a[k] for k in SAME}, {k: b[k] for k in SAME})]
    aside = len(list(chosen.out.glob("*.damaged")))
    if tamper is not None:
        changed = sum(tamper.counts.values())
        ways = ", ".join(f"{name} {count}" for name, count in tamper.counts.items())
        print(f"{changed} checkpoints tampered with ({ways}); {aside} set aside", flush=True)
        if aside != changed:
            wrong.append(f"{changed} checkpoints were tampered with, {aside} were set aside")
    resumed = sum(r["resumed"] for r in again.values())
    print(
        f"{kills} kills, {resumed} resumptions inside a cell; {len(again)} results, each written "
        f"{'once' if len(lines) == len(again) else f'by {len(lines)} runs'}; "
        + ("equal to the undisturbed run's to 1e-9." if not wrong else f"{len(wrong)} differences:")
    )
    for line in wrong[:20]:
        print(line)
    return bool(wrong or len(lines) != len(again))


if __name__ == "__main__":
    sys.exit(main())
