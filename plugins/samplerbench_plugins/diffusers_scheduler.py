"""Any diffusers scheduler as a sampler."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from samplerbench.sampling import Denoiser, Noise, Sampler, Step, UserError, option

_OF_THE_MODEL = (
    *("num_train_timesteps", "trained_betas", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr"),
    *("prediction_type", "use_flow_sigmas"),
)
"""Parameters that are not the user's to set: the schedule is the model's, and what is fed is ε."""


@dataclass(frozen=True)
class DiffusersScheduler(Sampler):
    """A scheduler of Hugging Face diffusers, under the same noise, meter and metrics: `diffusers/DDIMScheduler`.

    Source: https://github.com/huggingface/diffusers, as installed; each scheduler's own documentation names its paper.

    The scheduler keeps its own timesteps, which its own parameters set (`timestep_spacing=trailing`), and its own
    float32 tables, made from the model's noise levels; --spacing has no say. It is fed ε = (x - D)/σ, and its noise
    is this toolkit's, so sample i stays a function of seed and i.
    `diffusers/DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true`
    """

    own_grid = True

    scheduler: str = option("DDIMScheduler", "name of the scheduler class", positional=True)
    config: tuple[tuple[str, str], ...] = option((), "its own parameters", rest=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settings(self._class())

    def nfe(self, steps: int) -> int:
        made = self._class()(**self._settings(self._class()))
        for n in range(steps, steps + 8):  # some cannot make so few steps: what the fewest they can make cost
            try:
                made.set_timesteps(n)
            except Exception:  # so many they cannot make: `steps` says why
                continue
            return len(made.timesteps)
        return steps

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        if not math.isclose(denoise.alpha(1.0), 0.5**0.5):
            raise UserError(f"sampler diffusers/{self.scheduler} needs a variance-preserving model.")
        cls = self._class()
        levels = denoise.levels
        # ᾱ = 1/(1+σ²), and β from its ratios: the model's own schedule, whatever it is called.
        bars = 1 / (1 + levels**2)
        betas = 1 - bars / torch.cat([bars.new_ones(1), bars[:-1]])
        schedule = {"num_train_timesteps": len(levels), "trained_betas": betas.numpy()}
        unclipped = {"clip_sample": False} if "clip_sample" in _known(cls) else {}
        made = cls(**(unclipped | schedule | self._settings(cls)))
        try:
            made.set_timesteps(len(sigmas) - 1, device=x.device)
        except Exception as error:  # whatever a scheduler says of a number of steps
            raise UserError(f"diffusers/{self.scheduler} cannot make {len(sigmas) - 1} steps: {error}") from None
        # Schedulers over σ keep x₀ + σ z as we do; the others keep it scaled by √ᾱ. The first noise tells which.
        in_sigma = float(made.init_noise_sigma) > 1.01
        z = x / (1 + float(sigmas[0]) ** 2) ** 0.5
        state = z * float(made.init_noise_sigma)
        times = made.timesteps
        at = [_level(levels, float(t)) for t in times.cpu()]
        for i, t in enumerate(times):
            sigma = at[i]
            x = made.scale_model_input(state, t) * (1 + sigma**2) ** 0.5
            x0 = denoise(x, sigma)
            with _our_noise(made, noise):
                state = made.step((x - x0) / sigma, t, state).prev_sample.to(x.dtype)
            reached = at[i + 1] if i + 1 < len(at) else 0.0
            yield Step(reached, state if in_sigma else state * (1 + reached**2) ** 0.5, x0)

    def _class(self) -> Any:
        import diffusers

        cls = getattr(diffusers, self.scheduler, None)
        if missing := [name for name in getattr(cls, "_backends", ()) if find_spec(name) is None]:
            raise UserError(f"diffusers/{self.scheduler} needs {' and '.join(missing)}, which is not installed.")
        if cls is None or not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
            raise UserError(f'diffusers has no scheduler "{self.scheduler}"; an example: diffusers/DDIMScheduler.')
        needed = {"trained_betas", "prediction_type"} - set(_known(cls))
        if needed:
            raise UserError(
                f"diffusers/{self.scheduler} cannot sample this kind of model: it has no β schedule or no "
                f"ε-prediction (its constructor lacks {' and '.join(sorted(needed))})."
            )
        return cls

    def _settings(self, cls: Any) -> dict[str, Any]:
        known = _known(cls)
        found: dict[str, Any] = {}
        for name, text in self.config:
            if name not in known or name in _OF_THE_MODEL:
                takes = ", ".join(k for k in known if k not in _OF_THE_MODEL)
                raise UserError(f'diffusers/{self.scheduler} has no parameter "{name}" to set here; it takes {takes}.')
            try:
                found[name] = ast.literal_eval(text.capitalize() if text.lower() in ("true", "false", "none") else text)
            except (ValueError, SyntaxError):
                found[name] = text
        try:
            cls(**found)
        except Exception as error:  # whatever a scheduler's constructor says of its parameters
            raise UserError(f"diffusers/{self.scheduler}: {error}") from None
        return found


def _known(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "args", "kwargs")]


def _level(levels: Tensor, t: float) -> float:
    """σ at a timestep; between two, linear in log σ, as the models' adapters have it."""
    low = min(int(t), len(levels) - 2)
    share = t - low
    logs = levels[low : low + 2].log()
    return float(levels[low]) if share == 0 else float((logs[0] + share * (logs[1] - logs[0])).exp())


@contextmanager
def _our_noise(scheduler: Any, noise: Noise) -> Iterator[None]:
    """While it steps, the scheduler's module draws its noise from our stream instead of torch's generator."""
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, "randn_tensor"):
        yield
        return
    original = module.randn_tensor

    def ours(shape: Any, *_: Any, device: Any = None, dtype: Any = None, **__: Any) -> Tensor:
        drawn = noise()
        if tuple(shape) != tuple(drawn.shape):
            raise UserError(f"{type(scheduler).__name__} asked for noise of shape {tuple(shape)}.")
        return drawn if dtype is None else drawn.to(dtype)

    module.randn_tensor = ours  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.randn_tensor = original  # type: ignore[attr-defined]
