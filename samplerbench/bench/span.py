"""Measurement of time on a device."""

from __future__ import annotations

import time

import torch


class Span:
    """Measures the time of a part of a run. On a GPU it uses CUDA events, which do not synchronise the device.

    Args:
        device: The device on which the part runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: list[torch.cuda.Event] = []
        self._seconds, self._begun = 0.0, time.perf_counter()
        if device.type == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self._events[0].record()

    def stop(self) -> Span:
        """End the measurement and return the span."""
        if self._events:
            self._events[1].record()
        else:
            self._seconds = time.perf_counter() - self._begun
        return self

    @property
    def seconds(self) -> float:
        """Length in seconds, after `stop`. On a GPU, this waits until the device has reached the end of the span."""
        if not self._events:
            return self._seconds
        self._events[1].synchronize()
        return self._events[0].elapsed_time(self._events[1]) / 1000
