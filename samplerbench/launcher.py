"""The settings that `accelerate launch` and torchrun pass to a process in environment variables."""

from __future__ import annotations

import os
from collections.abc import Mapping

from samplerbench.errors import LaunchError

SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism_config",
}
"""Environment variables of accelerate for the modes that split a network over several devices."""

PRECISIONS = ("no", "fp16", "bf16")
"""The values of mixed_precision that training supports."""

_LOCAL_RANKS = ("LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "MV2_COMM_WORLD_LOCAL_RANK")


def is_set(environment: Mapping[str, str], name: str) -> bool:
    """Return whether an environment variable is set to a true value, such as `true` or `1`.

    Args:
        environment: The environment variables.
        name: Name of the variable.
    """
    return environment.get(name, "").lower() in ("1", "true", "yes", "y", "on", "t")


def local_rank(environment: Mapping[str, str]) -> int:
    """Return the rank of this process among those on this machine, or 0 without a launcher.

    Args:
        environment: The environment variables.
    """
    return next((int(environment[name]) for name in _LOCAL_RANKS if environment.get(name, "").isdigit()), 0)


def sharding(environment: Mapping[str, str]) -> str | None:
    """Return the name of a mode of accelerate that is not supported, or None.

    Args:
        environment: The environment variables.
    """
    on_tpu = environment.get("PJRT_DEVICE", "").upper() == "TPU" or "ACCELERATE_IN_TPU_POD" in environment
    found = [name for variable, name in SHARDING.items() if is_set(environment, variable)]
    return (*found, "TPU", None)[0] if found or on_tpu else None


def check_sharding() -> None:
    """Refuse the modes of accelerate that split a network over several devices.

    Raises:
        LaunchError: If DeepSpeed, FSDP, Megatron-LM, a parallelism_config or a TPU is configured.
    """
    mode = sharding(os.environ)
    if mode is None:
        return
    reason = (
        "samplerbench runs on CPUs and GPUs"
        if mode == "TPU"
        else "the network fits on one device, each process samples or trains on its own images, and no parameters are "
        "sharded"
    )
    raise LaunchError(
        f"accelerate is configured for {mode}, which samplerbench does not support: {reason}. Set distributed_type to "
        "MULTI_GPU (or to NO for one process) in accelerate's configuration file."
    )


def check_gpu(available: bool) -> None:
    """Refuse several processes that accelerate started for GPUs on a machine without a GPU.

    Otherwise they would run on the CPU, many times slower than expected.

    Args:
        available: Whether torch finds a GPU.

    Raises:
        LaunchError: If there is no GPU.
    """
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    # Accelerate sets ACCELERATE_USE_CPU only if it starts processes for CPUs, or a single one.
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ and "ACCELERATE_USE_CPU" not in os.environ
    if several and by_accelerate and not available:
        raise LaunchError(
            "accelerate started several processes for GPUs (distributed_type: MULTI_GPU), but torch finds no GPU on "
            "this machine. Check the driver and the installation of torch, or set distributed_type to MULTI_CPU and "
            "use_cpu to true in accelerate's configuration file to run on the CPU."
        )


def mixed_precision() -> str:
    """Return the mixed_precision that `accelerate launch` was given, or "no"."""
    return os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
