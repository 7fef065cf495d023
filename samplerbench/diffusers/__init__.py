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
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from samplerbench import registry
from samplerbench.diffusers.plan import Plan, Subject
from samplerbench.diffusers.run import Run
from samplerbench.diffusers.source import read_source
from samplerbench.errors import UserError
from samplerbench.models.preconditioning import DISCRETE
from samplerbench.models.sample import state_dtype
from samplerbench.models.schedule import VP_SCHEDULERS, alphas_cumprod, noise_levels
from samplerbench.sampling import Prediction, Sampler, Spacing
from samplerbench.sampling.noise import split_seed
from samplerbench.sampling.spacing import make_grid, pick_spacing

__all__ = ["SamplerScheduler", "as_scheduler"]


def as_scheduler(
    sampler: str | Sampler,
    scheduler: SchedulerMixin | Mapping[str, Any] | str | Path,
    *,
    spacing: str | Spacing | None = None,
    seed: int | None = None,
) -> SamplerScheduler:
    """Convert a sampler to a scheduler for diffusers pipelines of discrete variance-preserving models.

    Args:
        sampler: a spec ("dpm++:order=3", "./mine.py:Mine") or an instance.
        scheduler: the source of the noise schedule, the prediction type, clipping and variance: the current scheduler
            of the pipeline, its configuration with "_class_name", a folder of the scheduler or of the pipeline, or a
            Hub repository id. Its sampling settings are ignored.
        spacing: a spec or an instance; None for the sampler's own spacing.
        seed: None draws the noise of the steps from the pipeline's `generator`, like diffusers' schedulers. With a
            number, image i of the batch has the noise of sample i of `samplerbench.sample`, in every call.

    Returns:
        A scheduler, to be assigned to `pipe.scheduler`.

    Raises:
        UserError: an unknown plugin; an unsupported schedule; or a sampler that cannot run step by step, because it
            needs more from the model than D, chooses its noise levels from the image, or changes the state before its
            first evaluation.
    """
    schedule = read_source(scheduler, SamplerScheduler.__name__)
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


