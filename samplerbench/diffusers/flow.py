"""Samplers as schedulers of rectified flows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch

# diffusers loads a scheduler only if SchedulerMixin is a name in the scheduler's module.
from diffusers import SchedulerMixin as SchedulerMixin
from torch import Tensor

from samplerbench import registry
from samplerbench.diffusers.plan import Subject
from samplerbench.diffusers.scheduler import StepScheduler
from samplerbench.diffusers.source import ScheduleView
from samplerbench.errors import UserError
from samplerbench.models.flow import FLOW_SCHEDULERS, flow_levels
from samplerbench.models.preconditioning import FLOW
from samplerbench.models.sample import state_dtype
from samplerbench.sampling import Prediction, Sampler, Spacing
from samplerbench.sampling.flow import FlowSchedule
from samplerbench.sampling.noise import split_seed
from samplerbench.sampling.process import RECTIFIED_FLOW, flow_time
from samplerbench.sampling.spacing import bind_spacing, make_grid, pick_spacing

__all__ = ["FlowSamplerScheduler"]


class FlowSamplerScheduler(StepScheduler):
    """A sampler as the scheduler of a rectified flow. Create it with `as_scheduler`.

    The state in the pipeline is y = (1-t) x₀ + t z, and the network predicts v = z - x₀, so D = y - t v (Liu et al.
    2023; Lipman et al. 2023). `timesteps` are T t, float32, one for each network evaluation. `sigmas` are the times t,
    followed by 0, as in diffusers' schedulers. The other arguments are those of `FlowMatchEulerDiscreteScheduler`.

    The time steps are those of the first line that applies:

    1. `spacing`, if it is given. Of the arguments `sigmas` and `mu` of `set_timesteps`, only the number of steps and
       the dynamic shift of the spacing `flow` are used.
    2. The sampler's own spacing, for samplers such as `langevin` that keep theirs.
    3. The `sigmas` that the pipeline passes to `set_timesteps`, with the shift of this configuration: `shift`, or with
       `use_dynamic_shifting` that of `mu`. diffusers computes them in the same way.
    4. t = 1, 1-1/N, …, 1/N, with the same shift.

    Args:
        sampler: as for `as_scheduler`.
        num_train_timesteps: number of time steps T of training.
        shift: static shift s, t ↦ s t/(1 + (s-1) t).
        use_dynamic_shifting: whether the shift depends on the size of the image, through `mu`.
        base_shift: μ at `base_image_seq_len`. Pipelines read it to compute `mu`.
        max_shift: μ at `max_image_seq_len`.
        base_image_seq_len: number of image tokens.
        max_image_seq_len: number of image tokens.
        shift_terminal: last time before 0, to which the times are stretched.
        time_shift_type: whether the dynamic shift is e^μ ("exponential") or μ ("linear").
        spacing: as for `as_scheduler`.
        seed: as for `as_scheduler`.

    Raises:
        UserError: as `as_scheduler`.
    """

    _compatibles: ClassVar[list[str]] = list(FLOW_SCHEDULERS)

    def __init__(
        self,
        sampler: str | Sampler,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        time_shift_type: Literal["exponential", "linear"] = "exponential",
        spacing: str | Spacing | None = None,
        seed: int | None = None,
    ) -> None:
        self.sampler = registry.parse("sampler", sampler)
        self.spacing = pick_spacing(self.sampler, spacing, "flow")
        if seed is not None:
            split_seed(seed)
        self.register_to_config(
            sampler=self.sampler.spec,
            num_train_timesteps=num_train_timesteps,
            shift=shift,
            use_dynamic_shifting=use_dynamic_shifting,
            base_shift=base_shift,
            max_shift=max_shift,
            base_image_seq_len=base_image_seq_len,
            max_image_seq_len=max_image_seq_len,
            shift_terminal=shift_terminal,
            time_shift_type=time_shift_type,
            spacing=None if spacing is None else self.spacing.spec,
            seed=seed,
        )
        self.flow = FlowSchedule(
            timesteps=num_train_timesteps,
            shift=shift,
            dynamic=use_dynamic_shifting,
            kind=time_shift_type,
            base_shift=base_shift,
            max_shift=max_shift,
            base_tokens=base_image_seq_len,
            max_tokens=max_image_seq_len,
            terminal=shift_terminal,
        )
        self.levels = flow_levels(num_train_timesteps)
        self._unshift = 1.0
        self.timesteps = torch.arange(num_train_timesteps, 0, -1, dtype=torch.float32)
        self.sigmas = torch.cat([self.timesteps / num_train_timesteps, torch.zeros(1)])
        self.order = self._subject.check(self._grid(10, None, None)).order

    def __len__(self) -> int:
        return len(self.levels) + 1

    # --- What a pipeline calls ----------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Prepare a run. A run in progress is stopped.

        The sampler first runs on a small random tensor, to find the noise levels of its evaluations.

        Args:
            num_inference_steps: number of intervals N ≥ 1 of the grid, like `steps` of a run. None with `sigmas`.
            device: device of `timesteps`.
            sigmas: times t before the shift, N decreasing values in (0, 1].
            mu: μ of the dynamic shift.
            timesteps: T t of the times `sigmas`. Only with `sigmas`. The network is then given the times before the
                shift, as in the pipelines of CogView4.

        Raises:
            UserError: `sigmas`, `timesteps` or `num_inference_steps` do not match, or are not valid; `mu` is missing;
                the spacing cannot provide N steps; or an error of `as_scheduler`.
        """
        self._give_up()
        if num_inference_steps is None:
            if sigmas is None:
                raise UserError("set_timesteps requires num_inference_steps, or sigmas.")
            num_inference_steps = len(sigmas)
        steps = int(num_inference_steps)
        times = None if sigmas is None else _times(sigmas, steps)
        unknown = times is None or self.flow.terminal is not None
        if timesteps is not None and (unknown or not self._are_times(timesteps, times)):
            raise UserError(
                "set_timesteps supports timesteps only together with sigmas of the same times; pass only sigmas."
            )
        if self.flow.dynamic and mu is None and self.config.spacing is None and self.pinned is None:
            raise UserError(
                "the shift of this schedule depends on the size of the image, so set_timesteps requires mu; pass it, "
                'or choose a shift: as_scheduler(…, spacing="flow:shift=3").'
            )
        pinned = self._pin(steps)
        grid = self._grid(steps, times, mu) if pinned is None else pinned
        self._unshift = 1.0 if timesteps is None else self._shifted_by(mu).factor()
        plan = self._subject.plan(grid)
        self._prepare(plan, device)
        self.sigmas = torch.tensor([*map(flow_time, plan.evaluations), 0.0], dtype=torch.float32)

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor) -> Tensor:
        """Noise images: (1-t) x₀ + t z.

        Args:
            sample: x₀, (B, C, H, W).
            timestep: T t, a number, (B,) or (1,).
            noise: z, (B, C, H, W).

        Returns:
            (B, C, H, W), in the dtype of `sample`.
        """
        t = (torch.as_tensor(timestep, device=sample.device).double() / self.flow.timesteps).clamp(0, 1)
        t = self._unshift * t / (1 + (self._unshift - 1) * t)
        dtype = state_dtype(sample.dtype)
        t = t.to(dtype).reshape(-1, *[1] * (sample.ndim - 1))
        return ((1 - t) * sample.to(dtype) + t * noise.to(dtype)).to(sample.dtype)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise` with the arguments in the order of diffusers' other schedulers."""
        return self.scale_noise(original_samples, timesteps, noise)

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """The first entry of `timesteps` that equals a timestep at which a run can start.

        Raises:
            UserError: no entry equals it.
        """
        entries = (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist()
        value = float(timestep)
        equal = [k for k, t in enumerate(entries) if t == value]
        starts = [k for k in equal if self._plan is None or self._plan.entries[k] is not None]
        if not equal:
            raise UserError(f"{value:g} is not one of the timesteps of this run.")
        return (starts or equal)[0]

    @property
    def begin_index(self) -> int | None:
        """The entry that was passed to `set_begin_index`, or None."""
        return self._begin_index

    @property
    def step_index(self) -> int | None:
        """The next entry of `timesteps` in a run. None if there is no run."""
        return None if self._run is None else self._run.index

    # --- Around a run -------------------------------------------------------------------------------------------

    def _grid(self, steps: int, times: Tensor | None, mu: float | None) -> Tensor:
        """The noise levels of a run, (N+1,) float64. See the class."""
        flow = self._shifted_by(mu)
        view: Any = ScheduleView(self.levels, flow)
        spacing = bind_spacing(self.spacing, view, self.sampler)
        if times is None or self.config.spacing is not None or spacing.spec != "flow":
            return make_grid(spacing, self.levels, steps)
        return flow.shifted(torch.cat([times / (1 - times), times.new_zeros(1)]))

    def _shifted_by(self, mu: float | None) -> FlowSchedule:
        """The schedule with μ, which has no effect without a dynamic shift. Without tokens, `base_shift` is μ."""
        return self.flow if mu is None else replace(self.flow, base_shift=float(mu))

    def _are_times(self, timesteps: Sequence[float] | Tensor, times: Tensor | None) -> bool:
        given = torch.as_tensor(timesteps, dtype=torch.float64) / self.flow.timesteps
        return times is not None and given.shape == times.shape and torch.allclose(given, times, rtol=0, atol=1e-6)

    def _time(self, sigma: float) -> float:
        """The timestep that the pipeline is given at a noise level."""
        return self.flow.timesteps * flow_time(sigma / self._unshift)

    @property
    def _subject(self) -> Subject:
        return Subject(self.sampler, self.levels, False, process=RECTIFIED_FLOW, time=self._time)

    def _prediction(self, output: Tensor, x: Tensor, sigma: float) -> Prediction:
        return Prediction(FLOW.denoised(output.to(x.dtype), x, sigma))


def _times(sigmas: Sequence[float] | Tensor, steps: int) -> Tensor:
    """The argument `sigmas` of `set_timesteps`, (N,) float64."""
    times = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
    if times.shape != (steps,):
        raise UserError(f"sigmas has {times.numel()} values, but num_inference_steps is {steps}.")
    if not len(times) or not bool((times.diff() < 0).all()) or not bool(((times > 0) & (times <= 1)).all()):
        raise UserError("sigmas must be decreasing times above 0 and at most 1.")
    return times
