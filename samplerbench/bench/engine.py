"""The engine: runs cells, one after the other, and keeps what is finished."""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from samplerbench.bench.cell import Cell
from samplerbench.bench.cell_run import CellRun, describe
from samplerbench.bench.generate import Batched, generate, prepare
from samplerbench.bench.plan import Unmet, most_steps, plan
from samplerbench.bench.session import Execution, Measurement, Session
from samplerbench.boundary import isolated
from samplerbench.errors import SamplerbenchError
from samplerbench.results.partial import PARTIAL
from samplerbench.results.seal import digest
from samplerbench.results.timings import combine, under
from samplerbench.sampling.driver import OnStep


@dataclass
class Outcome:
    """What became of a cell.

    Attributes:
        cell: the cell.
        record: its result as written; of a cell that failed, what is known besides, with "error".
        error: why it failed; None where it did not.
        reused: whether the result was there already.
        trace: the traceback of the error, with those that caused it; "" unless SAMPLERBENCH_DEBUG is set.
    """

    cell: Cell
    record: dict[str, Any]
    error: SamplerbenchError | None = None
    reused: bool = False
    trace: str = ""


def run_cell(session: Session, cell: Cell, on_step: OnStep | None = None) -> Outcome:
    """Run one cell, or take its result from the store. A cell that fails is an outcome too.

    The cell is claimed while it runs, so another run on the same folder waits for it instead of doing it again.

    Raises:
        Stopped: the session's `stop` asked for it; the last checkpoint remains. Ctrl-C is not caught either.
    """
    fields = session.measurement.protocol(cell)
    key = digest(fields)
    store, team = session.execution.store, session.execution.team
    with store.claim(key) if team.main else nullcontext(), isolated():
        return _run_claimed(session, cell, key, fields, on_step)


def _run_claimed(session: Session, cell: Cell, key: str, fields: dict[str, Any], on_step: OnStep | None) -> Outcome:
    store, team = session.execution.store, session.execution.team
    found = team.tell(None if session.execution.rerun or not team.main else store.get(key))
    if found is not None:
        # A time of other conditions (another batch size or device) is not this run's.
        return Outcome(cell, under(found, session.conditions) | {"budget": cell.budget}, reused=True)
    try:
        run = CellRun(session, cell, key, on_step)
        run.resume()
        record = run.finish() | {"protocol": key, "protocol_fields": fields}
        failure: SamplerbenchError | None = None
        if team.main:
            try:
                # The values of an earlier run stay, so that each of its times is still of what it stands beside.
                record = combine(store.get(key) if session.execution.rerun else None, record)
                store.put(record)
            except SamplerbenchError as error:
                failure = error
        team.agree(failure)
    except SamplerbenchError as error:
        failed = {**describe(session, cell), "metrics": {}, "error": str(error), "protocol": key}
        failed["protocol_fields"] = fields
        trace = "".join(traceback.format_exception(error)) if os.environ.get("SAMPLERBENCH_DEBUG") else ""
        # The outcome keeps the error, whose frames would keep the failed batch while the other cells run.
        for kept in _chain(error):
            traceback.clear_frames(kept.__traceback__)
        return Outcome(cell, failed, error=error, trace=trace)
    if team.main:
        with suppress(OSError):  # what lies there and is no file is not ours
            store.path(key, PARTIAL).unlink(missing_ok=True)
    return Outcome(cell, under(record, session.conditions))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that caused it or were being handled."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__cause__, one.__context__]


def is_claimed(session: Session, cell: Cell) -> bool:
    """Whether another run is at work on the cell right now."""
    key = digest(session.measurement.protocol(cell))
    return session.execution.team.tell(session.execution.store.is_claimed(key))


__all__ = [
    "Batched",
    "Cell",
    "Execution",
    "Measurement",
    "Outcome",
    "Session",
    "Unmet",
    "generate",
    "is_claimed",
    "most_steps",
    "plan",
    "prepare",
    "run_cell",
]
