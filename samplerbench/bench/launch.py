"""Make `accelerate launch --cpu --num_processes N` start N processes."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence

from samplerbench.text import note

RELAUNCHED = "SAMPLERBENCH_RELAUNCHED"
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def processes_wanted(command: Sequence[str]) -> int:
    """The N of `--num_processes N` on accelerate's command line; 1 where it says none."""
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in itertools.pairwise(words):
        if flag in ("--num_processes", "--num-processes") and value.isdigit():
            return int(value)
    return 1


def is_lone(environment: Mapping[str, str]) -> bool:
    """Whether accelerate was asked for several CPU processes and started this one alone.

    Without MPI it starts one process, whatever number is asked for, and leaves only the address where they would have
    met (seen in accelerate 1.15).
    """
    cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    known = any(name in environment for name in _SIZES)
    return cpu and "MASTER_ADDR" in environment and not known and RELAUNCHED not in environment


def start_the_others() -> None:
    """Where accelerate started this process alone instead of several, become torchrun, which starts them all.

    Does nothing otherwise. Where the number is not on accelerate's command line (but in its configuration file), a
    line says how to start them.
    """
    if not is_lone(os.environ):
        return
    import psutil

    parent = psutil.Process().parent()
    n = processes_wanted(parent.cmdline()) if parent is not None else 1
    if n < 2:
        note(
            "note: accelerate started one process; it starts several on the CPU only with MPI. Give --num_processes on "
            "its command line, or use torchrun --nproc-per-node N -m -- samplerbench run …"
        )
        return
    environment = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    # torchrun chooses a free port of its own.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m", "--", "samplerbench"]
    os.execve(sys.executable, [sys.executable, *launcher, *sys.argv[1:]], environment | {RELAUNCHED: "1"})
