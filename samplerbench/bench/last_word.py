"""A message after the output of a launcher, if a process of a run ends unexpectedly.

When a process ends, torchrun and `accelerate launch` end the other processes and print a report. The user should see
last how to continue. The main process therefore starts a helper process in its own session, which waits on a pipe. If
the main process ends normally, it writes to the pipe and the helper prints nothing. Otherwise the helper waits for the
launcher to end and then prints the message.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from samplerbench.portable import new_session
from samplerbench.results.claims import is_running, start_time
from samplerbench.text import say

LAUNCHERS = {"torchrun", "accelerate", "accelerate-launch", "mpirun", "mpiexec", "srun", "deepspeed"}
MODULES = {"torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"}
IN_ORDER = b"ok"


def is_launcher(command: Sequence[str]) -> bool:
    """Return whether a command line belongs to a program that launches distributed runs.

    Args:
        command: The words of the command line.
    """
    programs = [
        Path(word).name.removesuffix(".exe") for word in command[:2]
    ]  # the program itself, or a script run by Python
    if LAUNCHERS.intersection(programs):
        return True
    return len(command) > 2 and "-m" in command[1:4] and any(word in MODULES for word in command[2:5])


def find_launcher() -> int | None:
    """Return the process id of the outermost launcher of this process, or None without a launcher."""
    import psutil

    found = None
    with suppress(psutil.Error):
        for parent in psutil.Process().parents():
            if not is_launcher(parent.cmdline()):
                break
            found = parent.pid
    return found


class LastWord:
    """A helper process that prints a text after the launcher has ended, unless this process ends normally.

    Args:
        text: The text to print on stderr.
        launcher: Process id of the launcher.
    """

    def __init__(self, text: str, launcher: int) -> None:
        command = [sys.executable, "-m", "samplerbench.bench.last_word", str(launcher), start_time(launcher), text]
        # torchrun ends its children with their process groups.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, **new_session())
        atexit.register(self.cancel)

    def cancel(self) -> None:
        """Cancel the message."""
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(IN_ORDER)
            self._process.stdin.close()

    def keep(self, text: str = "") -> None:
        """Print the message even if this process ends normally.

        Args:
            text: Replacement for the text. If empty, the original text is printed.
        """
        atexit.unregister(self.cancel)
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(text.encode("utf-8", "replace"))
            self._process.stdin.close()


def promise(text: str) -> LastWord | None:
    """Print a text after the output of the launcher if this process ends unexpectedly.

    Args:
        text: The text.

    Returns:
        The helper process, or None if there is no launcher.
    """
    launcher = find_launcher()
    return None if launcher is None else LastWord(text, launcher)


def main(launcher: int, started: str, text: str) -> None:
    """Run the helper process.

    Args:
        launcher: Process id of the launcher.
        started: Start time of the launcher.
        text: The text to print.
    """
    received = sys.stdin.buffer.read()
    if received == IN_ORDER:
        return
    while is_running(launcher, started):
        time.sleep(0.02)
    say(received.decode("utf-8", "replace") or text, error=True)


if __name__ == "__main__":
    with suppress(OSError, KeyboardInterrupt):
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
