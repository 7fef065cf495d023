"""The errors a user can cause. Each is one line that says what is wrong and what to do about it."""

from __future__ import annotations


class SamplerbenchError(Exception):
    """Base of all errors shown as one line; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(SamplerbenchError, ValueError):
    """Bad input: an unknown name, a value out of range, a missing file. Exit code 2."""

    exit_code = 2


class RunError(SamplerbenchError, RuntimeError):
    """A run that started and failed: a NaN, a plugin that raised, no memory left. Exit code 1."""

    exit_code = 1


class OutOfMemoryError(RunError):
    """The device has no memory for this batch size. Bad input, since a smaller batch would do: exit code 2."""

    exit_code = 2


class LostProcess(RunError):  # noqa: N818 - the process is lost, not the error
    """Another process of a run on several has ended. No cell can go on, and what is finished is kept."""


class Stopped(Exception):  # noqa: N818 - it is no error
    """An orderly stop that the user asked for: no error, and no cell has failed. The last checkpoint remains."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the machine has no memory left (torch raises several types)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if not isinstance(error, RuntimeError):
        return False
    try:
        return "allocate memory" in str(error)
    except BaseException as raised:  # a message of a plugin's own exception
        if isinstance(raised, KeyboardInterrupt):
            raise
        return False
