"""Progress of a run in a terminal: progress bars, a live table, one line per finished cell, and a log file."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from samplerbench.text import console, one_line, printable, say, show_sigma

if TYPE_CHECKING:
    from samplerbench.sampling import Step


class Progress:
    """Progress display. On a terminal, progress bars and a live table on stderr; otherwise one line per cell.

    Args:
        cells: number of cells.
        quiet: print nothing.
        log: log file, one line per finished cell; None for no log.
        table: creates the table of the results so far; None for no table.
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
        """Context manager for the whole run."""
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
    def cell(self, title: str, steps: int | None, n: int, batch_size: int, blocks: int = 1) -> Iterator[Any]:
        """Context manager for one cell. Yields the callback `on_step` of the driver."""
        total = None if steps is None else steps * blocks * -(-n // batch_size)
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
    def solution(self, images: int, total: int) -> Iterator[Any]:
        """Context manager for the computation of a converged solution. Yields the callback `on_step` of the driver.

        The number of steps of the adaptive solver is unknown, so the bar shows its current noise level. Without a
        terminal, one line is printed before the first solution of a run.

        Args:
            images: number of images of this solution.
            total: number of images of all solutions of the run.
        """
        if not (self.live or self.quiet or self.announced):
            count = f"{total} image{'' if total == 1 else 's'}"
            say(f"computing the converged solution for {count}; cells with the same guidance share it", error=True)
        self.announced = True
        title = f"converged solution for {images if images == total else f'{images} of {total}'} images"
        task = self.bars.add_task(title, total=None, rate="")

        def on_step(_: int, step: Step) -> None:
            self.bars.update(task, advance=1, rate=show_sigma(step.sigma))

        try:
            yield on_step
        finally:
            self.bars.remove_task(task)

    def done(self, line: str) -> None:
        """Report a finished cell."""
        self.finished += 1
        line = one_line(line)
        if self.log is not None:
            from datetime import UTC, datetime

            from samplerbench.results.files import append_line

            # The log is optional: a full disk must not stop the run here. Links are not followed.
            with contextlib.suppress(OSError):
                append_line(self.log, f"{datetime.now(UTC).isoformat(timespec='seconds')}  {line}")
        self.bars.advance(self.all)
        if not self.quiet and self.table is None:
            count = f"[{self.finished}/{self.cells}] " if self.cells > 1 else ""
            say(count + line, error=True) if not self.live else self.console.print(count + line)
