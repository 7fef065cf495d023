"""Schedulers of diffusers as samplers."""

from __future__ import annotations

import ast
import inspect
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from samplerbench.sampling import (
    Denoiser,
    FlowSchedule,
    ModelView,
    Noise,
    PredictionType,
    Sampler,
    Step,
    UserError,
    option,
)
from samplerbench_plugins.diffusers_flow import check_flow_scheduler, flow_steps, make_flow_scheduler, supports_flows

_OF_THE_MODEL = (
    *("num_train_timesteps", "trained_betas", "beta_start", "beta_end", "beta_schedule", "rescale_betas_zero_snr"),
    *("prediction_type", "use_flow_sigmas", "snr_shift_scale"),
)
"""Parameters that the user cannot set, because they are properties of the model."""


@dataclass(frozen=True)
class DiffusersScheduler(Sampler):
    """A scheduler of Hugging Face diffusers as a sampler, for example `diffusers/DDIMScheduler`.

    Source: https://github.com/huggingface/diffusers, as installed. The documentation of each scheduler names its paper.

    The scheduler uses its own timesteps, set by its own parameters (`timestep_spacing=trailing`), and its own float32
    tables, computed from the model's noise levels. The spacing of the run has no effect. As in a pipeline, the
    scheduler receives the prediction of the model, computed from D: ε = (x - D)/σ, v = (ε - σ D)/√(1+σ²), or D. It
    receives ε if it does not support the model's prediction type. For a rectified flow it receives the velocity, in its
    flow mode (use_flow_sigmas) or as a FlowMatch scheduler, with the shift of the model. Its noise is replaced by that
    of samplerbench, so sample i depends only on the seed and i.
    Not supported: schedulers that invert images, need more than a prediction in each step, draw their own noise, or
    have no β schedule or prediction type.
    Example: `diffusers/DPMSolverMultistepScheduler:algorithm_type=sde-dpmsolver++,use_karras_sigmas=true`
    """

    own_grid = True
    from_infinity = True
    flow: ClassVar[FlowSchedule | None] = None

    scheduler: str = option("DDIMScheduler", "name of the scheduler class", positional=True)
    config: tuple[tuple[str, str], ...] = option((), "parameters of the scheduler", rest=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        self._settings(self._class())

    @classmethod
    def schedulers(cls, flows: bool = False) -> list[str]:
        """The names of the schedulers of the installed diffusers that are supported.

        Args:
            flows: whether to list those for rectified flows instead of those for variance-preserving models.
        """
        import diffusers

        supported = []
        for name in dir(diffusers):
            if name.endswith("Scheduler") and not name.startswith("_"):
                try:
                    cls(scheduler=name)
                except UserError:
                    continue
                scheduler = getattr(diffusers, name)
                if supports_flows(scheduler) if flows else "trained_betas" in _known(scheduler):
                    supported.append(name)
        return supported

    def bind(self, model: ModelView, sigmas: Tensor) -> Self:
        cls = self._class()
        if model.flow is not None:
            check_flow_scheduler(cls)
        elif "trained_betas" not in _known(cls):
            raise UserError(f"diffusers/{self.scheduler} samples rectified flows, and this model is none.")
        return self.with_state(flow=model.flow)

    def nfe(self, steps: int) -> int:
        made = self._class()(**self._settings(self._class()))
        for n in range(steps, steps + 8):  # some schedulers have a minimum number of steps
            try:
                made.set_timesteps(n)
            except Exception:  # `steps` reports the error
                continue
            return len(made.timesteps)
        return steps

    def steps(self, denoise: Denoiser, x: Tensor, sigmas: Tensor, noise: Noise) -> Iterator[Step]:
        if self.flow is not None:
            cls = self._class()
            made, arguments = make_flow_scheduler(cls, self._settings(cls), self.flow)
            z = x / (1 + float(sigmas[0]))
            yield from flow_steps(
                made, arguments, denoise, z, len(sigmas) - 1, self.flow, lambda: _our_noise(made, noise)
            )
            return
        if not math.isclose(denoise.alpha(1.0), 0.5**0.5):
            raise UserError(f"sampler diffusers/{self.scheduler} needs a variance-preserving model.")
        cls = self._class()
        levels = denoise.levels
        # The model's own schedule: ᾱ = 1/(1+σ²), and β from the ratios of ᾱ.
        alphas_cumprod = 1 / (1 + levels**2)
        betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
        prediction = self._takes(cls, denoise.prediction)
        schedule = {"num_train_timesteps": len(levels), "trained_betas": betas.numpy(), "prediction_type": prediction}
        # The model defines whether D is clipped. Its noise levels must not be shifted.
        neutral = {name: value for name, value in _NEUTRAL.items() if name in _known(cls)}
        made = cls(**(neutral | schedule | self._settings(cls)))
        try:
            made.set_timesteps(len(sigmas) - 1, device=x.device)
        except Exception as error:  # schedulers raise many types for an unsupported number of steps
            raise UserError(f"diffusers/{self.scheduler} does not support {len(sigmas) - 1} steps: {error}") from None
        # Schedulers in σ use x₀ + σ z. The others scale it by √ᾱ. init_noise_sigma distinguishes the two.
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
                state = made.step(_output(prediction, x, x0, sigma), t, state).prev_sample.to(x.dtype)
            reached = at[i + 1] if i + 1 < len(at) else 0.0
            yield Step(reached, state if in_sigma else state * (1 + reached**2) ** 0.5, x0)

    def _class(self) -> Any:
        import diffusers

        cls: Any = getattr(diffusers, self.scheduler, None)
        if missing := [name for name in getattr(cls, "_backends", ()) if find_spec(name) is None]:
            raise UserError(f"diffusers/{self.scheduler} requires {' and '.join(missing)}, which is not installed.")
        if cls is None or not (inspect.isclass(cls) and issubclass(cls, diffusers.SchedulerMixin)):
            known = [name for name in dir(diffusers) if name.endswith("Scheduler")]
            near = "".join(f' Did you mean "{name}"?' for name in get_close_matches(self.scheduler, known, 1, 0.8))
            raise UserError(
                f'diffusers has no scheduler "{self.scheduler}".{near} '
                "`samplerbench list schedulers` lists the supported ones."
            )
        needed = {"trained_betas", "prediction_type"} - set(_known(cls))
        if needed and not cls.__name__.startswith("FlowMatch"):
            raise UserError(
                f"diffusers/{self.scheduler} cannot sample this kind of model: it has no β schedule or no "
                f"ε-prediction (its constructor lacks {' and '.join(sorted(needed))})."
            )
        if more := _needs_besides(cls):
            raise UserError(
                f"diffusers/{self.scheduler} cannot sample this kind of model: in addition to the prediction, "
                f"its step requires {' and '.join(more)}."
            )
        if "noise_sampler_seed" in _known(cls):
            raise UserError(
                f"diffusers/{self.scheduler} draws its own noise (noise_sampler_seed), so its images would depend on "
                "the batch; use a scheduler that draws noise with diffusers' randn_tensor."
            )
        return cls

    def _takes(self, cls: Any, prediction: PredictionType) -> PredictionType:
        """The prediction type for the scheduler: that of the model, or ε if the scheduler does not support it."""
        if prediction == "epsilon":
            return prediction
        made = cls(**(self._settings(cls) | {"prediction_type": prediction}))
        if not _some_timesteps(made):
            return prediction  # `steps` reports the error
        x = torch.zeros(1, 1, 1, 1)
        try:
            with _our_noise(made, lambda: x):
                made.step(x, made.timesteps[0], x)
        except (NotImplementedError, ValueError):  # the scheduler does not support this type
            return "epsilon"
        return prediction

    def _settings(self, cls: Any) -> dict[str, Any]:
        known = _known(cls)
        settings: dict[str, Any] = {}
        for name, text in self.config:
            if name not in known or name in _OF_THE_MODEL:
                takes = ", ".join(k for k in known if k not in _OF_THE_MODEL)
                raise UserError(f'diffusers/{self.scheduler} has no parameter "{name}" to set here; it takes {takes}.')
            try:
                settings[name] = ast.literal_eval(
                    text.capitalize() if text.lower() in ("true", "false", "none") else text
                )
            except (ValueError, SyntaxError):
                settings[name] = text
        try:
            made = cls(**settings)
        except Exception as error:  # constructors raise many types for invalid parameters
            raise UserError(f"diffusers/{self.scheduler}: {error}") from None
        times = _some_timesteps(made)
        if times and times[0] < times[-1]:
            raise UserError(
                f"diffusers/{self.scheduler} is not a sampler: its timesteps increase, so it converts images to noise."
            )
        return settings


_NEUTRAL = {"clip_sample": False, "snr_shift_scale": 1.0}


def _some_timesteps(scheduler: Any) -> list[float]:
    """The timesteps that a scheduler sets for a few steps; empty if its parameters allow none of these numbers."""
    for steps in (10, 4, 1):
        try:
            scheduler.set_timesteps(steps)
        except Exception:  # schedulers raise many types for an unsupported number of steps
            continue
        return [float(t) for t in scheduler.timesteps]
    return []


def _needs_besides(cls: Any) -> list[str]:
    """The required arguments of a scheduler's step, other than the usual ones."""
    given = ("self", "model_output", "timestep", "sample")
    many = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(cls.step).parameters.values()
    return [p.name for p in parameters if p.name not in given and p.kind not in many and p.default is p.empty]


def _output(prediction: PredictionType, x: Tensor, x0: Tensor, sigma: float) -> Tensor:
    """The network output (B, C, H, W) of a prediction type, for D(x, σ) = x0."""
    if prediction == "sample":
        return x0
    epsilon = (x - x0) / sigma
    return epsilon if prediction == "epsilon" else (epsilon - sigma * x0) / (1 + sigma**2) ** 0.5


def _known(cls: Any) -> list[str]:
    return [name for name in inspect.signature(cls.__init__).parameters if name not in ("self", "args", "kwargs")]


def _level(levels: Tensor, t: float) -> float:
    """σ at a timestep. Between two timesteps log σ is linear, as in the model adapters."""
    low = min(int(t), len(levels) - 2)
    share = t - low
    logs = levels[low : low + 2].log()
    return float(levels[low]) if share == 0 else float((logs[0] + share * (logs[1] - logs[0])).exp())


@contextmanager
def _our_noise(scheduler: Any, noise: Callable[[], Tensor]) -> Iterator[None]:
    """Context manager: the scheduler draws its noise from the noise stream of samplerbench."""
    module = sys.modules[type(scheduler).__module__]
    if not hasattr(module, "randn_tensor"):
        yield
        return
    original = module.randn_tensor

    def ours(shape: Any, *_: Any, device: Any = None, dtype: Any = None, **__: Any) -> Tensor:
        drawn = noise()
        if tuple(shape) != tuple(drawn.shape):
            raise UserError(f"{type(scheduler).__name__} requested noise of the unsupported shape {tuple(shape)}.")
        return drawn if dtype is None else drawn.to(dtype)

    module.randn_tensor = ours  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.randn_tensor = original  # type: ignore[attr-defined]
