"""A matplotlib figure that a notebook displays."""

from __future__ import annotations

import io
from typing import Any

import matplotlib
from matplotlib.figure import Figure


class NotebookFigure(Figure):
    """A figure that a notebook displays as the value of a cell, even if pyplot was never imported.

    matplotlib itself registers its figures with IPython only when pyplot is imported.

    Args:
        settings: rcParams to draw with.
        **options: arguments of `matplotlib.figure.Figure`.
    """

    def __init__(self, settings: dict[Any, Any], **options: Any) -> None:
        super().__init__(**options)
        self._settings = settings

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        with matplotlib.rc_context(self._settings):
            self.savefig(buffer, format="png", dpi=100, bbox_inches="tight")
        return buffer.getvalue()
