"""Support for `accelerate launch --cpu --num_processes N`, which otherwise starts a single process."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Mapping, Sequence

from samplerbench.portable import replace_process
from samplerbench.text import note

RELAUNCHED = "SAMPLERBENCH_RELAUNCHED"
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


def processes_wanted(command: Sequence[str]) -> int:
    """Return N of `--num_processes N` on a command line of accelerate, or 1 if it is not given.

    Args:
        command: The words of the command line.
    """
    words = [part for word in command for part in (word.split("=", 1) if word.startswith("--") else [word])]
    for flag, value in itertools.pairwise(words):
        if flag in ("--num_processes", "--num-processes") and value.isdigit():
            return int(value)
    return 1


def is_lone(environment: Mapping[str, str]) -> bool:
    """Return whether accelerate should have started several CPU processes but started only this one.

    Without MPI, accelerate starts a single process for any `--num_processes`. It then sets MASTER_ADDR but no variable
    with the number of processes (observed with accelerate 1.15).

    Args:
        environment: The environment variables.
    """
    cpu = environment.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    known = any(name in environment for name in _SIZES)
    return cpu and "MASTER_ADDR" in environment and not known and RELAUNCHED not in environment


def start_the_others() -> None:
    """Replace this process by torchrun if accelerate started only one process instead of several.

    torchrun then starts all processes. If the number of processes is in the configuration file of accelerate and not on
    its command line, a note explains how to start them. In all other cases this function does nothing.
    """
    if not is_lone(os.environ):
        return
    import psutil

    parent = psutil.Process().parent()
    n = processes_wanted(parent.cmdline()) if parent is not None else 1
    if n < 2:
        note(
            "note: accelerate started a single process, because it needs MPI for several CPU processes. Pass "
            "--num_processes to accelerate launch, or use torchrun --nproc-per-node N -m -- samplerbench run …"
        )
        return
    environment = {k: v for k, v in os.environ.items() if k not in ("MASTER_ADDR", "MASTER_PORT")}
    # torchrun chooses a free port.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n), "-m", "--", "samplerbench"]
    replace_process([sys.executable, *launcher, *sys.argv[1:]], environment | {RELAUNCHED: "1"})
