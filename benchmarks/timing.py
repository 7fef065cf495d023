"""Common parts of the speed benchmarks: alternating timings, child processes and their cost, networks, tables.

Nothing here imports torch or numpy at import time, so that a script can set the number of threads before.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def set_threads(threads: int | None) -> int:
    """Give this process, and those it starts, a number of threads; None is one for every core it may use.

    Only what is imported afterwards heeds it.
    """
    threads = threads or len(os.sched_getaffinity(0))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = str(threads)
    return threads


def alternate(
    jobs: Mapping[str, Callable[[], Any]], repeats: int, wait: Callable[[], Any] = lambda: None
) -> dict[str, list[float]]:
    """Seconds of each job, run in turn `repeats` times; each must have been run once before, as first runs are slow.

    Every other round goes backwards, so that none is always first. wait: until the device has done its work.
    """
    wait()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for k in range(repeats):
        for name in list(jobs)[:: 1 if k % 2 == 0 else -1]:
            begun = time.perf_counter()
            jobs[name]()
            wait()
            seconds[name].append(time.perf_counter() - begun)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest of the ratios of paired times."""
    found = [a / b for a, b in zip(above, below, strict=True)]
    return {"median": statistics.median(found), "least": min(found), "greatest": max(found)}


@dataclass
class Cost:
    """What a child process cost: wall and processor seconds, peak memory of its largest process, what it wrote."""

    wall: float
    cpu: float
    peak: int
    written: int
    files: int
    output: str

    def row(self) -> Row:
        """As a row, without the output."""
        return {k: v for k, v in asdict(self).items() if k != "output"}


def run_child(command: Sequence[str], folder: Path | None = None, env: Mapping[str, str] | None = None) -> Cost:
    """Run a command with its standard output captured, and measure it with the children it waited for.

    folder: whose files, when it has ended, count as written. Exits with the command's last lines if it fails.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        begun = time.perf_counter()
        child = subprocess.Popen(list(command), stdout=out, stderr=err, text=True, env={**os.environ, **(env or {})})
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - begun
        child.returncode = os.waitstatus_to_exitcode(status)  # it is reaped already
        out.seek(0)
        err.seek(0)
        if child.returncode:
            last = "\n".join((out.read() + err.read()).strip().splitlines()[-12:])
            raise SystemExit(f"{' '.join(command[:6])} … failed with exit code {child.returncode}:\n{last}")
        unit = 1 if sys.platform == "darwin" else 1024
        files = [f for f in folder.rglob("*") if f.is_file()] if folder is not None else []
        written = sum(f.stat().st_size for f in files)
        return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit, written, len(files), out.read())


def processor() -> str:
    """The name of the processor and the number of available threads."""
    name = platform.processor() or platform.machine()
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0))} threads"


def environment(device: str = "cpu", **more: Any) -> Row:
    """Date, device and versions of a measurement."""
    name = processor()
    if device != "cpu":
        import torch

        name = f"{torch.cuda.get_device_name(torch.device(device))}; {name}"
    packages = ("samplerbench", "torch", "diffusers", "torch-fidelity", "numpy", "scipy")
    versions = {"python": platform.python_version()}
    for package in packages:
        with suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "device": name, "versions": versions, **more}


def keep(file: Path | None, what: str, about: Row, rows: Any, **more: Any) -> None:
    """Write the results of a benchmark as JSON, if a file is given."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"benchmark": what, **about, **more, "rows": rows}, indent=1), "utf-8")


def table(rows: Iterable[Sequence[Any]], head: Sequence[str]) -> str:
    """A Markdown table, with numbers right-aligned."""
    cells = [list(head), *([str(value) for value in row] for row in rows)]
    columns = list(zip(*cells, strict=True))
    words = [not any(v.lstrip("+-")[:1].isdigit() for v in column[1:]) for column in columns]
    widths = [max(3, *map(len, column)) for column in columns]

    def line(values: Sequence[str]) -> str:
        padded = [v.ljust(w) if t else v.rjust(w) for v, w, t in zip(values, widths, words, strict=True)]
        return "| " + " | ".join(padded) + " |"

    rule = ["-" * w if t else "-" * (w - 1) + ":" for w, t in zip(widths, words, strict=True)]
    return "\n".join([line(cells[0]), line(rule), *map(line, cells[1:])])


def mebibytes(size: float) -> str:
    """A size in MiB."""
    return f"{size / 2**20:,.1f}" if size < 100 * 2**20 else f"{size / 2**20:,.0f}"


def cifar_checkpoint(folder: Path, small: bool = False) -> Path:
    """A checkpoint with random weights and the architecture of google/ddpm-cifar10-32: 35.7M parameters, 32x32x3.

    small: an eighth of the channels, to try a script where there is no GPU.
    """
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    if not (folder / "model_index.json").exists():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=(32, 32, 32, 32) if small else (128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            norm_num_groups=32,
        )
        DDPMPipeline(unet, DDPMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder
