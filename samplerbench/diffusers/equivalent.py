"""The scheduler of diffusers that is equivalent to a sampler, found by comparing the two on a small network."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from samplerbench.diffusers import as_scheduler
from samplerbench.elsewhere import same_parameters, scheduler_candidates
from samplerbench.sampling import Sampler, Spacing

TOLERANCE = 1e-4
"""Largest difference of equivalent schedulers, relative to the largest value. The tables of diffusers are float32."""
BATCH = (2, 4, 8, 8)


@dataclass(frozen=True)
class EquivalentScheduler:
    """A scheduler of diffusers that gives the images of a sampler.

    Attributes:
        name: name of the class.
        arguments: arguments of `from_config` besides the configuration of the pipeline.
    """

    name: str
    arguments: dict[str, Any]

    @property
    def code(self) -> str:
        """`DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")`."""
        given = "".join(f", {name}={_literal(value)}" for name, value in self.arguments.items())
        return f"{self.name}.from_config(pipe.scheduler.config{given})"


def equivalent_scheduler(
    sampler: Sampler, spacing: Spacing, steps: int, config: Mapping[str, Any], scaled: bool = False
) -> EquivalentScheduler | None:
    """Find the scheduler of diffusers that gives the same images as `as_scheduler`.

    The candidates are those of the table of names in other software. Each one runs beside the sampler, with the
    configuration of the pipeline, on a small fixed function in place of the network. It is equivalent if the final
    states agree to a relative 10⁻⁴ for the same generator.

    Args:
        sampler: the sampler.
        spacing: the spacing.
        steps: number of steps. With others, the grids of the two may differ.
        config: configuration of the pipeline's scheduler, with `_class_name`.
        scaled: whether the pipeline calls `scale_model_input` and multiplies its noise by `init_noise_sigma`. Only
            text-to-image pipelines do.

    Returns:
        The scheduler. None if no candidate is equivalent.
    """
    same_sampler, same_spacing = same_parameters("sampler", sampler), same_parameters("spacing", spacing)
    for name, arguments in scheduler_candidates(same_sampler, same_spacing):
        cls = getattr(diffusers, name, None)
        if cls is None:
            continue
        more = _without_surprises(cls, config)
        for extended in ({**arguments, **more}, arguments) if more else (arguments,):
            if _agree(cls, extended, sampler, spacing, steps, config, scaled):
                return EquivalentScheduler(name, extended)
    return None


def _without_surprises(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of the pipeline's scheduler that the candidate would take over, at neutral values."""
    neutral: dict[str, Any] = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
    neutral |= {"thresholding": False, "final_sigmas_type": "zero", "set_alpha_to_one": True, "steps_offset": 0}
    known = inspect.signature(cls.__init__).parameters
    return {name: value for name, value in neutral.items() if name in known and config.get(name, value) != value}


def _agree(
    cls: Any,
    arguments: dict[str, Any],
    sampler: Sampler,
    spacing: Spacing,
    steps: int,
    config: Mapping[str, Any],
    scaled: bool,
) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = cls.from_config(dict(config), **arguments)
            if not scaled and float(theirs.init_noise_sigma) != 1:
                return False
            expected = _images(as_scheduler(sampler, dict(config), spacing=spacing), steps)
            actual = _images(theirs, steps)
    except Exception:  # schedulers raise many types for a configuration that they do not support
        return False
    difference = float((actual - expected).abs().max())
    return difference <= TOLERANCE * float(expected.abs().max())


def _images(scheduler: Any, steps: int) -> Tensor:
    """The final states of a pipeline's loop with a fixed function as its network."""
    generator = torch.Generator().manual_seed(0)
    scheduler.set_timesteps(steps)
    x = torch.randn(BATCH, generator=generator) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        output = 0.8 * given + 0.5 * torch.sin(3 * given + float(t) / 200)
        try:
            x = scheduler.step(output, t, x, generator=generator).prev_sample
        except TypeError:  # a deterministic scheduler without the argument
            x = scheduler.step(output, t, x).prev_sample
    return x


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


__all__ = ["EquivalentScheduler", "equivalent_scheduler"]
