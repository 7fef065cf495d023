"""The latency of candidates: stored where it was measured before, otherwise measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from samplerbench import registry
from samplerbench.bench.cell import Cell
from samplerbench.bench.latency import REPEATS, WARMUP, measure_latency
from samplerbench.bench.prepare import prepare
from samplerbench.bench.request import Grid, Request
from samplerbench.bench.session import dtype_name
from samplerbench.errors import RunError, UserError, argument
from samplerbench.models.model import Model
from samplerbench.models.runner import how_run
from samplerbench.results.latency import Latency, add_latencies, read_latencies
from samplerbench.results.store import Store
from samplerbench.results.timings import describe_conditions
from samplerbench.sampling import Sampler
from samplerbench.sampling.guidance import evaluations_of
from samplerbench.tuning.space import Candidate, Space

FIRST = 4
"""Number of evaluations of D whose latency is measured first, to find out how many fit into a time."""
PROBES = 5
"""Largest number of latencies that are measured to find that out."""
MOST = 1000
"""Largest number of network evaluations that a budget of time is converted to."""


@dataclass
class Clock:
    """Measures the latency of candidates at one batch size, on the device and in the precision of a model.

    Latencies in the folder of results are used if model, weights, precision, device, threads and batch size are equal.
    New ones are added to it.

    Args:
        request: the model, with everything that the cells have in common.
        model: the loaded model.
        device: name of the device.
        store: folder of results.
        batch_size: images per batch.
        repeats: number of measured batches of each candidate.
        say: called with a line about each measurement.

    Attributes:
        measured: number of latencies that were measured.
        reused: number of stored latencies that were used.
    """

    request: Request
    model: Model
    device: str
    store: Store
    batch_size: int
    repeats: int = REPEATS
    say: Callable[[str], None] = lambda line: None
    measured: int = field(init=False, default=0)
    reused: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        same = [latency for latency in read_latencies(self.store.folder) if self._comparable(latency)]
        self._stored = {_cell(latency): latency for latency in same}
        self._used: dict[tuple[Any, ...], Latency] = {}

    def _comparable(self, latency: Latency) -> bool:
        model, how = self.model, how_run(self.model.network)
        name = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else ""
        expected = {
            "model": str(model.identity["source"]),
            "weights": str(model.identity.get("weights") or ""),
            "dtype": dtype_name(model),
            "batch_size": self.batch_size,
            "device": str(model.device),
            "device_name": name,
            "threads": torch.get_num_threads(),
            "compile": how.compiled,
            "graphs": how.graphs,
            "memory": how.memory,
        }
        return all(getattr(latency, field) == value for field, value in expected.items())

    def latency(self, candidate: Candidate, nfe: int) -> Latency:
        """The latency of a candidate.

        Args:
            candidate: the candidate.
            nfe: its budget, in network evaluations per image.

        Raises:
            UserError: if the candidate cannot be run.
            RunError: if it fails.
        """
        grid = Grid([candidate.sampler], [], [nfe], [candidate.guidance], [candidate.spacing])
        prepared = prepare(self.request.replace(grids=(grid,)), self.device, self.model)
        if not prepared.cells:
            raise UserError(str(prepared.unmet[0].record["unmet"]))
        cell = prepared.cells[0]
        key = _key(cell)
        if key in self._used:
            return self._used[key]
        if key in self._stored:
            self.reused += 1
        else:
            self.say(f"latency of {candidate.label}, {nfe} evaluations")
            outcome = measure_latency(prepared, [self.batch_size], self.repeats, WARMUP)[0]
            if outcome.latency is None:
                raise outcome.error or RunError("the latency could not be measured.")
            self._stored[key] = outcome.latency
            self.measured += 1
            add_latencies(self.store.folder, [outcome.latency])
        self._used[key] = self._stored[key]
        return self._stored[key]

    def known(self, cell: Cell) -> Latency | None:
        """The latency of a cell if it is stored or measured."""
        return self._stored.get(_key(cell))

    @property
    def conditions(self) -> str:
        """The conditions of the latencies: `cpu, 2 threads, batches of 1`."""
        return describe_conditions(next(iter(self._used.values())).conditions) if self._used else ""

    def evaluations_within(self, space: Space, milliseconds: float) -> dict[str | None, int]:
        """The number of network evaluations that fit into a time per image, for the name of each guidance.

        It is measured with the first sampler that can be run. The next number to measure is on the line through the
        last two latencies, until a number repeats.

        Args:
            space: the candidates.
            milliseconds: time per image.

        Raises:
            UserError: if no evaluation fits.
        """
        within: dict[str | None, int] = {}
        least = math.inf
        for guidance in space.guidances:
            timed = self._timed(space.samplers, guidance, milliseconds)
            fitting = [nfe for nfe, latency in timed.items() if latency <= milliseconds]
            least = min(least, min(timed.values()))
            if fitting:
                within[None if guidance is None else registry.split(guidance)[0]] = max(fitting)
        if not within:
            raise UserError(
                f"{argument('budget', f'{milliseconds:g}ms')}: one evaluation takes {least:.3g} ms per image with "
                f"{argument('batch_size', self.batch_size)}; give a larger budget or batch size."
            )
        return within

    def _rows(self, guidance: str | None) -> int:
        """Network evaluations per evaluation of D."""
        if guidance is None:
            return self.model.rows_per_evaluation
        return evaluations_of(registry.parse("guidance", guidance))

    def _timed(self, samplers: Sequence[str], guidance: str | None, milliseconds: float) -> dict[int, float]:
        """Milliseconds per image of some numbers of network evaluations around those that fit."""
        rows, error = self._rows(guidance), None
        for sampler in sorted(samplers, key=_is_bound):  # a stable sort
            timed: dict[int, float] = {}
            nfe = FIRST * rows
            try:
                while nfe not in timed and len(timed) < PROBES:
                    timed[nfe] = self.latency(Candidate(sampler, guidance), nfe).ms_per_image
                    nfe = min(max(_next(timed, milliseconds), rows), MOST)
                if min(timed.values()) > milliseconds and rows not in timed:
                    timed[rows] = self.latency(Candidate(sampler, guidance), rows).ms_per_image
            except (UserError, RunError) as problem:
                error = error or problem
                continue
            return timed
        raise error or UserError("no latency could be measured.")


def _is_bound(sampler: str) -> bool:
    """Whether a sampler prepares itself for a model, which takes time that is not that of sampling."""
    return type(registry.parse("sampler", sampler)).bind is not Sampler.bind


def _next(timed: Mapping[int, float], milliseconds: float) -> int:
    """The number of evaluations that should take a time, from the last two latencies, or in proportion to the only one.

    Args:
        timed: milliseconds per image by the number of evaluations, in the order of measurement.
        milliseconds: the time.
    """
    (nfe, latency), *before = list(timed.items())[::-1]
    if before and (latency - before[0][1]) / (nfe - before[0][0]) > 0:
        slope = (latency - before[0][1]) / (nfe - before[0][0])
        return math.floor(nfe + (milliseconds - latency) / slope + 1e-6)
    return math.floor(nfe * milliseconds / latency + 1e-6)


def _key(cell: Cell) -> tuple[Any, ...]:
    guidance = None if cell.guidance is None else cell.guidance.spec
    return (cell.method.spec, guidance, None if cell.spacing is None else cell.spacing.spec, cell.steps)


def _cell(latency: Latency) -> tuple[Any, ...]:
    return (latency.sampler, latency.guidance, latency.spacing, latency.steps)


__all__ = ["Clock"]
