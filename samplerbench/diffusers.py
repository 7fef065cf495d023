"""Samplers in diffusers pipelines: `as_scheduler`.

    pipe.scheduler = as_scheduler("dpm++:order=3", pipe.scheduler)

A sampler calls the denoiser; a scheduler is called, with what the network said. So the sampler runs in a thread of its
own, which waits wherever it asks for D, and `step` brings the answer. Only one of the two threads runs at a time.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, ClassVar, NoReturn

import torch

# diffusers loads a pipeline's scheduler only where SchedulerMixin is a name of the scheduler's own module.
from diffusers import ConfigMixin, DDPMScheduler, SchedulerMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from samplerbench import registry
from samplerbench.bench.setup import pick_spacing
from samplerbench.errors import RunError, UserError
from samplerbench.models.discrete import denoised, timestep_at
from samplerbench.models.files import read_json
from samplerbench.models.schedule import VP_SCHEDULERS, Schedule, alphas_cumprod, noise_levels, read_schedule
from samplerbench.sampling import Denoiser, Noise, Prediction, PredictionType, Sampler, Sigma, Spacing, Step
from samplerbench.sampling.noise import split_seed
from samplerbench.sampling.spacing import make_grid

__all__ = ["SamplerScheduler", "as_scheduler"]


def as_scheduler(
    sampler: str | Sampler,
    scheduler: SchedulerMixin | Mapping[str, Any] | str | Path,
    *,
    spacing: str | Spacing | None = None,
    seed: int | None = None,
) -> SamplerScheduler:
    """A sampler as a scheduler for diffusers pipelines of discrete variance-preserving models.

    Args:
        sampler: a spec ("dpm++:order=3", "./mine.py:Mine") or an instance.
        scheduler: who knows the model's noise schedule, prediction type, clipping and variance: the pipeline's present
            scheduler, its configuration with "_class_name", a folder (of the scheduler or of the pipeline), or a hub
            id. What it says of how to sample has no say.
        spacing: a spec or an instance; None is the sampler's own.
        seed: None draws the noise of the steps from the pipeline's `generator`, as diffusers' schedulers do. A number
            draws it as `samplerbench.sample` does: image i of the batch has the noise of sample i, in every call.

    Raises:
        UserError: an unknown plugin; a schedule that is not supported; a sampler that cannot be called step by step:
            it needs more of a model than D, chooses its levels from the image, or changes the state before it asks.
    """
    schedule = _read(scheduler)
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
    """A samplerbench sampler behind the interface of diffusers' schedulers. Made by `as_scheduler`.

    The state a pipeline holds is the model's own, √ᾱ x₀ + √(1-ᾱ) z, so `scale_model_input` does nothing and
    `init_noise_sigma` is 1. The sampler keeps its own, times √(1+σ²), in float32 at least, whatever the pipeline's
    dtype is. `timesteps` has one entry for each evaluation, so a method with k of them a step has `order` k; entries
    between the model's timesteps are float32. Gradients do not pass through `step`.

    Parameters: of `as_scheduler` and, under diffusers' names, of the model's noise schedule. `from_pretrained` and
    `from_config` take what `save_pretrained` and `config` of this class give.

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
        self.spacing: Spacing = pick_spacing(self.sampler, spacing)  # type: ignore[arg-type]
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
        bars = alphas_cumprod(schedule)
        self.levels = noise_levels(bars)
        self.alphas_cumprod = bars.float()
        self.timesteps = torch.arange(len(bars) - 1, -1, -1)
        self.num_inference_steps: int | None = None
        self._plan: _Plan | None = None
        self._times: list[float] = []
        self._begin_index: int | None = None
        self._run: _Run | None = None
        self._ending: weakref.finalize[..., SamplerScheduler] | None = None
        self._noise: Noise | None = None
        self._index = 0
        self._sent: Tensor | None = None
        self._version = 0
        self._refuse_at_once()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The scheduler that a configuration of this class describes; `kwargs` overwrite it.

        Raises:
            UserError: a configuration of another class, which `as_scheduler` takes.
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
        """A copy has no part in a run under way: it begins with `set_timesteps`."""
        state = dict(self.__dict__)
        if self._run is not None:
            parts = ("_run", "_ending", "_noise", "_sent", "_plan", "num_inference_steps")
            state |= dict.fromkeys(parts)
        return state

    # --- What a pipeline calls ----------------------------------------------------------------------------------

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Prepare a run of so many steps of the spacing's grid; a run under way is given up.

        The sampler is rehearsed on a few random numbers, which tells where it will ask for D.

        Args:
            num_inference_steps: N ≥ 1, as --steps of the command line. device: of `timesteps`.

        Raises:
            UserError: a grid that the spacing cannot make, and what `as_scheduler` refuses.
        """
        self._give_up()
        grid = make_grid(self.spacing, self.levels, int(num_inference_steps))
        plan = self._rehearse(grid)
        levels = self.levels.tolist()
        times = [timestep_at(levels, sigma) for sigma in plan.asked]
        whole = all(t.is_integer() for t in times)
        made = torch.tensor(times, dtype=torch.int64 if whole else torch.float32)
        self._times = made.tolist()
        self.timesteps = made.to(device)
        self._plan, self.order = plan, plan.order
        self.num_inference_steps = int(num_inference_steps)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The entry of `timesteps` that the next run begins with: for pipelines that begin with a noised image."""
        self._begin_index = int(begin_index)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The sample as it is."""
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
        """From the network's output at an entry of `timesteps` to the state at which it is asked next.

        Args:
            model_output: (B, C, H, W), guided or not; (B, 2C, H, W) of a network that learned a variance.
            timestep: the entry. sample: (B, C, H, W), what the network saw.
            eta, use_clipped_model_output: taken for pipelines that always give them, and refused where they say
                anything: a sampler's parameters are in its spec.
            generator: of the noise, where `seed` is None.

        Returns:
            `prev_sample`, the next state, after the last entry the image; and `pred_original_sample`, D. Both are
            (B, C, H, W) in the dtype of `sample`, and a tuple where `return_dict` is false.

        Raises:
            UserError: no `set_timesteps` before; an entry out of order; an output or a batch of another shape; a state
                that was changed on the way, where the method remembers earlier ones; a method whose levels depend on
                the image. What the sampler raises comes out as it is.
        """
        if eta or use_clipped_model_output:
            raise UserError(
                "eta and use_clipped_model_output are of DDIMScheduler; here a sampler's parameters are in its spec: "
                'as_scheduler("NAME:parameter=value", …).'
            )
        plan = self._plan
        if plan is None:
            raise UserError("call set_timesteps(num_inference_steps) before step.")
        if isinstance(timestep, Tensor) and timestep.numel() != 1:
            raise UserError(f"step takes one timestep for the whole batch, not {timestep.numel()}.")
        if self._run is None:
            self._index = self._first(plan, timestep)
        self._check_order(timestep)
        self._check_shapes(model_output, sample)
        try:
            run = self._running(plan, sample, generator)
            x, sigma = run.x, run.sigma
            prediction = self._prediction(model_output, x, sigma)
            self._index += 1
            run.answer(prediction)
            self._check_request(plan, run)
        except BaseException:
            self._give_up()
            raise
        following = (run.x * (1 + run.sigma**2) ** -0.5).to(sample.dtype)
        if run.ended:
            self._finish()
        else:
            self._sent, self._version = following, _version(following)
        x0 = prediction.x0.to(sample.dtype)
        return DDPMSchedulerOutput(following, x0) if return_dict else (following, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """√ᾱ x₀ + √(1-ᾱ) z at the timesteps (B,) or (1,), of the grid or between, in the dtype of x₀ (B, C, H, W)."""
        t = timesteps.to(original_samples.device).double().clamp(0, len(self.levels) - 1)
        logs = self.levels.log().to(t.device)
        low = t.long().clamp(max=len(logs) - 2)
        sigma = (logs[low] + (t - low) * (logs[low + 1] - logs[low])).exp()
        keep = (1 + sigma**2).rsqrt().reshape(-1, *[1] * (original_samples.ndim - 1))
        spread = keep * sigma.reshape(keep.shape)
        dtype = _working(original_samples.dtype)
        mixed = keep.to(dtype) * original_samples.to(dtype) + spread.to(dtype) * noise.to(dtype)
        return mixed.to(original_samples.dtype)

    # --- What can be said before a run --------------------------------------------------------------------------

    def _refuse_at_once(self) -> None:
        """Raise UserError for a sampler that no number of steps would make a scheduler of."""
        if self.sampler.needs:
            needed = " and ".join(sorted(self.sampler.needs))
            self._refuse(f"it needs the model's {needed}, and a scheduler sees only what the network says")
        if self.sampler.nfe(1) is None:
            self._refuse("it chooses its levels from the image, and a pipeline wants all timesteps before it begins")
        if self.sampler.nfe(1) == 0:
            self._refuse("it never asks the network")
        index = torch.linspace(len(self.levels) - 1, 0, 10).round().long().unique().flip(0)
        self.order = self._rehearse(torch.cat([self.levels[index], self.levels.new_zeros(1)])).order

    def _refuse(self, why: str) -> NoReturn:
        _refuse(self.sampler.label(), why)

    def _rehearse(self, sigmas: Tensor) -> _Plan:
        """Where the sampler asks for D on this grid: the same on two different inputs, or it is refused."""
        first, second = (_Rehearsal(self, sigmas, scale) for scale in (1.0, 0.3))
        for rehearsal in (first, second):
            for _ in rehearsal.walk():
                pass
        if not first.steps:
            self._refuse("it yielded no step")
        if not first.asked:
            self._refuse("it never asks the network")
        if first.asked != second.asked:
            self._refuse("the levels at which it asks for D depend on the image")
        if first.moved:
            self._refuse("it changes the state before it first asks for D, and a pipeline asks the network first")
        return _Plan(sigmas, first.asked, first.entries, first.costs())

    def _remembers(self, plan: _Plan) -> bool:
        """Whether a step depends on more than the state it starts from: found by starting anew at every step."""
        if plan.remembers is None:
            whole = _Rehearsal(self, plan.sigmas, 1.0)
            states = [(whole.x, 0)] + [(step.x, whole.noise.draws) for step in whole.walk()]
            n = len(plan.sigmas) - 1
            plan.remembers = len(states) != n + 1 or not all(
                torch.allclose(self._one_step(plan, i, *states[i]), states[i + 1][0], rtol=1e-9, atol=1e-12)
                for i in range(1, n)
            )
        return plan.remembers

    def _one_step(self, plan: _Plan, i: int, x: Tensor, draws: int) -> Tensor:
        alone = _Rehearsal(self, plan.sigmas[i:], 1.0)
        alone.x, alone.noise.draws = x, draws
        return next(alone.walk()).x

    # --- A run --------------------------------------------------------------------------------------------------

    def _first(self, plan: _Plan, timestep: float | Tensor) -> int:
        """The entry that a run begins with, which must be one where an interval of the grid begins."""
        if self._begin_index is not None:
            index = self._begin_index
        else:
            value = float(timestep)
            found = [k for k, t in enumerate(self._times) if t == value]
            index = next((k for k in found if plan.entries[k] is not None), found[0] if found else 0)
        if not 0 <= index < len(self._times) or (index and plan.entries[index] is None):
            raise UserError(
                f"sampler {self.sampler.label()} cannot begin at entry {index} of {len(self._times)} timesteps: no "
                f"interval of its grid begins there. It has {self.order} a step."
            )
        if index:
            tail = self._rehearse(plan.sigmas[plan.entries[index] :])
            if tail.asked != plan.asked[index:]:
                self._refuse("it asks at other levels where it begins further down")
        return index

    def _check_order(self, timestep: float | Tensor) -> None:
        entry = self.timesteps[self._index]
        # The same memory is the same entry: to look into it would wait for the device.
        on_device = isinstance(timestep, Tensor) and timestep.device == entry.device and entry.device.type != "cpu"
        if on_device and timestep.data_ptr() == entry.data_ptr():  # type: ignore[union-attr]
            return
        if float(timestep) != self._times[self._index]:
            raise UserError(
                f"step was called with timestep {float(timestep):g}, but the next of this run is "
                f"{self._times[self._index]:g}; call set_timesteps to begin anew."
            )

    def _check_shapes(self, output: Tensor, sample: Tensor) -> None:
        if self._sent is not None and sample.shape != self._sent.shape:
            raise UserError(
                f"the run was begun with states of shape {tuple(self._sent.shape)}, and is given {tuple(sample.shape)};"
                " call set_timesteps to begin anew."
            )
        wide = (len(sample), 2 * sample.shape[1], *sample.shape[2:])
        if output.shape != sample.shape and not (self._doubled and output.shape == wide):
            raise UserError(
                f"the network's output has shape {tuple(output.shape)}, and the state {tuple(sample.shape)}; twice the "
                f"channels need variance_type learned or learned_range, and here it is {self.config.variance_type}."
            )

    @property
    def _doubled(self) -> bool:
        return self.config.variance_type in ("learned", "learned_range")

    def _running(self, plan: _Plan, sample: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> _Run:
        """The run, waiting for D at this sample: begun where there is none, or begun anew where it was changed."""
        if self._run is None:
            dtype = _working(sample.dtype)
            if self.config.seed is None:
                self._noise = _Drawn(sample.shape, sample.device, dtype)
            else:
                index = torch.arange(len(sample), device=sample.device)
                self._noise = Noise(self.config.seed, index, sample.shape[1:], dtype)
            start = plan.entries[self._index] or 0
        elif self._is_sent(sample):
            start = None
        else:
            start = self._changed(plan)
        if isinstance(self._noise, _Drawn):
            self._noise.generator = generator
        if start is not None:
            self._stop()
            assert self._noise is not None
            sigmas = plan.sigmas[start:]
            x = sample.to(_working(sample.dtype)) * (1 + float(sigmas[0]) ** 2) ** 0.5
            self._run = _Run(
                _Asking(self.sampler.label(), self.levels, self.config.prediction_type),
                self.sampler,
                x,
                sigmas,
                self._noise,
            )
            # A scheduler that nobody holds any more ends its thread.
            self._ending = weakref.finalize(self, self._run.close)
            self._check_request(plan, self._run)
        assert self._run is not None
        return self._run

    def _is_sent(self, sample: Tensor) -> bool:
        """Whether this is the state that the last step returned."""
        assert self._run is not None
        assert self._sent is not None
        if sample is self._sent and self._version == _version(sample) != -1:
            return True
        # Compared with the sampler's own state, as what was returned may have been written into.
        sent = (self._run.x * (1 + self._run.sigma**2) ** -0.5).to(self._sent.dtype)
        return torch.equal(sample, sent.to(sample))

    def _changed(self, plan: _Plan) -> int:
        """The interval to begin anew with, as the pipeline changed the state."""
        interval = plan.entries[self._index]
        label = self.sampler.label()
        if interval is None:
            raise UserError(
                f"the pipeline changed the state at entry {self._index} of the timesteps, within a step of sampler "
                f"{label}, which cannot be followed; use a sampler with one evaluation a step."
            )
        if self._remembers(plan):
            raise UserError(
                f"the pipeline changed the state at entry {self._index} of the timesteps, which sampler {label} cannot "
                "follow: its steps depend on more than the state. Use one that remembers nothing, as ancestral ones do."
            )
        return interval

    def _check_request(self, plan: _Plan, run: _Run) -> None:
        """Raise UserError where the run asks elsewhere than the rehearsal did."""
        expected = plan.asked[self._index] if self._index < len(plan.asked) else None
        if (None if run.ended else run.sigma) != expected:
            self._refuse("the levels at which it asks for D depend on the image")

    def _prediction(self, output: Tensor, x: Tensor, sigma: float) -> Prediction:
        """D and, where the network learned it, the variance, from the network's output at x/√(1+σ²)."""
        output, variance = output.to(x.dtype), None
        if output.shape[1] == 2 * x.shape[1]:
            output, fraction = output.chunk(2, dim=1)
            variance = (fraction + 1) / 2 if self.config.variance_type == "learned_range" else None
        x0 = denoised(self.config.prediction_type, output, x, sigma)
        # A pipeline may have overruled the clipping in the configuration, as Stable Diffusion's do.
        if self.config.clip_sample:
            x0 = x0.clamp(-self.config.clip_sample_range, self.config.clip_sample_range)
        return Prediction(x0, variance)

    def _stop(self) -> None:
        if self._ending is not None:
            self._ending()
        self._run, self._ending, self._sent = None, None, None

    def _finish(self) -> None:
        """The run is over; the next one may begin as this one did."""
        self._stop()
        self._noise = None

    def _give_up(self) -> None:
        """The run is over, and its plan: the next begins with `set_timesteps`."""
        self._finish()
        self._plan, self.num_inference_steps, self._begin_index = None, None, None