class SamplerScheduler(SchedulerMixin, ConfigMixin):
    """A samplerbench sampler with the interface of diffusers' schedulers. Create it with `as_scheduler`.

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
    order = 1
    init_noise_sigma = 1.0

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
        self.spacing: Spacing = pick_spacing(self.sampler, spacing)
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
            spacing=None if spacing is None else self.spacing.spec,
            seed=seed,
        )
        exact = alphas_cumprod(schedule)
        self.levels = noise_levels(exact)
        self.alphas_cumprod = exact.float()
        self.timesteps = torch.arange(len(exact) - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self._plan: Plan | None = None
        self._begin_index: int | None = None
        self._run: Run | None = None
        self.order = self._subject.check().order

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Create a scheduler from a configuration of this class. `kwargs` override it.

        Raises:
            UserError: a configuration of another class; pass it to `as_scheduler`.
        """
        if isinstance(config, Mapping) and "sampler" not in config:
            raise UserError(
                "this is the configuration of another scheduler; use samplerbench.diffusers.as_scheduler(sampler, "
                "scheduler)."
            )
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    def __len__(self) -> int:
        return len(self.levels)

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not continue a run in progress. Call `set_timesteps` on it first."""
        state = dict(self.__dict__)
        if self._run is not None:
            state |= dict.fromkeys(("_run", "_plan", "num_inference_steps"))
        return state

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
        grid = make_grid(self.spacing, self.levels, int(num_inference_steps))
        plan = self._subject.plan(grid)
        self.timesteps = plan.timesteps.to(device)
        self._plan, self.order = plan, plan.order
        self.num_inference_steps = int(num_inference_steps)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Set the entry of `timesteps` at which the next run starts. For pipelines that start from a noised image."""
        self._begin_index = int(begin_index)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Return the sample unchanged."""
        return sample

    @torch.no_grad()
    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> DDPMSchedulerOutput | tuple[Tensor, Tensor]:
        """Advance the sampler by one network evaluation.

        Args:
            model_output: output of the network, (B, C, H, W), with or without guidance; (B, 2C, H, W) if the network
                learned a variance.
            timestep: current entry of `timesteps`.
            sample: input of the network, (B, C, H, W).
            eta: must be 0. Some pipelines always pass it. Set parameters of the sampler in its spec.
            use_clipped_model_output: must be False or None, for the same reason.
            generator: generator of the noise, if `seed` is None.
            return_dict: whether to return a `DDPMSchedulerOutput` instead of a tuple.

        Returns:
            `prev_sample`, the next input of the network, or the image after the last entry; and
            `pred_original_sample`, D. Both are (B, C, H, W) in the dtype of `sample`.

        Raises:
            UserError: `set_timesteps` was not called; a timestep out of order; an output or batch of another shape; a
                state that the pipeline changed, if the method uses earlier states; or a method whose noise levels
                depend on the image. Exceptions of the sampler are not changed.
        """
        if eta or use_clipped_model_output:
            raise UserError(
                "eta and use_clipped_model_output are not supported; set parameters of the sampler in its spec: "
                'as_scheduler("NAME:parameter=value", …).'
            )
        plan = self._plan
        if plan is None:
            raise UserError("call set_timesteps(num_inference_steps) before step.")
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise UserError(f"step requires one timestep for the whole batch, but got {timestep.numel()}.")
        run = self._run or Run(plan, plan.first(timestep, self._begin_index), self.config.seed)
        self._check_order(run, timestep)
        self._check_shapes(run, model_output, sample)
        self._run = run
        try:
            run.meet(sample, generator)
            prediction = self._prediction(model_output, run.x, run.sigma)
            following = run.answer(prediction, sample.dtype)
        except BaseException:
            self._give_up()
            raise
        if run.done:
            self._finish()
        x0 = prediction.x0.to(sample.dtype)
        return DDPMSchedulerOutput(following, x0) if return_dict else (following, x0)

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

    def _check_order(self, run: Run, timestep: float | Tensor) -> None:
        entry, expected = self.timesteps[run.index], run.plan.times[run.index]
        # Equal memory is the same entry. Comparing the values would synchronise with the device.
        on_device = isinstance(timestep, Tensor) and timestep.device == entry.device and entry.device.type != "cpu"
        if on_device and timestep.data_ptr() == entry.data_ptr():  # type: ignore[union-attr]
            return
        if float(timestep) != expected:
            raise UserError(
                f"step was called with timestep {float(timestep):g}, but the next one of this run is "
                f"{expected:g}; call "
                "set_timesteps to start a new run."
            )

    def _check_shapes(self, run: Run, output: Tensor, sample: Tensor) -> None:
        if run.sent is not None and sample.shape != run.sent.shape:
            raise UserError(
                f"the run started with states of shape {tuple(run.sent.shape)}, but got {tuple(sample.shape)}; call "
                "set_timesteps to start a new run."
            )
        doubled = self.config.variance_type in ("learned", "learned_range")
        wide = (len(sample), 2 * sample.shape[1], *sample.shape[2:])
        if output.shape != sample.shape and not (doubled and output.shape == wide):
            raise UserError(
                f"the network's output has shape {tuple(output.shape)}, but the state has "
                f"{tuple(sample.shape)}; twice the "
                f"channels require variance_type learned or learned_range, not {self.config.variance_type}."
            )

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

    def _finish(self) -> None:
        """End the run. The plan is kept for the next run."""
        if self._run is not None:
            self._run.close()
        self._run = None

    def _give_up(self) -> None:
        """End the run and discard its plan. The next run requires `set_timesteps`."""
        self._finish()
        self._plan, self.num_inference_steps, self._begin_index = None, None, None
