"""Measurement of peak memory on the device and on the host."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil
import torch

INTERVAL = 0.005
"""Seconds between two readings of the host memory."""


class PeakMemory:
    """Measures the peak memory of a part of a program. Use it as a context manager.

    On the device, it is the maximum that tensors occupied. Memory that tensors already occupied at the start counts,
    except for `kept`. On the host, it is the maximum resident memory of the process, read by a thread every 5 ms on
    every system. The process may keep memory that an earlier part has freed; it then counts too.

    Args:
        device: The device.
        kept: Bytes on the device that belong to other parts and are subtracted.

    Attributes:
        device_bytes: Peak memory on the GPU. None on a CPU.
        host_bytes: Peak resident memory of the process.
    """

    def __init__(self, device: torch.device, kept: int = 0) -> None:
        self.device, self.kept = device, kept
        self.device_bytes: int | None = None
        self.host_bytes = 0
        self._process = psutil.Process()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="samplerbench-memory", daemon=True)

    def __enter__(self) -> PeakMemory:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._read()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._read()
        if self.device.type == "cuda":
            self.device_bytes = max(0, torch.cuda.max_memory_allocated(self.device) - self.kept)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._read()

    def _read(self) -> None:
        self.host_bytes = max(self.host_bytes, self._process.memory_info().rss)


def allocated(device: torch.device) -> int:
    """Return the bytes that tensors occupy on a GPU. 0 for a CPU.

    Args:
        device: The device.
    """
    return int(torch.cuda.memory_allocated(device)) if device.type == "cuda" else 0