# --- The sampler's side -----------------------------------------------------------------------------------------------


@dataclass
class _Plan:
    """A grid and where the sampler asks for D on it.

    asked: the level of each evaluation. entries: of each, the interval of the grid that begins with it at the state
    that the last one ended with, else None. costs: evaluations of each interval. remembers: see `_remembers`.
    """

    sigmas: Tensor
    asked: list[float]
    entries: list[int | None]
    costs: list[int] = field(default_factory=list)
    remembers: bool | None = None

    @property
    def order(self) -> int:
        """Evaluations per step, which the last one may deviate from; 1 where they differ."""
        return self.costs[0] if len(set(self.costs[:-1] or self.costs)) == 1 else 1


class _Scheduled(Denoiser):
    """A denoiser that gives D for the whole batch and nothing else."""

    variance_preserving = True

    def __init__(self, label: str, levels: Tensor, prediction: PredictionType) -> None:
        self.label, self.levels, self.prediction = label, levels, prediction

    def _level(self, sigma: Sigma) -> float:
        if isinstance(sigma, Tensor) and sigma.ndim:
            _refuse(
                self.label, "it asks for D at another level for each image, and a pipeline has one timestep for all"
            )
        return float(sigma)

    def rows(self, index: Tensor) -> Denoiser:
        _refuse(self.label, "it steps each image alone, and a pipeline evaluates the whole batch")

    def _more(self, *_: Any, **__: Any) -> NoReturn:
        _refuse(self.label, "it asks a model for more than D, and a scheduler sees only what the network says")

    conditional = unconditional = both = classifier_score = denoised_score = _more
    posterior_variance = scale_latents = _more


