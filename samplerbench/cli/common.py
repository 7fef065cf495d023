"""Options that several commands share, and what they have in common when they run."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from samplerbench.text import console, note, one_line, printable, say

if TYPE_CHECKING:
    from samplerbench.sampling import Step


def complete(kind: str) -> Any:
    """Shell completion of registered names; nothing is imported for it."""

    def names(incomplete: str) -> list[str]:
        from samplerbench import registry

        return sorted({e.name for e in registry.entries(kind) if e.name.startswith(incomplete)})

    return names


Samplers = Annotated[
    list[str],
    typer.Option(
        "--sampler",
        "-s",
        help="A sampler, with parameters: `ddim:eta=0.5`. Repeatable.",
        autocompletion=complete("sampler"),
    ),
]
Steps = Annotated[
    str | None, typer.Option("--steps", help="Numbers of steps, with commas: `10,20,50`. Default: 50, if no --nfe.")
]
Guidances = Annotated[
    list[str],
    typer.Option(
        "--guidance",
        "-g",
        help="A guidance, with parameters: `cfg:scale=2`; `none` for none. Repeatable.",
        autocompletion=complete("guidance"),
    ),
]
Spacing = Annotated[
    str | None,
    typer.Option(
        "--spacing",
        help="Where the steps are: `karras:rho=7`. Default: the sampler's own.",
        autocompletion=complete("spacing"),
    ),
]
ModelName = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="A name (`digits`), a checkpoint folder, or a hub id.",
        autocompletion=complete("model"),
    ),
]
Revision = Annotated[str | None, typer.Option("--revision", help="Branch, tag or commit of a hub repository.")]
Variant = Annotated[
    str | None,
    typer.Option(
        "--variant", help="Which of the checkpoint's weights: `fp16`, `non_ema`, …; `ema` is the folder unet_ema."
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option("--prompts", help="For a model that draws from text: a file, one prompt a line. Line k is label k."),
]
NegativePrompt = Annotated[
    str | None,
    typer.Option("--negative-prompt", help="What guidance steers away from. Default: the empty prompt."),
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Take checkpoints from the local cache only, as HF_HUB_OFFLINE=1 does.")
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="`balanced` as in the data, `none`, or one label. Default: balanced, if there are classes.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**64 - 1, help="Sample i is a function of seed and i alone.")]
BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size",
        "-b",
        help="Images at a time; changes no image. `auto` tries which is fastest, and remembers it.",
    ),
]
Dtype = Annotated[
    str,
    typer.Option("--dtype", help="Of the network: fp32, tf32 (NVIDIA GPUs), bf16, fp16 or fp64; the state keeps fp32."),
]
Compile = Annotated[
    bool, typer.Option("--compile", help="Compile the network with torch.compile: slow to start, then faster.")
]
Graphs = Annotated[
    bool, typer.Option("--graphs", help="Replay whole batches as CUDA graphs: for small networks on NVIDIA GPUs.")
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]


class Progress:
    """On a terminal's stderr a bar per run, a bar per cell and a table that fills in; elsewhere a line per cell.

    table: makes the table of what is known so far; None shows none.
    """

    def __init__(
        self, cells: int, quiet: bool = False, log: Path | None = None, table: Callable[[], Any] | None = None
    ) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self.console = console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self.quiet, self.cells, self.finished = quiet, cells, 0
        self.announced = False
        self.bars = Bars(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.table = table if self.live and cells > 1 else None
        self.log = None if quiet else log
        self.all = self.bars.add_task("cells", total=cells, visible=cells > 1, rate="")

    @contextmanager
    def running(self) -> Iterator[Progress]:
        """While the cells run."""
        if self.table is None:
            with self.bars:
                yield self
            return
        from rich.live import Live

        with Live(get_renderable=self._screen, console=self.console, transient=True, refresh_per_second=4):
            yield self

    def _screen(self) -> Any:
        from rich.console import Group

        assert self.table is not None
        return Group(self.table(), self.bars)

    @contextmanager
    def cell(self, title: str, steps: int | None, n: int, batch_size: int) -> Iterator[Any]:
        """While one cell runs: gives the driver's on_step."""
        batches = -(-n // batch_size)
        total = None if steps is None else steps * batches
        task = self.bars.add_task(printable(title), total=total, rate="")
        started, taken = time.monotonic(), 0

        def on_step(_: int, step: Step) -> None:
            nonlocal taken
            taken += 1
            rate = ""
            if steps is not None:
                rate = f"{taken / steps * min(batch_size, n) / max(time.monotonic() - started, 1e-9):.0f} images/s"
            self.bars.update(task, advance=1, rate=rate)

        try:
            yield on_step
        finally:
            self.bars.remove_task(task)

    @contextmanager
    def solution(self, images: int) -> Iterator[Any]:
        """While the converged solution of so many images is computed: gives the driver's on_step.

        How many steps the solver will take is not known; the level that it has reached is shown. Without a terminal
        the first solution of a run is announced by a line.
        """
        title = f"converged solution for {images} image{'' if images == 1 else 's'}"
        if not (self.live or self.quiet or self.announced):
            say(f"computing the {title}; cells under the same guidance share it", error=True)
        self.announced = True
        task = self.bars.add_task(title, total=None, rate="")

        def on_step(_: int, step: Step) -> None:
            self.bars.update(task, advance=1, rate=f"σ = {step.sigma:.3g}")

        try:
            yield on_step
        finally:
            self.bars.remove_task(task)

    def done(self, line: str) -> None:
        """A cell has finished."""
        self.finished += 1
        line = one_line(line)
        if self.log is not None:
            from datetime import UTC, datetime

            from samplerbench.results.files import append_line

            # The log is a convenience: a disk that takes no more of it must not stop the run. A link is not followed.
            with contextlib.suppress(OSError):
                append_line(self.log, f"{datetime.now(UTC).isoformat(timespec='seconds')}  {line}")
        self.bars.advance(self.all)
        if not self.quiet and self.table is None:
            count = f"[{self.finished}/{self.cells}] " if self.cells > 1 else ""
            say(count + line, error=True) if not self.live else self.console.print(count + line)


Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the results: a JSON file and a grid PNG per cell.")]


class Interrupts:
    """Ctrl-C once: finish what is being done up to the next checkpoint, then stop. Twice: stop now.

    quiet: print nothing, as one of several processes.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.count, self.quiet = 0, quiet

    def asked(self) -> bool:
        """Whether Ctrl-C has been pressed."""
        return self.count > 0

    def __enter__(self) -> Interrupts:
        import signal
        import threading

        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        import signal

        if self.main:
            signal.signal(signal.SIGINT, self.before)

    def _on_signal(self, *_: object) -> None:
        self.count += 1
        if self.count > 1:
            raise KeyboardInterrupt
        if not self.quiet:
            note("stopping at the next checkpoint; Ctrl-C again stops now.", gap=True)
