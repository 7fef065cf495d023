"""Use samplers in diffusers pipelines: `as_scheduler`.

    pipe.scheduler = as_scheduler("dpm++:order=3", pipe.scheduler)

A sampler calls the denoiser, whereas a scheduler is called with the network's output. `samplerbench.sampling.stepper`
inverts the control flow. This package adds the noise schedule of the model and the conventions of pipelines.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

# diffusers loads a scheduler only if SchedulerMixin is a name in the scheduler's module.
from diffusers import SchedulerMixin
from torch import Tensor

from samplerbench import registry
from samplerbench.diffusers.flow import FlowSamplerScheduler
from samplerbench.diffusers.plan import Subject
from samplerbench.diffusers.scheduler import StepScheduler
from samplerbench.diffusers.source import ScheduleView, read_source
from samplerbench.models.preconditioning import DISCRETE
from samplerbench.models.sample import state_dtype
from samplerbench.models.schedule import VP_SCHEDULERS, alphas_cumprod, noise_levels
from samplerbench.sampling import Prediction, Sampler, Spacing
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.noise import split_seed
from samplerbench.sampling.spacing import bind_spacing, make_grid, pick_spacing

__all__ = ["FlowSamplerScheduler", "SamplerScheduler", "StepScheduler", "as_scheduler"]


def as_scheduler(
    sampler: str | Sampler,
    scheduler: SchedulerMixin | Mapping[str, Any] | str | Path,
    *,
    spacing: str | Spacing | None = None,
    seed: int | None = None,
) -> SamplerScheduler | FlowSamplerScheduler:
    """Convert a sampler to a scheduler for diffusers pipelines.

    The model may be a discrete variance-preserving model or a rectified flow.

    Args:
        sampler: a spec ("dpm++:order=3", "./mine.py:Mine") or an instance.
        scheduler: the source of the noise schedule, the prediction type, clipping and variance: the current scheduler
            of the pipeline, its configuration with "_class_name", a folder of the scheduler or of the pipeline, or a
            Hub repository id. Its sampling settings are ignored.
        spacing: a spec or an instance. None for the sampler's own spacing, or for a rectified flow the time steps of
            the pipeline (see `FlowSamplerScheduler`).
        seed: None draws the noise of the steps from the pipeline's `generator`, like diffusers' schedulers. With a
            number, image i of the batch has the noise of sample i of `samplerbench.sample`, in every call.

    Returns:
        A scheduler, to be assigned to `pipe.scheduler`.

    Raises:
        UserError: an unknown plugin; an unsupported schedule; or a sampler that cannot run step by step, because it
            needs more from the model than D, chooses its noise levels from the image, or changes the state before its
            first evaluation.
    """
    schedule = read_source(scheduler, SamplerScheduler.__name__, FlowSamplerScheduler.__name__)
    if isinstance(schedule, FlowSchedule):
        return FlowSamplerScheduler(
            sampler,
            spacing=spacing,
            seed=seed,
            num_train_timesteps=schedule.timesteps,
            shift=schedule.shift,
            use_dynamic_shifting=schedule.dynamic,
            base_shift=schedule.base_shift,
            max_shift=schedule.max_shift,
            base_image_seq_len=schedule.base_tokens,
            max_image_seq_len=schedule.max_tokens,
            shift_terminal=schedule.terminal,
            time_shift_type=schedule.kind,
        )
    settings = schedule.settings
    betas = settings.get("trained_betas")
    return SamplerScheduler(
        sampler,
        spacing=spacing,
        seed=seed,
        num_train_timesteps=len(schedule.levels),
        beta_start=settings["beta_start"],
        beta_end=settings["beta_end"],
        beta_schedule=settings["beta_schedule"],
        trained_betas=None if betas is None else torch.as_tensor(betas, dtype=torch.float64).tolist(),
        rescale_betas_zero_snr=bool(settings.get("rescale_betas_zero_snr", False)),
        prediction_type=schedule.prediction,
        clip_sample=schedule.clip,
        clip_sample_range=schedule.clip_range,
        variance_type=schedule.variance,
    )


class SamplerScheduler(StepScheduler):
    """A sampler as the scheduler of a discrete variance-preserving model. Create it with `as_scheduler`.

    The state in the pipeline is √ᾱ x₀ + √(1-ᾱ) z, so `scale_model_input` does nothing and `init_noise_sigma` is 1. The
    sampler keeps its own state, scaled by √(1+σ²), in at least float32. `timesteps` has one entry for each network
    evaluation, so a method with k evaluations per step has `order` k. Entries between the model's timesteps are
    float32. `step` does not propagate gradients. `from_pretrained` and `from_config` load what `save_pretrained` and
    `config` of this class return.

    Args:
        sampler: as for `as_scheduler`.
        num_train_timesteps: number of timesteps T of the model.
        beta_start: β of the first timestep.
        beta_end: β of the last timestep.
        beta_schedule: schedule of β between them.
        trained_betas: β of every timestep, (T,), in place of the schedule.
        rescale_betas_zero_snr: rescale β to a zero terminal signal-to-noise ratio.
        prediction_type: output of the network: epsilon, v_prediction or sample.
        clip_sample: clip x₀ to ±clip_sample_range.
        clip_sample_range: limit of clipping.
        variance_type: variance of the model; learned_range if the network predicts it.
        spacing: as for `as_scheduler`.
        seed: as for `as_scheduler`.

    Raises:
        UserError: as `as_scheduler`.
    """

    _compatibles: ClassVar[list[str]] = list(VP_SCHEDULERS)

    def __init__(
        self,
        sampler: str | Sampler,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: list[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        variance_type: str = "fixed_small",
        spacing: str | Spacing | None = None,
        seed: int | None = None,
    ) -> None:
        self.sampler: Sampler = registry.parse("sampler", sampler)
        chosen = pick_spacing(self.sampler, spacing)
        if seed is not None:
            split_seed(seed)
        schedule = {
            "num_train_timesteps": num_train_timesteps,
            "beta_start": beta_start,
            "beta_end": beta_end,
            "beta_schedule": beta_schedule,
            "trained_betas": trained_betas,
            "rescale_betas_zero_snr": rescale_betas_zero_snr,
        }
        self.register_to_config(
            sampler=self.sampler.spec,
            **schedule,
            prediction_type=prediction_type,
            clip_sample=clip_sample,
            clip_sample_range=clip_sample_range,
            variance_type=variance_type,
            spacing=None if spacing is None else chosen.spec,
            seed=seed,
        )
        exact = alphas_cumprod(schedule)
        self.levels = noise_levels(exact)
        self.spacing: Spacing = bind_spacing(chosen, ScheduleView(self.levels), self.sampler)
        self.alphas_cumprod = exact.float()
        self.timesteps = torch.arange(len(exact) - 1, -1, -1)
        self.order = self._subject.check().order

    def __len__(self) -> int:
        return len(self.levels)

    # --- What a pipeline calls ----------------------------------------------------------------------------------

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare a run. A run in progress is stopped.

        The sampler first runs on a small random tensor, to find the noise levels of its evaluations.

        Args:
            num_inference_steps: number of intervals N ≥ 1 of the grid, like `steps` of a run.
            device: device of `timesteps`.

        Raises:
            UserError: the spacing cannot provide N steps, or an error of `as_scheduler`.
        """
        self._give_up()
        pinned = self._pin(int(num_inference_steps))
        grid = make_grid(self.spacing, self.levels, int(num_inference_steps)) if pinned is None else pinned
        self._prepare(self._subject.plan(grid), device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise images: √ᾱ x₀ + √(1-ᾱ) z.

        Args:
            original_samples: x₀, (B, C, H, W).
            noise: z, (B, C, H, W).
            timesteps: (B,) or (1,). Values between the model's timesteps are allowed.

        Returns:
            (B, C, H, W), in the dtype of `original_samples`.
        """
        t = timesteps.to(original_samples.device).double().clamp(0, len(self.levels) - 1)
        logs = self.levels.log().to(t.device)
        low = t.long().clamp(max=len(logs) - 2)
        sigma = (logs[low] + (t - low) * (logs[low + 1] - logs[low])).exp()
        keep = (1 + sigma**2).rsqrt().reshape(-1, *[1] * (original_samples.ndim - 1))
        spread = keep * sigma.reshape(keep.shape)
        dtype = state_dtype(original_samples.dtype)
        mixed = keep.to(dtype) * original_samples.to(dtype) + spread.to(dtype) * noise.to(dtype)
        return mixed.to(original_samples.dtype)

    # --- Around a run -------------------------------------------------------------------------------------------

    @property
    def _subject(self) -> Subject:
        learned = self.config.variance_type == "learned_range"
        return Subject(self.sampler, self.levels, learned, self.config.prediction_type)

    @property
    def _doubled(self) -> bool:
        return self.config.variance_type in ("learned", "learned_range")

    @property
    def _wider(self) -> str:
        return f"; twice the channels require variance_type learned or learned_range, not {self.config.variance_type}"

    def _prediction(self, output: Tensor, x: Tensor, sigma: float) -> Prediction:
        """D, and the variance if the network predicts it, from the network's output at x/√(1+σ²)."""
        output, variance = output.to(x.dtype), None
        if output.shape[1] == 2 * x.shape[1]:
            output, fraction = output.chunk(2, dim=1)
            variance = (fraction + 1) / 2 if self.config.variance_type == "learned_range" else None
        x0 = DISCRETE[self.config.prediction_type].denoised(output, x, sigma)
        # A pipeline may change the clipping in the configuration, as those of Stable Diffusion do.
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return Prediction(x0, variance)
