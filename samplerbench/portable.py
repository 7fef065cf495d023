"""File operations and child processes that behave in the same way on Linux, macOS and Windows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

WINDOWS = os.name == "nt"
"""Whether this is Windows."""

BUSY = {5, 32, 33}
"""Windows errors ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION and ERROR_LOCK_VIOLATION: another process has the file
open, for example a virus scanner."""

DELAYS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
"""Seconds between two attempts at a file that is busy."""


def retry(operation: Callable[[], T]) -> T:
    """Call a file operation, and repeat it while Windows reports that another process has the file open.

    On other systems the operation is called once: a PermissionError there is permanent.

    Args:
        operation: the operation.

    Returns:
        Its result.

    Raises:
        OSError: the error of the operation; of the last attempt, if the file stays busy.
    """
    for delay in DELAYS:
        try:
            return operation()
        except PermissionError as error:
            if getattr(error, "winerror", None) not in BUSY:
                raise
        time.sleep(delay)
    return operation()


def replace_file(source: str | Path, target: str | Path) -> None:
    """Rename a closed file, and replace the target if it exists. Raises OSError."""
    retry(lambda: os.replace(source, target))


def remove_file(file: str | Path) -> None:
    """Remove a closed file, if it exists. Raises OSError."""
    retry(lambda: Path(file).unlink(missing_ok=True))


def new_session() -> dict[str, Any]:
    """Arguments of `subprocess.Popen` for a child process that Ctrl-C does not reach."""
    if WINDOWS:
        return {"creationflags": getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)}
    return {"start_new_session": True}


def end_session(child: subprocess.Popen[bytes]) -> None:
    """Kill a child process that was started with `new_session`, and its own child processes; then wait for it.

    Args:
        child: the process.
    """
    if not WINDOWS:
        with suppress(OSError):  # it has ended
            os.killpg(child.pid, signal.SIGKILL)
    else:
        import psutil

        with suppress(psutil.Error):
            for process in psutil.Process(child.pid).children(recursive=True):
                with suppress(psutil.Error):
                    process.kill()
    child.kill()
    child.wait()


class Replaced(SystemExit):
    """The end of a process after the program that took its place. The code is that of the program."""


def replace_process(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Run another program in place of this one.

    On Windows, exec starts the program and returns to the shell at once. There the program runs as a child process, and
    this process ends with its exit code. Ctrl-C reaches both; this process waits for the other.

    Args:
        command: the words of the command line; the first is the path of the program.
        environment: the environment variables.

    Raises:
        Replaced: the program has ended (Windows).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if not WINDOWS:
        os.execve(command[0], list(command), dict(environment))
    child = subprocess.Popen(list(command), env=dict(environment))
    while True:
        with suppress(KeyboardInterrupt):
            raise Replaced(child.wait())


def leave(code: int) -> NoReturn:
    """End this process at once, after flushing its streams. No other clean-up is done.

    For a process of a distributed run after a failed exchange: a normal exit destroys torch's process groups, whose
    threads wait for processes that no longer exist, and the process would hang or abort. `os._exit` exists on every
    system. Such a process holds no lease and no open file: those are the main process's.

    Args:
        code: the exit code.
    """
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # a closed stream, or none
            stream.flush()
    os._exit(code)