class _Rehearsal(_Scheduled):
    """A run on two small random states in float64, with a denoiser that is one in name only."""

    def __init__(self, scheduler: SamplerScheduler, sigmas: Tensor, scale: float) -> None:
        super().__init__(scheduler.sampler.label(), scheduler.levels, scheduler.config.prediction_type)
        self.sampler, self.sigmas = scheduler.sampler, sigmas
        self.learned = scheduler.config.variance_type == "learned_range"
        z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.x = z * scale * math.sqrt(1 + float(sigmas[0]) ** 2)
        self.noise = _Dice(z)
        self.steps = 0
        self.asked: list[float] = []
        self.entries: list[int | None] = []
        self.moved = False
        self._at: list[int] = []

    def walk(self) -> Iterator[Step]:
        """The sampler's steps."""
        self.here = self.x
        run = self.sampler.steps(self, self.x, self.sigmas, self.noise)
        while True:
            with torch.no_grad():
                step = next(run, None)
            if step is None:
                return
            self.steps += 1
            self.here = step.x
            yield step

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        level = self._level(sigma)
        i, scaled = self.steps, x * (1 + level**2) ** -0.5
        if not self.asked:
            start = self.x * (1 + float(self.sigmas[0]) ** 2) ** -0.5
            # Not exactly: a sampler with a grid of its own comes there by another way.
            self.moved = not torch.allclose(scaled, start, rtol=1e-5, atol=1e-5)
        first = not self._at or self._at[-1] < i
        begins = first and i < len(self.sigmas) - 1 and level == float(self.sigmas[i]) and torch.equal(x, self.here)
        self.asked.append(level)
        self.entries.append(i if begins else None)
        self._at.append(i)
        return Prediction(torch.tanh(scaled + 0.3), torch.sigmoid(scaled) if self.learned else None)

    def costs(self) -> list[int]:
        """Evaluations of each interval."""
        return [self._at.count(i) for i in range(self.steps)]


