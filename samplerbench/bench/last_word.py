"""One sentence after a launcher's own lines: where a process of a run was lost, what remains and how to continue.

torchrun and `accelerate launch` end the other processes when one is lost, and print their report last. So the main
process starts a small one beside, in a session of its own, which waits on a pipe. If the main process ends in good
order it says so there, and nothing is printed. Otherwise the small one waits for the launcher to end, then prints.
"""

from __future__ import annotations

import atexit
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from samplerbench.results.claims import is_running, start_time
from samplerbench.text import say

LAUNCHERS = {"torchrun", "accelerate", "accelerate-launch", "mpirun", "mpiexec", "srun", "deepspeed"}
MODULES = {"torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"}
IN_ORDER = b"ok"


def is_launcher(command: Sequence[str]) -> bool:
    """Whether a command line is that of a program that starts the processes of a run."""
    programs = [Path(word).name.removesuffix(".exe") for word in command[:2]]  # as a program, or as Python's script
    if LAUNCHERS.intersection(programs):
        return True
    return len(command) > 2 and "-m" in command[1:4] and any(word in MODULES for word in command[2:5])


def find_launcher() -> int | None:
    """The process id of the outermost launcher above this process; None where it was started in another way."""
    import psutil

    found = None
    with suppress(psutil.Error):
        for parent in psutil.Process().parents():
            if not is_launcher(parent.cmdline()):
                break
            found = parent.pid
    return found


class LastWord:
    """A process that prints a text after the launcher has ended, unless this process ends in good order.

    Args:
        text: what it prints on stderr.
        launcher: process id of the launcher.
    """

    def __init__(self, text: str, launcher: int) -> None:
        command = [sys.executable, "-m", "samplerbench.bench.last_word", str(launcher), start_time(launcher), text]
        # torchrun ends its children with their process groups.
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=os.name == "posix"
        )
        atexit.register(self.cancel)

    def cancel(self) -> None:
        """Nothing is to be printed."""
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(IN_ORDER)
            self._process.stdin.close()

    def keep(self, text: str = "") -> None:
        """The text, or another one, is to be printed although this process ends by itself."""
        atexit.unregister(self.cancel)
        with suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.write(text.encode("utf-8", "replace"))
            self._process.stdin.close()


def promise(text: str) -> LastWord | None:
    """Have a text printed after the launcher's lines if this process is lost; None where no launcher is known."""
    launcher = find_launcher()
    return None if launcher is None else LastWord(text, launcher)


def main(launcher: int, started: str, text: str) -> None:
    """What the small process does."""
    received = sys.stdin.buffer.read()
    if received == IN_ORDER:
        return
    while is_running(launcher, started):
        time.sleep(0.02)
    say(received.decode("utf-8", "replace") or text, error=True)


if __name__ == "__main__":
    with suppress(OSError, KeyboardInterrupt):
        main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
