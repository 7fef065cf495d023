"""Read the noise schedule of a model from a scheduler, its configuration, a folder, or a Hub repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DDPMScheduler, SchedulerMixin
from torch import Tensor

from samplerbench.errors import UserError
from samplerbench.models.flow import is_flow, read_flow_schedule
from samplerbench.models.schedule import Schedule, read_schedule
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.untrusted import is_dir, read_json, user_path


class ScheduleView:
    """What is known of a model from its scheduler alone. A spacing may be bound to it.

    Args:
        levels: noise levels, (T,) float64, increasing.
        flow: time steps of a rectified flow. None for other processes.
    """

    def __init__(self, levels: Tensor, flow: FlowSchedule | None = None) -> None:
        self.levels, self.flow = levels, flow

    def __getattr__(self, name: str) -> Any:
        """Refuse a spacing that uses what only a model has."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise UserError(
            "this spacing requires more from the model than its noise levels, which is all that a scheduler has; use "
            "another spacing."
        )


def read_source(
    scheduler: SchedulerMixin | Mapping[str, Any] | str | Path, own: str, own_flow: str
) -> Schedule | FlowSchedule:
    """Read the noise schedule of a model.

    Args:
        scheduler: the model's scheduler, its configuration, a folder, or a Hub repository id.
        own: the name of a class whose configuration contains all entries of DDPMScheduler's.
        own_flow: the name of a class whose configuration contains those of FlowMatchEulerDiscreteScheduler's.

    Raises:
        UserError: no scheduler, an unknown class, or an unsupported schedule.
    """
    config: Mapping[str, Any]
    if isinstance(scheduler, str | Path):
        config, source = _load(scheduler), str(scheduler)
        name = config.get("_class_name")
    elif isinstance(scheduler, Mapping):
        config, source, name = scheduler, "the configuration", scheduler.get("_class_name")
    else:
        config, name = getattr(scheduler, "config", {}), type(scheduler).__name__
        source = "the pipeline"
    if name is None:
        raise UserError(f'{source} does not name the scheduler\'s class ("_class_name"); give the scheduler itself.')
    name = {own: "DDPMScheduler", own_flow: "FlowMatchEulerDiscreteScheduler"}.get(name, name)
    if is_flow(name, config):
        return read_flow_schedule(name, config, source)
    return read_schedule(name, config, source)


def _load(source: str | Path) -> Mapping[str, Any]:
    """The configuration in a folder, in its subfolder `scheduler`, or on the Hub."""
    folder = user_path(source)
    if is_dir(folder):
        inner = folder if (folder / "scheduler_config.json").is_file() else folder / "scheduler"
        return read_json(inner / "scheduler_config.json", f"{source} has no scheduler")
    try:
        return DDPMScheduler.load_config(str(source), subfolder="scheduler")
    except (OSError, ValueError) as error:
        raise UserError(
            f'no scheduler "{source}": there is no such folder, and it is not on the Hub '
            f"({str(error).strip().splitlines()[0]})"
        ) from None
