"""The engine: runs cells and stores their results."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from samplerbench.bench.cell import Cell
from samplerbench.bench.cell_run import CellRun, describe
from samplerbench.bench.generate import Batched, generate, prepare
from samplerbench.bench.plan import Unmet, most_steps, plan
from samplerbench.bench.session import Execution, Measurement, Session
from samplerbench.boundary import isolated
from samplerbench.errors import LostProcess, SamplerbenchError, Stopped, message_of
from samplerbench.portable import remove_file
from samplerbench.results.claims import Claimed, ClaimLost, Lease, Waiting
from samplerbench.results.partial import PARTIAL
from samplerbench.results.seal import digest
from samplerbench.results.timings import combine, under
from samplerbench.sampling.driver import OnStep


@dataclass
class Outcome:
    """The outcome of a cell.

    Attributes:
        cell: The cell.
        record: The record as stored. For a failed cell, the known fields and "error".
        error: The error of a failed cell, or None.
        reused: Whether the result was already in the store.
        trace: Traceback of the error and of its causes. Empty unless SAMPLERBENCH_DEBUG is set.
    """

    cell: Cell
    record: dict[str, Any]
    error: SamplerbenchError | None = None
    reused: bool = False
    trace: str = ""


def under_budgets(outcome: Outcome, cells: Sequence[Cell]) -> list[Outcome]:
    """Return one outcome per cell for cells that differ only in their budget (`Prepared.runs`).

    Args:
        outcome: Outcome of the cell that was run.
        cells: The cells.

    Returns:
        The outcomes, in the order of `cells`.
    """
    return [replace(outcome, cell=cell, record=outcome.record | {"budget": cell.budget}) for cell in cells]


def run_cell(session: Session, cell: Cell, on_step: OnStep | None = None, wait: bool = True) -> Outcome:
    """Run one cell, or load its result from the store.

    The run claims the cell. Another run on the same folder waits for the result instead of computing it again. An error
    in the cell does not raise: it is part of the outcome. KeyboardInterrupt is not caught.

    Args:
        session: The measurement and how it is executed.
        cell: The cell.
        on_step: Called after each step of the sampler.
        wait: Whether to wait if another run has claimed the cell.

    Returns:
        The outcome.

    Raises:
        Claimed: If another run has claimed the cell and `wait` is false.
        Stopped: If `stop` of the session returns true. The last checkpoint remains.
        LostProcess: If another process of the team has ended. The last checkpoint remains.
    """
    fields = session.measurement.protocol(cell)
    key = digest(fields)
    say = session.execution.say if session.execution.team.main else _silent
    while True:
        lease = None
        try:
            cell.check()
            if (done := _finished(session, cell, key)) is not None:
                return done
            lease = _claim(session, cell, key, wait)
            # Another run may have finished the cell in the meantime.
            if (done := _finished(session, cell, key)) is not None:
                return done
            with isolated():
                return _run_claimed(session, cell, key, fields, on_step, lease)
        except ClaimLost as error:
            say(f"{cell.title}: {error}. The other run continues with this cell.")
        except LostProcess:
            raise
        except SamplerbenchError as error:
            return _failed(session, cell, key, error, fields)
        finally:
            if lease is not None:
                lease.release()


def _finished(session: Session, cell: Cell, key: str) -> Outcome | None:
    """Return the result of the cell from the store, or None if there is none or `rerun` is set."""
    store, team, rerun = session.execution.store, session.execution.team, session.execution.rerun
    record = team.tell(None if rerun or not team.main else store.get(key))
    if record is None:
        return None
    # Times that were measured under other conditions (batch size, device) do not apply to this run.
    return Outcome(cell, under(record, session.conditions) | {"budget": cell.budget}, reused=True)


def _claim(session: Session, cell: Cell, key: str, wait: bool) -> Lease | None:
    """Claim a cell for all processes of the team. Return the lease on the main process, None on the others.

    All processes wait together, so that no process waits in a collective operation until it times out.
    """
    execution = session.execution
    team, claims = execution.team, execution.store.claims
    waiting = Waiting(execution.say, cell.title, claims.timing)
    while True:
        lease, failure, pause = None, None, 0.0
        try:
            if team.main:
                try:
                    lease = claims.take(key)
                except SamplerbenchError as error:
                    failure = error
            team.agree(failure)
            held, stopped = team.tell((lease is not None, execution.stop()))
            if held:
                if lease is not None and lease.before is not None:
                    execution.say(f"{cell.title}: taken over from {lease.before}, which {lease.reason}.")
                return lease
        except BaseException:
            if lease is not None:
                lease.release()
            raise
        if not wait:
            raise Claimed
        if stopped:
            raise Stopped
        if team.main:
            pause = waiting.pause(claims.holder(key))
        time.sleep(team.tell(pause))


def _run_claimed(
    session: Session, cell: Cell, key: str, fields: dict[str, Any], on_step: OnStep | None, lease: Lease | None
) -> Outcome:
    store, team = session.execution.store, session.execution.team
    run = CellRun(session, cell, key, on_step)
    run.lease = lease
    run.resume()
    record = run.finish() | {"protocol": key, "protocol_fields": fields}
    failure: SamplerbenchError | None = None
    if team.main:
        try:
            if lease is not None:
                lease.check()
            # The values of an earlier run are kept, so that its times still belong to the values in the same record.
            record = combine(store.get(key) if session.execution.rerun else None, record)
            store.put(record)
        except SamplerbenchError as error:
            failure = error
    team.agree(failure)
    if team.main:
        with suppress(OSError):  # a directory of this name was not created by samplerbench
            remove_file(store.path(key, PARTIAL))
    return Outcome(cell, under(record, session.conditions))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, its causes and its contexts."""
    seen: set[int] = set()
    left: list[BaseException | None] = [error]
    while left:
        one = left.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            left += [one.__cause__, one.__context__]


def _failed(session: Session, cell: Cell, key: str, error: SamplerbenchError, fields: dict[str, Any]) -> Outcome:
    failed = {
        **describe(session, cell),
        "metrics": {},
        "error": message_of(error),
        "protocol": key,
        "protocol_fields": fields,
    }
    trace = "".join(traceback.format_exception(error)) if os.environ.get("SAMPLERBENCH_DEBUG") else ""
    # The outcome keeps the error. Its frames would keep the failed batch in memory while other cells run.
    for kept in _chain(error):
        traceback.clear_frames(kept.__traceback__)
    return Outcome(cell, failed, error=error, trace=trace)


def _silent(_: str) -> None:
    pass


__all__ = [
    "Batched",
    "Cell",
    "Claimed",
    "Execution",
    "Measurement",
    "Outcome",
    "Session",
    "Unmet",
    "generate",
    "most_steps",
    "plan",
    "prepare",
    "run_cell",
    "under_budgets",
]
