"""Support for `accelerate launch` with several CPU processes, for which it otherwise starts a single process."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import NoReturn

from samplerbench.errors import LaunchError
from samplerbench.launcher import is_set, local_rank
from samplerbench.portable import leave, replace_process
from samplerbench.text import note

RELAUNCHED = "SAMPLERBENCH_RELAUNCHED"
_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@dataclass(frozen=True)
class Launch:
    """What `accelerate launch` was asked to start.

    Attributes:
        processes: Number of processes, over all machines.
        machines: Number of machines.
        machine_rank: Rank of this machine, from 0.
        address: Address of the machine of rank 0, or None.
        port: Port on the machine of rank 0, or None.
        cpu: Whether the processes run on the CPU.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    address: str | None = None
    port: int | None = None
    cpu: bool = False

    def torchrun(self) -> list[str]:
        """Return the options of torchrun that start the processes of this machine.

        Raises:
            LaunchError: If the processes cannot be divided evenly over the machines, or if there is no address.
        """
        if self.processes % self.machines:
            raise LaunchError(
                f"accelerate's num_processes is {self.processes}, which cannot be divided evenly over {self.machines} "
                "machines. num_processes is the total number over all machines."
            )
        each = ["--nproc-per-node", str(self.processes // self.machines)]
        if self.machines == 1:
            return ["--standalone", *each]  # torchrun chooses a free port
        if self.address is None or self.port is None:
            raise LaunchError("with several machines, accelerate needs main_process_ip and main_process_port.")
        nodes = ["--nnodes", str(self.machines), "--node-rank", str(self.machine_rank)]
        return [*nodes, *each, "--master-addr", self.address, "--master-port", str(self.port)]


def launch_options(command: Sequence[str]) -> list[str] | None:
    """Return the words after `accelerate launch` on a command line, or None if it is another command.

    Args:
        command: The words of the command line.
    """
    for i, word in enumerate(command[:4]):
        name = Path(word).name.removesuffix(".exe")
        if name in ("accelerate-launch", "accelerate.commands.launch"):
            return list(command[i + 1 :])
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command[i + 1 : i + 2] == ["launch"]:
            return list(command[i + 2 :])
    return None


def read_launch(options: Sequence[str]) -> Launch:
    """Return what `accelerate launch` starts, from its options and its configuration file.

    As in accelerate, an option overrides the configuration file. The file is that of `--config_file`, otherwise the
    default file under `HF_HOME`. The default file is not used with `--cpu`.

    Args:
        options: The words after `accelerate launch`.

    Raises:
        ValueError: If accelerate cannot read the options or the configuration file.
    """
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    try:
        with redirect_stderr(StringIO()):
            given = launch_command_parser().parse_args(list(options))
    except SystemExit as error:
        raise ValueError("accelerate cannot read its options") from error
    config = None
    if given.config_file is not None or (os.path.isfile(default_config_file) and not given.cpu):
        try:
            config = load_config_from_file(given.config_file)
        except Exception as error:  # any error of a YAML parser
            raise ValueError(f"accelerate cannot read its configuration file: {error}") from error

    def value(name: str) -> object:
        return found if (found := getattr(given, name)) is not None else getattr(config, name, None)

    address, port = value("main_process_ip"), value("main_process_port")
    return Launch(
        processes=int(str(value("num_processes") or 1)),
        machines=int(str(value("num_machines") or 1)),
        machine_rank=int(str(value("machine_rank") or 0)),
        address=None if address is None else str(address),
        port=None if port is None else int(str(port)),
        cpu=given.cpu or getattr(config, "use_cpu", False) or getattr(config, "distributed_type", "") == "MULTI_CPU",
    )


def is_lone(environment: Mapping[str, str]) -> bool:
    """Return whether accelerate should have started several processes but started only this one.

    Without several GPUs and without MPI, accelerate starts a single process for any `--num_processes`. It then sets
    MASTER_ADDR but no variable with the number of processes (observed with accelerate 1.15).

    Args:
        environment: The environment variables.
    """
    known = any(name in environment for name in _SIZES)
    started = "ACCELERATE_USE_CPU" in environment and "MASTER_ADDR" in environment
    return started and not known and RELAUNCHED not in environment


def start_the_others() -> None:
    """Replace this process by torchrun if accelerate started only one process instead of several CPU processes.

    torchrun then starts all processes of this machine. If the processes are not for the CPU, or if the settings of
    accelerate cannot be read, a note explains how to start them. In all other cases this function does nothing.

    Raises:
        LaunchError: If the number of processes does not fit the number of machines.
    """
    if not is_lone(os.environ):
        return
    options = _options_of_accelerate()
    launch = None
    with suppress(ValueError):
        launch = None if options is None else read_launch(options)
    cpu = is_set(os.environ, "ACCELERATE_USE_CPU")
    if launch is None:
        note(
            "note: accelerate started a single process, and its settings could not be read. For several CPU processes "
            "use torchrun --nproc-per-node N -m -- samplerbench …"
        )
    elif launch.processes < 2:
        return
    elif not (cpu or launch.cpu):
        note(
            f"note: accelerate started a single process instead of {launch.processes}, as it does without --multi_gpu "
            "(distributed_type: MULTI_GPU) or if it finds fewer than two GPUs. For processes on the CPU, pass --cpu to "
            "accelerate launch."
        )
    else:
        dropped = ("MASTER_ADDR", "MASTER_PORT")
        environment = {k: v for k, v in os.environ.items() if k not in dropped}
        environment |= {RELAUNCHED: "1", "ACCELERATE_USE_CPU": "True"}
        command = ["-m", "torch.distributed.run", *launch.torchrun(), "-m", "--", "samplerbench", *sys.argv[1:]]
        replace_process([sys.executable, *command], environment)


def _options_of_accelerate() -> list[str] | None:
    """Return the words after `accelerate launch` on the command line that started this process, or None."""
    import psutil

    with suppress(psutil.Error):
        for parent in psutil.Process().parents()[:3]:  # a shell or an interpreter's stub may stand between
            if (options := launch_options(parent.cmdline())) is not None:
                return options
    return None


def end_launch(message: str) -> NoReturn:
    """End all processes of this machine with exit code 2, and print a message once.

    It is printed after the output of the launcher, which reports the failed process in many lines.

    Args:
        message: The message, which is the same for all processes.

    Raises:
        SystemExit: Always, with code 2.
    """
    from samplerbench.bench.last_word import promise

    if local_rank(os.environ) > 0:
        # The launcher ends this process when the first one has ended, and reports the process that failed first.
        time.sleep(60)
        leave(2)
    word = promise("")
    if word is None:
        note(message)
    else:
        word.keep(f"samplerbench: {message}")
    sys.exit(2)
