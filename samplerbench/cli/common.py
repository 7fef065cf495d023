"""Options that several commands share, and what they have in common when they run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="`balanced` as in the data, `none`, or one label. Default: balanced, if there are classes.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**64 - 1, help="Sample i is a function of seed and i alone.")]
BatchSize = Annotated[int, typer.Option("--batch-size", "-b", min=1, help="Images at a time; changes no image.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Of the network: fp32, bf16, fp16 or fp64; the state keeps fp32.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, …")]


class Progress:
    """A bar per run and a bar per cell on a terminal's stderr; one line per finished cell elsewhere."""

    def __init__(self, cells: int, quiet: bool = False, log: Path | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        self.console = Console(stderr=True)
        self.live = self.console.is_terminal and not quiet
        self.quiet, self.cells, self.finished = quiet, cells, 0
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.live,
        )
        self.log = None if quiet else log
        self.all = self.bars.add_task("cells", total=cells, visible=cells > 1)

    @contextmanager
    def running(self) -> Iterator[Progress]:
        """While the cells run."""
        with self.bars:
            yield self

    @contextmanager
    def cell(self, title: str, steps: int | None, n: int, batch_size: int) -> Iterator[Any]:
        """While one cell runs: gives the driver's on_step."""
        batches = -(-n // batch_size)
        total = None if steps is None else steps * batches
        task = self.bars.add_task(title, total=total)

        def on_step(_: int, step: Step) -> None:
            self.bars.advance(task)

        yield on_step
        self.bars.remove_task(task)

    def done(self, line: str) -> None:
        """A cell has finished."""
        self.finished += 1
        if self.log is not None:
            from datetime import UTC, datetime

            # The log is a convenience: a disk that takes no more of it must not stop the run.
            with contextlib.suppress(OSError), open(self.log, "a", encoding="utf-8") as stream:
                stream.write(f"{datetime.now(UTC).isoformat(timespec='seconds')}  {line}\n")
        self.bars.advance(self.all)
        if not self.quiet:
            count = f"[{self.finished}/{self.cells}] " if self.cells > 1 else ""
            print(count + line, file=sys.stderr) if not self.live else self.console.print(
                count + line, markup=False, highlight=False
            )


Out = Annotated[Path, typer.Option("--out", "-o", help="Folder of the results: a JSON file and a grid PNG per cell.")]


class Interrupts:
    """Ctrl-C once: finish what is being done up to the next checkpoint, then stop. Twice: stop now."""

    def __init__(self) -> None:
        self.count = 0

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
        print("\nsamplerbench: stopping at the next checkpoint; Ctrl-C again stops now.", file=sys.stderr)
