"""Progress bars in notebooks."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from samplerbench.progress import Progress
from samplerbench.text import one_line, printable, show_sigma

if TYPE_CHECKING:
    from samplerbench.sampling import Step


def in_notebook() -> bool:
    """Whether the code runs in a notebook, such as Jupyter or Colab."""
    from rich.console import Console

    return Console().is_jupyter


def progress_bars(cells: int, quiet: bool = False) -> Progress | NotebookProgress:
    """The progress display for a number of cells: tqdm in a notebook, otherwise rich or plain lines."""
    return NotebookProgress(cells, quiet) if in_notebook() else Progress(cells, quiet=quiet)


class NotebookProgress:
    """Progress bars for all cells and for the current cell. Uses widgets if ipywidgets is installed, else text.

    The interface is that of `samplerbench.progress.Progress`.

    Args:
        cells: number of cells.
        quiet: show nothing.
    """

    def __init__(self, cells: int, quiet: bool = False) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tqdm warns if ipywidgets is missing
            from tqdm.auto import tqdm
        self._bar: Any = tqdm
        self.cells, self.quiet = cells, quiet
        self.all: Any = None

    @contextmanager
    def running(self) -> Iterator[NotebookProgress]:
        """Context manager for the whole run."""
        hidden = self.quiet or self.cells == 1
        with self._bar(total=self.cells, desc="cells", unit="cell", disable=hidden) as self.all:
            yield self

    @contextmanager
    def cell(self, title: str, steps: int | None, n: int, batch_size: int, blocks: int = 1) -> Iterator[Any]:
        """Context manager for one cell. Yields the callback `on_step` of the driver."""
        total = None if steps is None else steps * blocks * -(-n // batch_size)
        begun, taken = time.monotonic(), 0
        with self._bar(
            total=total, desc=printable(title), unit="step", leave=self.cells == 1, disable=self.quiet
        ) as bar:

            def on_step(_: int, step: Step) -> None:
                nonlocal taken
                taken += 1
                if steps is not None:
                    rate = taken / steps * min(batch_size, n) / max(time.monotonic() - begun, 1e-9)
                    bar.set_postfix_str(f"{rate:.0f} images/s", refresh=False)
                bar.update()

            yield on_step

    @contextmanager
    def solution(self, images: int, total: int) -> Iterator[Any]:
        """Context manager for the computation of a converged solution. Yields the callback `on_step` of the driver."""
        count = f"{images}" if images == total else f"{images} of {total}"
        with self._bar(desc=f"converged solution, {count} images", unit="step", leave=False, disable=self.quiet) as bar:

            def on_step(_: int, step: Step) -> None:
                bar.set_postfix_str(show_sigma(step.sigma), refresh=False)
                bar.update()

            yield on_step

    def done(self, line: str) -> None:
        """Report a finished cell. If it failed, print the reason."""
        if ": failed: " in line and not self.quiet:
            self.all.write(one_line(line))
        self.all.update()