class _Dice(Noise):
    """Noise for rehearsals: a function of the number of the draw, and much cheaper than the real one."""

    def __init__(self, z: Tensor) -> None:
        self._z = z
        self.draws = 0

    def __call__(self) -> Tensor:
        self.draws += 1
        return torch.sin(self._z * (40 + self.draws))


class _Drawn(Noise):
    """The noise of the pipeline's generator, drawn as diffusers' own schedulers draw it."""

    def __init__(self, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> None:
        self._shape, self._device, self._dtype = shape, device, dtype
        self.draws = 0
        self.generator: torch.Generator | list[torch.Generator] | None = None

    def __call__(self) -> Tensor:
        self.draws += 1
        return randn_tensor(self._shape, generator=self.generator, device=self._device, dtype=self._dtype)


@dataclass(frozen=True)
class _State:
    """What the sampler's thread hands over: the state where it waits for D, or the last one."""

    x: Tensor
    sigma: float
    ended: bool = False


class _Closed(BaseException):
    """Ends a sampler that waits for an answer that nobody will give."""


class _Asking(_Scheduled):
    """The denoiser in the sampler's thread: hands over the question and waits for the answer."""

    def __init__(self, label: str, levels: Tensor, prediction: PredictionType) -> None:
        super().__init__(label, levels, prediction)
        self.questions: SimpleQueue[_State | BaseException] = SimpleQueue()
        self.answers: SimpleQueue[tuple[Prediction, Any] | None] = SimpleQueue()

    def predict(self, x: Tensor, sigma: Sigma) -> Prediction:
        self.questions.put(_State(x, self._level(sigma)))
        answer = self.answers.get()
        if answer is None:
            raise _Closed
        prediction, stream = answer
        _follow(stream)
        return prediction


class _Run:
    """A sampler under way in a thread of its own, and where it stands.

    x, sigma: the state at which it waits for D, (B, C, H, W), and its level; the last state where it has ended.
    """

    def __init__(self, asking: _Asking, sampler: Sampler, x: Tensor, sigmas: Tensor, noise: Noise) -> None:
        self._asking = asking
        modes = (torch.is_inference_mode_enabled(), _stream(x))
        # The thread holds neither the scheduler nor this object, so both can be collected while it waits.
        arguments = (asking, sampler, x, sigmas, noise, modes)
        self._thread = threading.Thread(target=_work, args=arguments, name=f"sampler {asking.label}", daemon=True)
        self._thread.start()
        self._receive()

    @property
    def x(self) -> Tensor:
        return self._state.x

    @property
    def sigma(self) -> float:
        return self._state.sigma

    @property
    def ended(self) -> bool:
        return self._state.ended

    def answer(self, prediction: Prediction) -> None:
        """Give D, and take over where the sampler asks next. What it raises is raised here."""
        self._asking.answers.put((prediction, _stream(prediction.x0)))
        self._receive()

    def close(self) -> None:
        """End the thread, wherever it is. Closing again does nothing."""
        self._asking.answers.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _receive(self) -> None:
        try:
            found = self._asking.questions.get()
        except BaseException:  # Ctrl-C while the sampler computes
            self._asking.answers.put(None)
            raise
        if isinstance(found, BaseException):
            raise found
        self._state = found


def _work(asking: _Asking, sampler: Sampler, x: Tensor, sigmas: Tensor, noise: Noise, modes: tuple[bool, Any]) -> None:
    """The sampler's thread. The modes of torch are each thread's own, so those of the pipeline are set here too."""
    inference, stream = modes
    try:
        _follow(stream)
        last = None
        with torch.inference_mode(inference), torch.no_grad():
            for step in sampler.steps(asking, x, sigmas, noise):
                last = step
        if last is None:
            raise RunError(f"sampler {asking.label} yielded no step.")
        asking.questions.put(_State(last.x, last.sigma, ended=True))
    except _Closed:
        pass
    except BaseException as error:
        asking.questions.put(error)


def _refuse(label: str, why: str) -> NoReturn:
    raise UserError(f"sampler {label} cannot be a diffusers scheduler: {why}.")


def _stream(x: Tensor) -> Any:
    return torch.cuda.current_stream(x.device) if x.device.type == "cuda" else None


def _follow(stream: Any) -> None:
    """Queue this thread's work on the pipeline's device and stream, so that it runs in order with the network's."""
    if stream is not None:
        torch.cuda.set_stream(stream)


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _version(x: Tensor) -> int:
    """How often a tensor was written into; -1 where torch does not count."""
    return -1 if x.is_inference() else x._version


def _read(scheduler: SchedulerMixin | Mapping[str, Any] | str | Path) -> Schedule:
    """The model's noise schedule, from whatever knows it."""
    config: Mapping[str, Any]
    if isinstance(scheduler, str | Path):
        folder, source = Path(scheduler).expanduser(), str(scheduler)
        if folder.is_dir():
            inner = folder if (folder / "scheduler_config.json").is_file() else folder / "scheduler"
            config = read_json(inner / "scheduler_config.json", f"{source} has no scheduler")
        else:
            try:
                config = DDPMScheduler.load_config(source, subfolder="scheduler")
            except (OSError, ValueError) as error:
                raise UserError(
                    f'no scheduler "{source}": it is no folder, and not found on the hub '
                    f"({str(error).strip().splitlines()[0]})"
                ) from None
        name = config.get("_class_name")
    elif isinstance(scheduler, Mapping):
        config, source, name = scheduler, "the configuration", scheduler.get("_class_name")
    else:
        config, name = getattr(scheduler, "config", {}), type(scheduler).__name__
        source = "the pipeline"
    if name is None:
        raise UserError(f'{source} does not name the scheduler\'s class ("_class_name"); give the scheduler itself.')
    # This class's own configurations say all that DDPMScheduler's say.
    return read_schedule("DDPMScheduler" if name == SamplerScheduler.__name__ else name, config, source)
