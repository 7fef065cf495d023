"""Time spent on a device."""

from __future__ import annotations

import time

import torch


class Span:
    """How long a part of a run takes: by the clock on the CPU; on a GPU by events, so that nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._seconds, self._begun = 0.0, time.perf_counter()
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()

    def stop(self) -> Span:
        """It ends here."""
        if self._events:
            self._events[1].record()
        else:
            self._seconds = time.perf_counter() - self._begun
        return self

    @property
    def seconds(self) -> float:
        """Its length, once it was stopped. Of a GPU it waits until the span is over."""
        if not self._events:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000
