"""The base class of schedulers that run a sampler: what a pipeline calls, whatever the model's forward process."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

# diffusers loads a scheduler only if SchedulerMixin is a name in the scheduler's module.
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.schedulers.scheduling_ddpm import DDPMSchedulerOutput
from torch import Tensor

from samplerbench.diffusers.plan import Plan, Subject
from samplerbench.diffusers.run import Run
from samplerbench.errors import UserError
from samplerbench.sampling import Prediction, Sampler, Spacing, Step
from samplerbench.sampling.driver import OnStep

__all__ = ["StepScheduler"]


class StepScheduler(SchedulerMixin, ConfigMixin):
    """A sampler that is called with the network's output, one evaluation at a time.

    The sampler keeps its own state in at least float32. `timesteps` has one entry for each network evaluation, so a
    method with k evaluations per step has `order` k. `step` does not propagate gradients.
    """

    order = 1
    init_noise_sigma = 1.0
    sampler: Sampler
    spacing: Spacing
    timesteps: Tensor
    samples: Tensor | None = None
    """Indices of the samples whose noise is drawn with the seed, (B,). None for 0 … B-1."""
    pinned: Tensor | None = None
    """Noise levels of the next runs, (N+1,) float64, whatever `set_timesteps` is called with. None for no effect."""
    on_step: OnStep | None = None
    """Called with the number of the step and the step, whenever the sampler reaches a level of the grid."""
    draws = 0
    """Number of draws of noise in the last run."""
    num_inference_steps: int | None = None
    _plan: Plan | None = None
    _begin_index: int | None = None
    _run: Run | None = None

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

    def __getstate__(self) -> dict[str, Any]:
        """A copy does not continue a run in progress. Call `set_timesteps` on it first."""
        state = dict(self.__dict__)
        if self._run is not None:
            state |= dict.fromkeys(("_run", "_plan", "num_inference_steps"))
        return state

    # --- What a pipeline calls ----------------------------------------------------------------------------------

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
        run = self._run or Run(plan, plan.first(timestep, self._begin_index), self.config.seed, self.samples)
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
        self._report(run, following)
        if run.done:
            self._finish()
        x0 = prediction.x0.to(sample.dtype)
        return DDPMSchedulerOutput(following, x0) if return_dict else (following, x0)

    # --- Around a run -------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _subject(self) -> Subject:
        """The sampler, and what is known of the model."""

    @abstractmethod
    def _prediction(self, output: Tensor, x: Tensor, sigma: float) -> Prediction:
        """D, and the variance if the network predicts it, from the network's output at the state x."""

    @property
    def _wider(self) -> str:
        """What is added to the error for an output with another shape than the state."""
        return ""

    @property
    def _doubled(self) -> bool:
        """Whether the network's output may have twice the channels of the state."""
        return False

    def _prepare(self, plan: Plan, device: str | torch.device | None) -> None:
        """Store the plan of the next runs. A run in progress is stopped."""
        self._give_up()
        self.timesteps = plan.timesteps.to(device)
        self._plan, self.order = plan, plan.order
        self.num_inference_steps = len(plan.sigmas) - 1

    def _pin(self, steps: int) -> Tensor | None:
        """The noise levels that `pinned` prescribes for N steps, or None."""
        if self.pinned is not None and len(self.pinned) != steps + 1:
            raise UserError(f"the pipeline takes {steps} steps instead of {len(self.pinned) - 1}; use another number.")
        return self.pinned

    def _report(self, run: Run, x: Tensor) -> None:
        """Call `on_step` if an interval of the grid has ended."""
        if self.on_step is None:
            return
        finished = len(run.plan.sigmas) - 1 if run.done else run.plan.entries[run.index]
        if finished:
            self.on_step(finished - 1, Step(float(run.plan.sigmas[finished]), x))

    def _check_order(self, run: Run, timestep: float | Tensor) -> None:
        entry, expected = self.timesteps[run.index], run.plan.times[run.index]
        # Equal memory is the same entry. Comparing the values would synchronise with the device.
        on_device = isinstance(timestep, Tensor) and timestep.device == entry.device and entry.device.type != "cpu"
        if on_device and timestep.data_ptr() == entry.data_ptr():  # type: ignore[union-attr]
            return
        if float(timestep) != expected:
            raise UserError(
                f"step was called with timestep {float(timestep):g}, but the next one of this run is "
                f"{expected:g}; call set_timesteps to start a new run."
            )

    def _check_shapes(self, run: Run, output: Tensor, sample: Tensor) -> None:
        if run.sent is not None and sample.shape != run.sent.shape:
            raise UserError(
                f"the run started with states of shape {tuple(run.sent.shape)}, but got {tuple(sample.shape)}; call "
                "set_timesteps to start a new run."
            )
        wide = (len(sample), 2 * sample.shape[1], *sample.shape[2:])
        if output.shape != sample.shape and not (self._doubled and output.shape == wide):
            raise UserError(
                f"the network's output has shape {tuple(output.shape)}, but the state has "
                f"{tuple(sample.shape)}{self._wider}."
            )

    def _finish(self) -> None:
        """End the run. The plan is kept for the next run."""
        if self._run is not None:
            self.draws = self._run.draws
            self._run.close()
        self._run = None

    def _give_up(self) -> None:
        """End the run and discard its plan. The next run requires `set_timesteps`."""
        self._finish()
        self._plan, self.num_inference_steps, self._begin_index = None, None, None
