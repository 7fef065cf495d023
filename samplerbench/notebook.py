"""Progress in a notebook: bars that a notebook can draw, where a terminal's cannot be."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from samplerbench.progress import Progress
from samplerbench.text import one_line, printable

if TYPE_CHECKING:
    from samplerbench.sampling import Step


def in_notebook() -> bool:
    """Whether this is Jupyter, Colab or another that shows what a cell gives."""
    from rich.console import Console

    return Console().is_jupyter


def progress_bars(cells: int, quiet: bool = False) -> Progress | NotebookProgress:
    """What shows the progress of so many cells: tqdm's bars in a notebook, rich's bars or lines elsewhere."""
    return NotebookProgress(cells, quiet) if in_notebook() else Progress(cells, quiet=quiet)


class NotebookProgress:
    """A bar for all cells and one for the cell at work, as widgets where ipywidgets is installed, else as text.

    It has the interface of `samplerbench.progress.Progress`.
    """

    def __init__(self, cells: int, quiet: bool = False) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that there are no widgets: text does as well
            from tqdm.auto import tqdm
        self._bar: Any = tqdm
        self.cells, self.quiet = cells, quiet
        self.all: Any = None

    @contextmanager
    def running(self) -> Iterator[NotebookProgress]:
        """While the cells run."""
        hidden = self.quiet or self.cells == 1
        with self._bar(total=self.cells, desc="cells", unit="cell", disable=hidden) as self.all:
            yield self

    @contextmanager
    def cell(self, title: str, steps: int | None, n: int, batch_size: int) -> Iterator[Any]:
        """While one cell runs: gives the driver's on_step."""
        total = None if steps is None else steps * -(-n // batch_size)
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
        """While the converged solution of so many images, of `total` in the run, is computed: gives on_step."""
        count = f"{images}" if images == total else f"{images} of {total}"
        with self._bar(desc=f"converged solution, {count} images", unit="step", leave=False, disable=self.quiet) as bar:

            def on_step(_: int, step: Step) -> None:
                bar.set_postfix_str(f"σ = {step.sigma:.3g}", refresh=False)
                bar.update()

            yield on_step

    def done(self, line: str) -> None:
        """A cell has finished; one that failed says why."""
        if ": failed: " in line and not self.quiet:
            self.all.write(one_line(line))
        self.all.update()
